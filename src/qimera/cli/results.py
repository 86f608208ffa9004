"""What each command prints with ``--json``: the models of those objects, and how they are filled."""

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from qimera.assessment.evaluation import Evaluation
from qimera.config.base import Settings
from qimera.config.input_spec import InputSpec
from qimera.config.recipe_names import RECIPE_NAMES
from qimera.config.recipes import recipe
from qimera.config.settings import QuantizationSettings
from qimera.export.comparison import Comparison
from qimera.graph.costs import total_multiply_adds
from qimera.graph.folding import fold_batch_norms
from qimera.graph.nodes import batch_norms
from qimera.quantization.scheme import float_operations, is_integer_product
from qimera.quantization.sizes import float_bytes, packed_bytes
from qimera.report.summary import Summary
from qimera.runs.comparison import ComparedRun
from qimera.synthesis.bank import SampleBank
from qimera.teacher.teacher import Teacher


class CommandError(Settings):
    """Why a command ended with another exit code than 0."""

    kind: str
    """``ConfigError``, ``UnsupportedModelError``, ``DivergenceError``, ``VerificationError``, ``PeerError``,
    ``OSError`` or ``KeyboardInterrupt``."""

    message: str
    """What is wrong and what to do, as stderr says it."""

    exit_code: int


class Failure(Settings):
    """A command that ended before it had a result."""

    error: CommandError


class Found(Settings):
    """The result of a command."""

    error: CommandError | None = None
    """Null if all is well; otherwise the check that the result failed, as of ``--strict`` and ``--max-drop``, or what
    stopped the command before all results were there."""


class LayerFacts(Settings):
    """One layer with a weight."""

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    multiply_adds: int
    """For one image."""


class Inspection(Found):
    """``qimera inspect``: what of a model is quantized, and what samples are synthesised from."""

    model: str
    teacher: str
    """Hash of the graph and all weights."""

    input: InputSpec
    num_classes: int
    classifier: str
    """Name of the layer that returns the logits."""

    num_features: int
    """Values that the classifier reads."""

    num_parameters: int
    multiply_adds: int
    """Of all layers and products of activations, for one image."""

    num_batch_norms: int
    """Batch norms whose statistics samples are made from."""

    num_batch_norm_channels: int
    num_exact_batch_norms: int
    """Batch norms that could not be folded into a layer, and stay in float32."""

    num_products: int
    """Products of activations, both of whose factors are quantized."""

    float_operations: dict[str, int]
    """How often each operation occurs that stays in float32."""

    float_bytes: int
    """Parameters and buffers in float32."""

    packed_bytes: dict[str, int]
    """The student's parameters at common bits."""

    layers: tuple[LayerFacts, ...]
    warnings: tuple[str, ...] = ()


class Synthesis(Found):
    """``qimera synthesize``: the bank that was made."""

    bank: str
    """Path of it."""

    format: str
    model: str
    teacher: str
    """Hash of the graph and all weights."""

    num_samples: int
    """Samples that students may learn from."""

    num_held_out: int
    """Samples that no student learns from."""

    warnings: tuple[str, ...] = ()


class FinishedRun(Settings):
    """A run directory, and the summary in it."""

    run: str
    report: str
    """Path of the page."""

    summary: Summary
    """The content of ``summary.json``."""


class Quantization(Found):
    """``qimera quantize``: the runs that were made or found finished, one for each of ``--bits``."""

    runs: tuple[FinishedRun, ...]


class Measurement(Found):
    """``qimera evaluate``: accuracy on labelled images, in percent."""

    run: str
    data: str
    num_images: int
    student_top1: float
    student_top5: float | None
    """Null if there are fewer than six classes."""

    teacher_top1: float
    teacher_top5: float | None
    drop: float
    """Top-1 of the teacher minus that of the student, in points."""

    drop_low: float | None
    drop_high: float | None
    """Ends of the 90 percent interval of the drop on all images of which these are a sample, in points."""

    agreement: float | None
    """Images that student and teacher put into the same class."""

    warnings: tuple[str, ...]
    """Why these figures say nothing; empty if they do."""

    @classmethod
    def of(cls, run: Path, data: Path, result: Evaluation) -> "Measurement":
        """Return an evaluation with a teacher."""
        assert result.teacher_top1 is not None
        return cls(
            run=str(run),
            data=str(data),
            num_images=result.num_images,
            student_top1=result.top1,
            student_top5=result.top5,
            teacher_top1=result.teacher_top1,
            teacher_top5=result.teacher_top5,
            drop=round(result.teacher_top1 - result.top1, 6),
            drop_low=result.drop_low,
            drop_high=result.drop_high,
            agreement=result.agreement,
            warnings=result.warnings,
        )


class ComparedRuns(Found):
    """``qimera compare``: the runs in the order they were given."""

    runs: tuple[ComparedRun, ...]


class ExportedFile(Found):
    """``qimera export``: the file that was written, and how it compares with the student."""

    run: str
    file: str
    """Path of it."""

    format: str
    num_layers: int
    num_bytes: int
    """Size of the file."""

    num_samples: int
    """Samples that file and student were compared on."""

    comparisons: tuple[Comparison, ...]
    """One for each runtime that ran the file."""

    refusals: tuple[str, ...] = ()
    """Runtimes that cannot run the file at all, other than the student's target, and why."""


class WrittenReport(Found):
    """``qimera report``: the files that were written."""

    run: str
    report: str
    """Path of the page."""

    data: str
    """Path of the same for programs."""

    warnings: tuple[str, ...] = ()


class RecipeFacts(Settings):
    """One recipe."""

    name: str
    description: str
    num_generated: int
    """Samples drawn from a trained generator."""

    num_optimized: int
    """Samples optimised directly."""

    num_steps: int
    """Training steps of the student."""


class Recipes(Found):
    """``qimera recipes``: every recipe, for such images and so many classes."""

    input_shape: tuple[int, int, int]
    num_classes: int
    recipes: tuple[RecipeFacts, ...]


PRINTED: dict[str, TypeAdapter[Any]] = {
    "inspect": TypeAdapter(Inspection | Failure),
    "synthesize": TypeAdapter(Synthesis | Failure),
    "quantize": TypeAdapter(Quantization | Failure),
    "evaluate": TypeAdapter(Measurement | Failure),
    "report": TypeAdapter(WrittenReport | Failure),
    "compare": TypeAdapter(ComparedRuns | Failure),
    "export": TypeAdapter(ExportedFile | Failure),
    "recipes": TypeAdapter(Recipes | Failure),
}
"""What each command prints."""


def inspection(model: str, teacher: Teacher, warnings: tuple[str, ...] = ()) -> Inspection:
    """Return what there is to quantize in ``teacher``, which ``model`` names, and to synthesise from."""
    classifier, taps, module = teacher.classifier, teacher.batch_norms, teacher.module
    sizes = {name: QuantizationSettings(weight_bits=bits) for name, bits in {"w8a8": 8, "w4a8": 4, "w4a4": 4}.items()}
    return Inspection(
        model=model,
        teacher=teacher.hash,
        input=teacher.input_spec,
        num_classes=teacher.num_classes,
        classifier=classifier.name,
        num_features=classifier.weight.shape[1],
        num_parameters=sum(parameter.numel() for parameter in module.parameters()),
        multiply_adds=total_multiply_adds(module),
        num_batch_norms=len(taps),
        num_batch_norm_channels=sum(len(tap.mean) for tap in taps),
        num_exact_batch_norms=len(batch_norms(fold_batch_norms(module))),
        num_products=sum(is_integer_product(node) for node in module.graph.nodes),
        float_operations=dict(float_operations(module).most_common()),
        float_bytes=float_bytes(teacher),
        packed_bytes={name: packed_bytes(teacher, each) for name, each in sizes.items()},
        layers=tuple(
            LayerFacts(name=each.name, kind=each.kind, weight_shape=tuple(each.weight_shape), multiply_adds=each.macs)
            for each in teacher.layers
        ),
        warnings=warnings,
    )


def synthesis(path: Path, form: str, model: str, bank: SampleBank, warnings: tuple[str, ...]) -> Synthesis:
    """Return what is known of ``bank``, written to ``path`` in the format ``form``."""
    return Synthesis(
        bank=str(path),
        format=form,
        model=model,
        teacher=bank.teacher_hash,
        num_samples=bank.num_training,
        num_held_out=bank.settings.num_held_out,
        warnings=warnings,
    )


def recipes_of(shape: tuple[int, int, int], num_classes: int) -> Recipes:
    """Return every recipe as it would be for images of ``shape`` and so many classes."""
    any_pixels = InputSpec(shape=shape, mean=(0.0,) * shape[0], std=(1.0,) * shape[0])
    rows = (recipe(name, any_pixels, num_classes) for name in RECIPE_NAMES)
    facts = tuple(
        RecipeFacts(
            name=row.name,
            description=row.description,
            num_generated=row.synthesis.num_generated,
            num_optimized=row.synthesis.num_optimized,
            num_steps=row.distillation.num_steps,
        )
        for row in rows
    )
    return Recipes(input_shape=shape, num_classes=num_classes, recipes=facts)
