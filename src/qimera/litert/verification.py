"""A LiteRT file and the student it came from -> how they compare, on XNNPACK and on the built-in kernels."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from qimera.errors import VerificationError
from qimera.export.comparison import (
    Comparison,
    Verification,
    check_agreement,
    compare,
    first_difference,
    latencies_beside,
    logits_of,
    multiplying,
    refuse_lowest_weights,
    runtime_reason,
    sample_pixels,
)
from qimera.litert.runtime import VERSION, Runtime, weights_in
from qimera.lowering.model import LoweredModel
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank

XNNPACK, BUILT_IN = f"LiteRT {VERSION}, XNNPACK", f"LiteRT {VERSION}, built-in kernels"

_ROUNDS_TWICE = "they multiply sums by fixed-point numbers and round twice, for which the student was not made"
_ROUNDS_ONCE = "it rounds sums once, and the student was made for kernels that round twice"
_BATCH = 32


def verify_litert(
    student: Student,
    content: bytes,
    lowered: LoweredModel,
    samples: SampleBank | None,
    *,
    min_agreement: float,
    float_content: bytes | None = None,
) -> Verification:
    """Run the file image by image, and compare it with ``student``.

    Args:
        student: What the file was made from.
        content: The file.
        lowered: The graph that is in it.
        samples: What both are compared on; without them, on noise.
        min_agreement: Percent of samples that both must put into the same class on XNNPACK, or on the built-in kernels
            if those are the student's target. The results of the other kernels are reported, and refuse no file.
        float_content: The full-precision model as a file with the same input. Its latency is measured in turns with
            that of ``content``.

    Raises:
        VerificationError: agreement below ``min_agreement`` percent, a weight of -128, or a file that one of
            the runtimes cannot run.
    """
    refuse_lowest_weights(weights_in(content))
    pixels = sample_pixels(student, samples)
    images = student.input_spec.normalize(pixels)
    expected = logits_of(student, images).numpy()
    if lowered.output.grid is not None:  # of classes that integers cannot tell apart the file may pick either
        expected = lowered.output.grid.levels.rounded(expected)
    source = images if lowered.input_name == "input" else pixels
    inputs = np.ascontiguousarray(source.permute(0, 2, 3, 1).numpy())
    names = list(multiplying(student).values())
    float_layers = [name for name in names if name in lowered.writer.float_layers]
    comparisons: list[Comparison] = []
    for name, xnnpack in ((XNNPACK, True), (BUILT_IN, False)):
        try:
            runtime = Runtime(content, xnnpack=xnnpack)
            actual = runtime(inputs)
        except (RuntimeError, ValueError) as error:
            raise VerificationError(
                f"{name}: cannot run the file ({runtime_reason(error)}); no file was written"
            ) from error
        start = None if float_content is None else partial(Runtime, float_content, xnnpack=xnnpack)
        latencies = latencies_beside(runtime, inputs[:1], start)
        found = compare(name, expected, actual, len(names), float_layers, latencies)
        is_target = xnnpack != (student.settings.target == "litert-builtin")
        if is_target:
            explain = partial(_first_difference, student, lowered, inputs, images, xnnpack=xnnpack)
            check_agreement(found, len(pixels), min_agreement, explain)
        kernels = runtime.kernels()
        if xnnpack:
            found = replace(found, partitions=kernels.partitions, outside=kernels.outside)
        if not is_target:
            found = replace(found, note=_ROUNDS_ONCE if xnnpack else _ROUNDS_TWICE)
        comparisons.append(found)
    return Verification(len(names), len(content), len(pixels), tuple(comparisons))


def _first_difference(
    student: Student, lowered: LoweredModel, inputs: np.ndarray, images: torch.Tensor, *, xnnpack: bool
) -> str:
    """Say at which layer, in order, the integers of file and student first differ on more than a few samples."""
    return first_difference(_integers_of_layers(student, lowered, inputs[:_BATCH], images[:_BATCH], xnnpack=xnnpack))


def _integers_of_layers(
    student: Student, lowered: LoweredModel, inputs: np.ndarray, images: torch.Tensor, *, xnnpack: bool
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield, for each layer, the integers behind it in the student and in the file, where both have any."""
    expected = student.integers(images)
    written = {name: value for name, value in lowered.writer.written.items() if value.grid and name in expected}
    runtime = Runtime(lowered.content(list(written.values())), xnnpack=xnnpack)
    outputs = [runtime.outputs(image[None]) for image in inputs]
    for number, (name, value) in enumerate(written.items()):
        assert value.grid is not None
        places = [value.order.index(axis) for axis in range(len(value.order))]
        levels = [each[f"extra_{number}"].reshape(value.stored).transpose(places) for each in outputs]
        actual = np.concatenate(levels).astype(int) - value.grid.offset
        yield name, expected[name].numpy(), actual.reshape(expected[name].shape)
