"""What a report says, as ``report.json`` holds it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from qimera.assessment.diagnostics import Diagnosis
from qimera.config.base import Settings
from qimera.config.run_settings import RunSettings
from qimera.machine.metrics import KEYS, Line
from qimera.report.layers import LayerReport
from qimera.report.summary import Summary
from qimera.synthesis.bank import SampleBank

FORMAT_VERSION = 1
_NUM_IMAGES = 64
_NUM_LARGE_IMAGES = 16
_MAX_POINTS = 400
"""Points of one curve; an eye cannot tell more apart."""

MOST_ROWS = 40
"""Rows of one drawing: what fits on a page."""

LEAST_COST = 1e-4
"""Divergence due to one layer, in nats, that is worth a look. Less moves at most 0.7 % of the probability to other
classes (Pinsker's inequality)."""


class Measured(Settings):
    """Accuracy on labelled images, in percent."""

    data: str
    num_images: int
    student_top1: float
    teacher_top1: float
    student_top5: float | None = None
    teacher_top5: float | None = None
    agreement: float
    drop_low: float | None = None
    drop_high: float | None = None
    """Ends of the 90 percent confidence interval of the drop, in points."""

    warnings: tuple[str, ...] = ()
    """Why these figures say nothing; empty where they do."""

    places: tuple[tuple[float, float, int], ...] = ()
    """Where some of the images lie in the plot of features, and the class that the teacher takes each for; no more of
    them is kept."""

    @property
    def drop(self) -> float:
        """Top-1 of the teacher minus that of the student, in points."""
        return self.teacher_top1 - self.student_top1


class Export(Settings):
    """One exported file, as it was verified."""

    file: str
    num_layers: int
    num_bytes: int
    num_samples: int
    comparisons: tuple[dict[str, Any], ...]
    refusals: tuple[str, ...] = ()
    not_run: str = ""


class Curve(Settings):
    """Values of one loss over the steps of one stage."""

    part: str
    stage: str
    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


class Report(Settings):
    """All that a report says."""

    format_version: int = FORMAT_VERSION
    summary: Summary
    settings: RunSettings
    """Settings of the run; files are named without their directories."""

    measured: Measured | None
    """None until ``qimera evaluate`` is given labelled images."""

    multiply_adds: int
    """Multiply-adds of all layers and products of activations, for one image."""

    bit_operations: int
    """Multiply-adds times weight bits times activation bits, for one image, as a budget counts them."""

    bank: Diagnosis
    layers: tuple[LayerReport, ...]
    curves: tuple[Curve, ...]
    exports: tuple[Export, ...]

    @property
    def fewer_bit_operations(self) -> float:
        """How many times fewer bit operations than float32 the student takes."""
        return 32 * 32 * self.multiply_adds / self.bit_operations

    @property
    def costly_layers(self) -> tuple[LayerReport, ...]:
        """The layers that cost most, in their order, at most 40; empty where none costs anything worth more bits."""
        if max((layer.cost for layer in self.layers), default=0) < LEAST_COST:
            return ()
        kept = sorted(self.layers, key=lambda layer: -layer.cost)[:MOST_ROWS]
        return tuple(layer for layer in self.layers if layer in kept)

    @property
    def costliest(self) -> LayerReport:
        """The layer that costs most."""
        return max(self.layers, key=lambda layer: layer.cost)

    @property
    def costliest_share(self) -> float:
        """Percent of the cost of all layers that the costliest has; NaN where that is infinite."""
        return 100 * self.costliest.cost / sum(layer.cost for layer in self.layers)

    @property
    def timed(self) -> dict[str, Any] | None:
        """The first comparison with integer kernels that has the time of the full-precision model too."""
        compared = (each for export in self.exports for each in export.comparisons if each["integer_layers"])
        return next((each for each in compared if each.get("latency_ms") and each.get("float_latency_ms")), None)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should know first."""
        return (self.measured.warnings if self.measured else ()) + self.summary.warnings


def shown_images(bank: SampleBank) -> Tensor:
    """Return a few dozen normalised images, held-out ones where there are any; none of a bank that holds none."""
    few = bank.input_spec.has_large_images
    images = bank.held_out.images if bank.settings.num_held_out else bank.take(slice(None)).images
    return images[: _NUM_LARGE_IMAGES if few else _NUM_IMAGES]


def curves(lines: Sequence[Line]) -> list[Curve]:
    """Return one curve for each loss of each stage, with at most 400 points each."""
    found: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in KEYS:
                found.setdefault((line["part"], line["stage"], name), []).append((line["step"], float(value)))
    result = []
    for (part, stage, name), points in found.items():
        kept = points[:: -(-len(points) // _MAX_POINTS)]
        steps, values = zip(*kept, strict=True)
        result.append(Curve(part=part, stage=stage, name=name, steps=steps, values=values))
    return result
