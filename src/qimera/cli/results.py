"""The objects that commands print with ``--json``."""

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from qimera.assessment.evaluation import Evaluation
from qimera.config.base import Settings
from qimera.config.input_spec import InputSpec
from qimera.export.comparison import Comparison
from qimera.report.summary import Summary
from qimera.runs.comparison import ComparedRun


class CommandError(Settings):
    """Why a command ended with another exit code than 0."""

    kind: str
    """``ConfigError``, ``UnsupportedModelError``, ``DivergenceError``, ``VerificationError``, ``PeerError``,
    ``OSError`` or ``KeyboardInterrupt``."""

    message: str
    """What is wrong and what to do, as stderr says it."""

    exit_code: int
    """2 wrong usage, 3 unsupported model, 4 diverged, 5 a check failed, 6 another process of the run ended, 130
    interrupted."""


class Failure(Settings):
    """A command that ended before it had a result."""

    error: CommandError
    """What was wrong."""


class Found(Settings):
    """The result of a command."""

    error: CommandError | None = None
    """Null if all is well; otherwise the check that the result failed, as of ``--strict`` and ``--max-drop``, or what
    stopped the command before all results were there."""


class LayerFacts(Settings):
    """One layer with a weight."""

    name: str
    """Dotted name of the module."""

    kind: str
    """Such as ``conv2d`` or ``linear``."""

    weight_shape: tuple[int, ...]
    """Output channels first."""

    multiply_adds: int
    """For one image."""


class Inspection(Found):
    """``qimera inspect``: what of a model is quantized, and what samples are synthesised from."""

    model: str
    """The model as it was given."""

    teacher: str
    """Hash of the graph and all weights."""

    input: InputSpec
    """What one image looks like."""

    num_classes: int
    """Classes of the model."""

    classifier: str
    """Name of the layer that returns the logits."""

    num_features: int
    """Values that the classifier reads."""

    num_parameters: int
    """Values of all weights, biases and other parameters."""

    multiply_adds: int
    """Of all layers and products of activations, for one image."""

    num_batch_norms: int
    """Batch norms whose statistics samples are made from."""

    num_batch_norm_channels: int
    """Channels of all those batch norms."""

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
    """Every layer with a weight, in the order of the graph."""

    warnings: tuple[str, ...] = ()
    """What a person should know before going on."""


class Synthesis(Found):
    """``qimera synthesize``: the bank that was made."""

    bank: str
    """Path of it."""

    format: str
    """``bank``, ``npz``, ``imagefolder`` or ``safetensors``."""

    model: str
    """The model as it was given."""

    teacher: str
    """Hash of the graph and all weights."""

    num_samples: int
    """Synthetic samples that students may learn from."""

    num_images: int
    """Images of the user's that students may learn from too."""

    holds_images: bool
    """Whether the bank on disk holds those images; else it remembers their hash."""

    num_held_out: int
    """Samples that no student learns from."""

    hash: str
    """Hash of everything in the bank, by which summaries of runs and model cards name it."""

    warnings: tuple[str, ...] = ()
    """Why the samples may be of little use; empty for a good bank."""


class FinishedRun(Settings):
    """A run directory, and the summary in it."""

    run: str
    """Path of the run directory."""

    report: str
    """Path of the page."""

    summary: Summary
    """The content of ``summary.json``."""


class Quantization(Found):
    """``qimera quantize``: the runs that were made or found finished, one for each of ``--bits``."""

    runs: tuple[FinishedRun, ...]
    """Finished runs, in the order of ``--bits``."""


class Measurement(Found):
    """``qimera evaluate``: accuracy on labelled images, in percent."""

    run: str
    """Path of the run directory."""

    data: str
    """The images as they were given."""

    num_images: int
    """Labelled images."""

    student_top1: float
    """Images whose class the student ranks first."""

    student_top5: float | None
    """Images whose class the student ranks among its first five; null with fewer than six classes."""

    teacher_top1: float
    """The same for the full-precision model."""

    teacher_top5: float | None
    """The same for the full-precision model."""

    drop: float
    """Top-1 of the teacher minus that of the student, in points."""

    drop_low: float | None
    """Lower end of the 90 percent interval of the drop on all images of which these are a sample, in points."""

    drop_high: float | None
    """Upper end of the same interval."""

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
    """The runs in the order they were given."""


class ExportedFile(Found):
    """``qimera export``: the file that was written, and how it compares with the student."""

    run: str
    """Path of the run directory."""

    file: str
    """Path of it."""

    model_card: str
    """Path of the page beside it that says what it is."""

    format: str
    """``onnx``, ``pt2``, ``aotinductor``, ``executorch``, ``litert``, ``tflm`` or ``coreml``."""

    num_layers: int
    """Layers and products of activations."""

    num_bytes: int
    """Size of the file."""

    num_samples: int
    """Samples that file and student were compared on."""

    comparisons: tuple[Comparison, ...]
    """One for each runtime that ran the file."""

    refusals: tuple[str, ...] = ()
    """Runtimes that cannot run the file at all, other than the student's target, and why."""

    not_run: str = ""
    """Why the file was not run at all, in formats that no runtime here can run; empty for all others."""


class WrittenReport(Found):
    """``qimera report``: the files that were written."""

    run: str
    """Path of the run directory."""

    report: str
    """Path of the page."""

    data: str
    """Path of the same for programs."""

    warnings: tuple[str, ...] = ()
    """What a person should know before trusting the run; empty for a good one."""


class RecipeFacts(Settings):
    """One recipe."""

    name: str
    """What ``--recipe`` takes."""

    description: str
    """What the recipe does."""

    num_generated: int
    """Samples drawn from a trained generator."""

    num_optimized: int
    """Samples optimised directly."""

    num_steps: int
    """Training steps of the student."""


class Recipes(Found):
    """``qimera recipes``: every recipe, for such images and so many classes."""

    input_shape: tuple[int, int, int]
    """Channels, height and width of an image."""

    num_classes: int
    """Classes of the model."""

    recipes: tuple[RecipeFacts, ...]
    """All recipes."""


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
