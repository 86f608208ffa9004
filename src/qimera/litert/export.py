"""A student -> a LiteRT file, verified before it is there; what it takes is imported when it is called."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from qimera.errors import ConfigError
from qimera.export.comparison import MIN_AGREEMENT, Verification, check_labels, logits_of, sample_pixels
from qimera.machine.files import place_for, replacing
from qimera.quantization.ranges import affine_parameters
from qimera.student.grids import Levels
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank


def export_litert(
    student: Student,
    path: Path | str,
    samples: SampleBank | None = None,
    *,
    include_preprocessing: bool = False,
    integer_logits: bool = False,
    labels: Sequence[str] = (),
    min_agreement: float = MIN_AGREEMENT,
    time_full_precision: bool = False,
) -> Verification:
    """Write ``student`` as a LiteRT file (``.tflite``) and return how it compares on XNNPACK and the built-in kernels.

    The file reads one float32 ``input`` (1, height, width, channel), normalised as the teacher's images were, and
    returns float32 ``logits`` (1, num_classes). Nothing is at ``path`` unless the comparison passed. What the file says
    of itself follows the schema of tflite-support: classes, normalisation and provenance.

    Args:
        student: Of scheme ``hardware``.
        path: Where the file goes.
        samples: What the file is compared on; without them, on noise.
        include_preprocessing: Read uint8 ``pixels`` (1, height, width, channel), 0 darkest and 255 brightest, and
            normalise them inside.
        integer_logits: Return int8 logits, on a grid from the least to the largest that ``samples`` get. Classes that
            are less than a step apart may then tie.
        labels: Names of the classes, for the metadata; empty or one for each.
        min_agreement: Percent of samples that student and file must put into the same class on XNNPACK.
        time_full_precision: Also take the time of the full-precision model, in turns with that of the file.

    Raises:
        ConfigError: ai-edge-litert is not installed, labels do not fit, integer logits have no samples, or no file can
            be written to ``path``.
        UnsupportedModelError: something in the student has no counterpart; the message names it.
        VerificationError: the file disagrees with the student; the message names the first layer that does.
    """
    if find_spec("ai_edge_litert") is None:
        raise ConfigError("--format litert: needs ai-edge-litert; pip install 'qimera[litert]'")
    check_labels(student, labels)
    path = place_for(path)
    from qimera.litert.metadata import ENTRY, associated_files, metadata
    from qimera.litert.verification import verify_litert
    from qimera.lowering.model import lower, lower_full_precision

    levels = logits_levels(student, samples) if integer_logits else None
    lowered = lower(student, include_preprocessing=include_preprocessing, logits_levels=levels)
    lowered.writer.file.note(ENTRY, metadata(student, labels, include_preprocessing=include_preprocessing))
    content = lowered.content() + associated_files(student, labels)
    reference = None
    if time_full_precision:
        reference = lower_full_precision(student, include_preprocessing=include_preprocessing).content()
    verification = verify_litert(
        student, content, lowered, samples, min_agreement=min_agreement, float_content=reference
    )
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return verification


def logits_levels(student: Student, samples: SampleBank | None) -> Levels:
    """Return the levels of a grid that just covers the logits of the samples, and zero."""
    if samples is None or not len(samples):  # noise would get too small a range
        raise ConfigError(
            "integer logits: their range comes from the samples of a bank, and there are none; quantize with samples "
            "(num_optimized or num_held_out above 0) or with --keep-images, or leave the logits in float32"
        )
    images = student.input_spec.normalize(sample_pixels(student, samples))
    scale, zero_point = affine_parameters(logits_of(student, images), 0, 255, symmetric=False)
    return Levels(float(scale), int(zero_point), 0, 255)
