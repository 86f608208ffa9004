"""A finished run -> what it was made from, what it cost and how large the student is."""

import platform
import textwrap
from datetime import UTC, datetime
from importlib.metadata import version

import torch

from qimera import __version__
from qimera.assessment.estimation import Estimate
from qimera.config.base import Settings
from qimera.config.bits import spell_layer_bits
from qimera.config.run_settings import RunSettings
from qimera.quantization.ends import told_of_ends
from qimera.quantization.sizes import float_bytes, packed_bytes
from qimera.synthesis.bank import SampleBank
from qimera.teacher.sources import short_source
from qimera.teacher.teacher import Teacher


class Summary(Settings):
    """Result of a run."""

    model: str
    """Where the model came from, without directories."""

    warnings: tuple[str, ...] = ()
    """What a person should know before trusting the rest, the most important first; empty for a good run."""

    teacher_hash: str
    """Hash of the full-precision graph and all its weights."""

    num_classes: int
    """Classes of the model."""

    bits: str
    """Such as ``w4a4``."""

    scheme: str
    """``hardware`` or ``paper``."""

    target: str = "onnxruntime"
    """Runtime whose rounding the student matches."""

    layer_bits: str
    """Exceptions by layer name, as ``--layer-bits`` takes them, including those that a budget chose."""

    first_last_bits: int = 0
    """Bits of the first and the last layer, unless ``layer_bits`` names one of them; 0 where they have the bits of all
    others, or ``layer_bits`` names both."""

    budget: str = ""
    """Such as ``size=0.14``; empty where there was none."""

    allocation: tuple[str, ...] = ()
    """What the budget chose, in lines for a person."""

    recipe: str
    """Name of the recipe; of several, the one whose student was kept."""

    seed: int
    """Start of all random numbers."""

    num_samples: int
    """Synthetic samples in the bank that students may learn from."""

    num_held_out: int = 0
    """Synthetic samples in the bank that no student learns from."""

    has_batch_norms: bool = True
    """Whether the network has batch norms, without which there is no estimate."""

    num_images: int = 0
    """Unlabelled images of the user's that the student was made from beside the samples, or alone."""

    bank_hash: str = ""
    """Hash of the whole bank: pixels and soft labels of samples, held-out ones and images. Empty in old runs."""

    num_steps: int
    """Training steps of the student."""

    estimate: Estimate | None = None
    """Accuracy that the student loses, estimated from held-out samples. None if the bank has no such samples, or if a
    warning says that samples do not resemble what the network was trained on."""

    bank_agreement: float | None = None
    """Percent of synthetic samples that student and teacher put into the same class. Only old runs without held-out
    samples have it; the student was trained on most of these samples."""

    teacher_bytes: int
    """Parameters and buffers in float32."""

    student_bytes: int
    """Tensors in the student's ONNX file: packed weights, scales, biases, and what stays in float32."""

    bank_seconds: float | None
    """None for a bank made earlier."""

    student_seconds: float | None
    """Time that the training of the student took; None if nothing was recorded."""

    finished: str
    """UTC."""

    machine: str
    """Processor and CPU threads."""

    versions: dict[str, str]
    """Versions of qimera, torch and torchao."""

    @property
    def estimated_drop(self) -> float | None:
        """In points; None where there is no estimate."""
        return None if self.estimate is None else self.estimate.drop

    @property
    def is_warned_of(self) -> bool:
        """Whether a warning says why there is no estimate, where there is none."""
        return self.num_held_out > 0 or not self.has_batch_norms

    @property
    def caution(self) -> str:
        """What a person should know of the estimate beside its interval; empty where there is nothing."""
        if self.estimate is None or self.num_steps < _TRAINED:
            return ""
        return "students that were trained for long often lose more than that, up to twice as much"

    @property
    def counted_images(self) -> str:
        """How many images of the user's there were; empty where there were none."""
        if not self.num_images:
            return ""
        return "1 unlabelled image" if self.num_images == 1 else f"{self.num_images:,} unlabelled images"

    @property
    def images_text(self) -> str:
        """What is said of the user's images; empty where there are none."""
        return self.counted_images and f"{self.counted_images} of yours, so this model was not made without data"

    @property
    def ends_text(self) -> str:
        """What follows the bits where the first and the last layer have others."""
        return f", first and last layer at {self.first_last_bits}" if self.first_last_bits else ""

    @classmethod
    def of_run(
        cls,
        settings: RunSettings,
        teacher: Teacher,
        *,
        bank: SampleBank,
        warnings: tuple[str, ...],
        estimate: Estimate | None,
        allocation: tuple[str, ...],
        bank_seconds: float | None,
        student_seconds: float | None,
    ) -> "Summary":
        """Collect the summary of a run that has just finished."""
        quantization = settings.quantization
        first_last_bits, layer_bits = told_of_ends(quantization, teacher)
        return cls(
            model=short_source(settings.model),
            warnings=warnings,
            teacher_hash=teacher.hash,
            num_classes=teacher.num_classes,
            bits=f"w{quantization.weight_bits}a{quantization.activation_bits}",
            scheme=quantization.scheme,
            target=quantization.target,
            layer_bits=spell_layer_bits(layer_bits),
            first_last_bits=first_last_bits,
            budget=quantization.budget,
            allocation=allocation,
            recipe=settings.recipe,
            seed=settings.seed,
            num_samples=bank.num_training - bank.num_images,
            num_images=bank.num_images,
            num_held_out=bank.settings.num_held_out,
            has_batch_norms=bool(teacher.batch_norms),
            bank_hash=bank.hash,
            num_steps=settings.distillation.num_steps,
            estimate=estimate,
            teacher_bytes=float_bytes(teacher),
            student_bytes=packed_bytes(teacher, quantization),
            bank_seconds=bank_seconds,
            student_seconds=student_seconds,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=f"{platform.machine()}, {torch.get_num_threads()} threads",
            versions={name: version(name) for name in ("torch", "torchao")} | {"qimera": __version__},
        )

    def text(self) -> str:
        """Return the summary for a person, one fact per line."""
        exceptions = f", except {self.layer_bits}" if self.layer_bits and not self.allocation else ""
        held_out = f" and {self.num_held_out} held out" if self.num_held_out else ""
        facts = {
            "warning": "\n".join(textwrap.fill(warning, _WIDTH, subsequent_indent="  ") for warning in self.warnings),
            "model": f"{self.model} ({self.num_classes} classes, teacher {self.teacher_hash[:12]})",
            "bits": f"{self.bits}{self.ends_text}{exceptions}, scheme {self.scheme}, target {self.target}",
            "budget": "\n".join(self.allocation),
            "recipe": f"{self.recipe}, seed {self.seed}",
            "bank": f"{self.num_samples} synthetic samples{held_out}, {_readable_seconds(self.bank_seconds)}"
            if self.num_samples or self.num_held_out
            else "no synthetic samples",
            "images": self.images_text,
            "student": f"{self.num_steps} steps, {_readable_seconds(self.student_seconds)}",
            "size": f"{readable_bytes(self.student_bytes)} instead of {readable_bytes(self.teacher_bytes)}, "
            f"{self.teacher_bytes / self.student_bytes:.1f} times smaller",
            "estimate": "none, because of the warning above" if self.is_warned_of else "none without held-out samples",
        }
        if self.estimate is not None:
            facts["estimate"] = "\n".join(filter(None, (self.estimate.text(), self.caution)))
        elif self.bank_agreement is not None:
            facts["estimate"] = f"none; {self.bank_agreement:.1f} % agreement on synthetic samples it was trained on"
        return "".join(
            f"{name:<11}{textwrap.indent(fact, ' ' * 11).lstrip()}\n" for name, fact in facts.items() if fact
        )


_TRAINED = 1000
"""Steps from which an estimate tends to be too low (docs/estimation.md)."""

_WIDTH = 69
"""Characters of a line of a warning."""


def readable_bytes(num_bytes: int) -> str:
    """Return a size in kB or MB (powers of ten)."""
    return f"{num_bytes / 1e6:.2f} MB" if num_bytes >= 1_000_000 else f"{num_bytes / 1e3:.1f} kB"


def _readable_seconds(seconds: float | None) -> str:
    return "made earlier" if seconds is None else f"{seconds:.{0 if seconds >= 10 else 1}f} s"
