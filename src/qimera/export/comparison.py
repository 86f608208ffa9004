"""The logits of an exported file and of the student it came from -> how they compare, on any runtime."""

import logging
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from pydantic import ConfigDict
from torch import Tensor

from qimera.errors import ConfigError, UnsupportedModelError, VerificationError
from qimera.graph.costs import is_multiplying
from qimera.graph.nodes import layer_name
from qimera.quantization.ranges import LOWEST_WEIGHT
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank
from qimera.synthesis.direct import noise_images

logger = logging.getLogger(__name__)

MIN_AGREEMENT = 99.0
"""Percent of samples that student and file must put into the same class, unless another number is given."""

MAX_SAMPLES = 256
_BATCH = 32
_DIFFERENCE_PERCENT = 1.0
_NUM_NOISE_IMAGES = 32
_MIN_TIMED_CALLS = 5
_TIMED_MILLISECONDS = 500.0


@dataclass(frozen=True)
class Comparison:
    """What one runtime makes of the file."""

    __pydantic_config__ = ConfigDict(use_attribute_docstrings=True)  # a schema says them too

    runtime: str
    """Name and version."""

    agreement: float
    """Percent of samples that the file puts into the student's class, or one whose logit is equal up to rounding."""

    largest_difference: float
    """Of any two finite logits, in their own unit."""

    identical: float
    """Percent of samples on which all logits are the same up to rounding (1e-4 of their spread)."""

    integer_layers: int
    """Layers and products of activations that run in integer kernels."""

    float_layers: tuple[str, ...]
    """Names of those that do not."""

    latency_ms: float | None = None
    """Median wall time of one image alone, in milliseconds, on this machine as busy as it was; of ONNX Runtime,
    OpenVINO and PyTorch on one thread. None where it was not measured."""

    float_latency_ms: float | None = None
    """The same of the full-precision model, in the same runtime with the same settings, timed in turns with the file.
    None where it was not measured."""

    partitions: int | None = None
    """Parts of the graph that XNNPACK runs as one, in a LiteRT file. None elsewhere."""

    outside: tuple[str, ...] = ()
    """Operations of a LiteRT file that XNNPACK leaves to the built-in kernels."""

    arena_bytes: int | None = None
    """Memory that the interpreter of a microcontroller takes beside the file. None elsewhere."""

    note: str = ""
    """Why less agreement is to be expected here, and is accepted."""

    not_finite: int = 0
    """Samples on which a logit of the file is NaN or infinite, which is no agreement."""

    def without_answer(self) -> str:
        """Say on how many samples the file returns no numbers; empty if there are none."""
        return f"on {self.not_finite} samples the file returns NaN or infinite logits" if self.not_finite else ""


@dataclass(frozen=True)
class Verification:
    """How a file compares with the student it came from."""

    num_layers: int
    """All that multiply: layers, those too whose weight is not quantized, and products of activations."""

    num_bytes: int
    """Size of the file."""

    num_samples: int
    comparisons: tuple[Comparison, ...]
    refusals: tuple[str, ...] = ()
    """Runtimes that cannot run the file at all, other than the student's target, and why."""

    not_run: str = ""
    """Why the file was not run at all, in formats that no runtime here can run; empty for all others."""

    def text(self) -> str:
        """Return a few lines for people."""
        if self.not_run:
            return f"file size {self.num_bytes:,} bytes; its steps and integers are the student's.\n{self.not_run}\n"
        lines = [f"file size {self.num_bytes:,} bytes, compared with the student on {self.num_samples} samples"]
        for each in self.comparisons:
            lines.append(
                f"{each.runtime}: same class {each.agreement:.2f} %, same logits {each.identical:.2f} %, "
                f"largest difference {each.largest_difference:.2g}; "
                f"{each.integer_layers} of {self.num_layers} layers in integer kernels" + _time_text(each)
            )
            if each.float_layers:
                lines.append(f"  in floating point: {', '.join(each.float_layers)}")
            if each.partitions is not None:
                left = f"; outside of them: {', '.join(each.outside)}" if each.outside else ""
                lines.append(f"  partitions of XNNPACK: {each.partitions}{left}")
            if each.arena_bytes is not None:
                lines.append(f"  memory of the interpreter: {each.arena_bytes:,} bytes")
            if each.not_finite:
                lines.append(f"  {each.without_answer()}")
            if each.note:
                lines.append(f"  {each.note}")
        lines += [f"{refusal}; the student is not for it" for refusal in self.refusals]
        return "\n".join(lines) + "\n"


def _time_text(found: Comparison) -> str:
    if found.latency_ms is None:
        return ""
    beside = f", {found.float_latency_ms:.3g} ms in full precision" if found.float_latency_ms is not None else ""
    return f"; one image takes {found.latency_ms:.3g} ms here{beside}"


def sample_pixels(student: Student, samples: SampleBank | None) -> UInt8[Tensor, "batch channel height width"]:
    """Return the pixels that a comparison runs on: of ``samples``, evenly spread, or noise where there are none."""
    if samples is not None and len(samples):
        return samples.pixels[torch.linspace(0, len(samples) - 1, min(MAX_SAMPLES, len(samples))).long()]
    spec = student.input_spec
    scales = 1 + int(np.log2(min(spec.shape[1:])) // 1) // 2
    return spec.to_pixels(noise_images(_NUM_NOISE_IMAGES, spec.shape, scales, torch.Generator().manual_seed(0)))


def logits_of(student: Student, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch classes"]:
    """Return the student's logits, which those of a file are compared with."""
    with torch.no_grad():
        return torch.cat([student(batch) for batch in images.split(_BATCH)])


def compare(
    runtime: str,
    expected: Float[np.ndarray, "batch num_classes"],
    actual: Float[np.ndarray, "batch num_classes"],
    num_layers: int,
    float_layers: list[str],
    latencies: Sequence[float] = (),
) -> Comparison:
    """Return how the logits of a runtime compare with the student's; ``latencies`` are of the file and of the model."""
    finite, rounding = np.isfinite(actual).all(1), 1e-4 * expected.std()
    difference = np.abs(expected - np.where(finite[:, None], actual, expected)).max(1)
    picked = np.take_along_axis(expected, actual.argmax(1, keepdims=True), 1)[:, 0]
    return Comparison(
        runtime=runtime,
        agreement=100 * float((finite & (picked >= expected.max(1) - rounding)).mean()),
        largest_difference=float(difference.max()),
        identical=100 * float((finite & (difference <= rounding)).mean()),
        integer_layers=num_layers - len(float_layers),
        float_layers=tuple(float_layers),
        latency_ms=latencies[0] if latencies else None,
        float_latency_ms=latencies[1] if len(latencies) > 1 else None,
        not_finite=int((~finite).sum()),
    )


def latencies_ms(runs: Sequence[Callable[[], object]]) -> list[float]:
    """Return the median wall time of each function in milliseconds.

    They run in turns, so that a busy moment of the machine meets all of them: at least 5 times each, and until the
    first has run for half a second.
    """
    for run in runs:
        run()  # what the first call alone has to set up
    milliseconds: list[list[float]] = [[] for _ in runs]
    while len(milliseconds[0]) < _MIN_TIMED_CALLS or sum(milliseconds[0]) < _TIMED_MILLISECONDS:
        for run, times in zip(runs, milliseconds, strict=True):
            start = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - start))
    return [statistics.median(times) for times in milliseconds]


_Image = TypeVar("_Image")


def latencies_beside(
    run: Callable[[_Image], object], image: _Image, start: Callable[[], Callable[[_Image], object]] | None
) -> list[float]:
    """Return the latency of ``run``, and that of what ``start`` makes ready, if there is any and it runs."""
    runs = [partial(run, image)]
    if start is not None:
        try:
            beside = partial(start(), image)
            beside()
            runs.append(beside)
        except Exception as error:  # each runtime has errors of its own; the file itself is as good without
            reason = runtime_reason(error)
            logger.warning("the model in full precision does not run, so no time is beside the file's (%s)", reason)
    return latencies_ms(runs)


def check_scheme(student: Student) -> None:
    """Raise UnsupportedModelError if the student is of a scheme that no integer kernels run."""
    if student.settings.scheme != "hardware":
        raise UnsupportedModelError(
            f"scheme {student.settings.scheme}: is for comparison only, integer kernels cannot run it; "
            "quantize with scheme hardware"
        )


def check_labels(student: Student, labels: Sequence[str]) -> None:
    """Raise ConfigError if there are names of classes, but not one for each, or one of several lines."""
    if labels and len(labels) != student.num_classes:
        raise ConfigError(f"labels: {len(labels)} names for {student.num_classes} classes; give one for each")
    for label in labels:
        if label.splitlines() not in ([], [label]):
            raise ConfigError(f"labels: {label!r} holds a line break; give each class a name of one line")


def check_agreement(
    found: Comparison, num_samples: int, required: float, explain: Callable[[], str] = lambda: ""
) -> None:
    """Raise VerificationError if file and student agree on less than ``required`` percent.

    ``explain`` is asked for what else there is to say, which may take a while to find out.
    """
    if not found.agreement >= required:
        more = "".join(f"{each}; " for each in (found.without_answer(), explain()) if each)
        raise VerificationError(
            f"{found.runtime}: file and student agree on {found.agreement:.2f} % of {num_samples} samples, "
            f"at least {required:g} % are required; {more}no file was written"
        )


def first_difference(layers: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> str:
    """Say at which layer (name, integers of student and of file) both first differ on more than a few samples."""
    for name, expected, actual in layers:
        differing = 100 * float((expected != actual).mean())
        if differing > _DIFFERENCE_PERCENT:
            return f"the first layer that disagrees is {name}: {differing:.1f} % of its integers differ"
    return f"no layer's integers differ on more than {_DIFFERENCE_PERCENT:g} %, so the last layer does"


def refuse_lowest_weights(weights: Iterable[tuple[str, np.ndarray]]) -> None:
    """Raise VerificationError if one of the weights (name, integers) of a file holds -128 in 8 bits."""
    for name, levels in weights:
        count = int((levels < LOWEST_WEIGHT).sum()) if levels.dtype == np.int8 else 0
        if count:
            raise VerificationError(
                f"{name}: {count:,} of its {levels.size:,} weights are -128, for which kernels on ARM may compute "
                "something else; quantize again with this version; no file was written"
            )


def runtime_reason(error: Exception) -> str:
    """Return the line of a runtime's message that says something, without the places in its own sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith("Exception from")), type(error).__name__)[:300]


def multiplying(student: Student) -> dict[str, str]:
    """Return what each layer of a student, quantized or not, and each product is called, by its node's name."""
    names = student.layer_names()
    nodes = [node for node in student.module.graph.nodes if is_multiplying(node)]
    return {node.name: names.get(node.name) or layer_name(node) for node in nodes}
