"""A student and held-out synthetic samples -> the accuracy that it loses on real images, estimated without any.

What is measured is how far the student's class probabilities lie from the teacher's on samples that no student learned
from. What that means in points of top-1 is a calibration, as of any measuring device: its constants come from students
of other networks, whose real drop is known (benchmarks/estimation/drops.py, docs/estimation.md).
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import ConfigDict
from torch import Tensor

from qimera.assessment.diagnostics import diagnose
from qimera.errors import ConfigError
from qimera.student.student import Student
from qimera.synthesis.augmentation import flip_at_random, shift_each
from qimera.synthesis.bank import SampleBank
from qimera.synthesis.superposition import shows_one_class
from qimera.teacher.teacher import Teacher

CONFIDENCE = 0.9
"""Share of runs whose real drop the interval should hold."""

_QUANTILE = 1.645
"""Of the normal distribution, for a two-sided interval of that confidence."""

_BATCH = 32

_SURE = 0.95
"""Probability of its class from which the teacher has no doubt."""

_SHIFT = 8
"""The largest random shift is the width of the image over this."""


class Calibration(NamedTuple):
    """What a distance between class probabilities means in points of top-1."""

    factor: float
    """Points of top-1 per percent of distance."""
    fixed_error: float
    """Standard deviation of the real drop about the estimate where that is 0, in points."""
    relative_error: float
    """Standard deviation that comes on top, as a share of the estimate."""


CALIBRATION = Calibration(factor=0.326, fixed_error=0.05, relative_error=0.47)
"""From all runs of benchmarks/estimation/results/drops; ``python -m benchmarks.estimation.drops fit`` finds it."""


@dataclass(frozen=True)
class Estimate:
    """Accuracy that a student loses on real images, as held-out synthetic samples tell."""

    __pydantic_config__ = ConfigDict(use_attribute_docstrings=True)  # a schema says them too

    drop: float
    """Top-1 of the teacher minus that of the student, in points."""

    low: float
    """Lower end of the interval that should hold the real drop in 90 percent of all runs, in points."""

    high: float
    """Upper end of the same interval."""

    agreement: float
    """Percent of these samples that student and teacher put into the same class."""

    num_samples: int
    """Held-out samples that this is from; superposed ones do not count, nor those that the teacher doubts."""

    doubts: tuple[str, ...] = ()
    """Why the samples say nothing about real images, as ``diagnose`` tells; drop, low and high are NaN then."""

    def text(self) -> str:
        """Return the estimate in a sentence."""
        if self.doubts:
            return f"none, because the samples say nothing about real images: {self.doubts[0]}"
        return (
            f"a drop of {self.drop:z.1f} points ({self.low:z.1f} to {self.high:z.1f}, {100 * CONFIDENCE:.0f} %), from "
            f"{self.num_samples} held-out synthetic samples"
        )


def estimate_drop(student: Student, teacher: Teacher, bank: SampleBank) -> Estimate:
    """Return how much accuracy the student loses on real images, estimated on the held-out part of ``bank``.

    Args:
        student: Of ``teacher``.
        teacher: The full-precision model.
        bank: Samples of this teacher, whose held-out part the student has not learned from.

    Returns:
        The estimate. Where the samples do not resemble what the network was trained on, its drop is NaN and ``doubts``
        says why.

    Raises:
        ConfigError: the bank is of another teacher, or holds no held-out samples.
    """
    estimate = estimate_on_held_out(student, teacher, bank)
    doubts = diagnose(bank, teacher).doubts
    return replace(estimate, drop=math.nan, low=math.nan, high=math.nan, doubts=doubts) if doubts else estimate


@torch.inference_mode()
def estimate_on_held_out(student: Student, teacher: Teacher, bank: SampleBank) -> Estimate:
    """``estimate_drop``, whatever the samples are like: enough to compare students of one bank.

    Raises:
        ConfigError: the bank is of another teacher, or holds no held-out samples.
    """
    if not bank.teacher_hash == student.teacher_hash == teacher.hash:
        raise ConfigError("estimate: student, teacher and bank belong to different teachers; give those of one")
    samples = bank.held_out
    images = samples.images[lifelike(samples.soft_labels, samples.logits)]
    pairs = [(_logits(student, view), _logits(teacher, view)) for view in views_of(images).values()]
    distances = torch.stack([distance(mine, theirs) for mine, theirs in pairs]).mean(0)
    agreement = 100 * (pairs[0][0].argmax(1) == pairs[0][1].argmax(1)).float().mean()
    return estimate_from(distances, float(agreement), CALIBRATION)


def views_of(images: Float[Tensor, "sample channel height width"]) -> dict[str, Tensor]:
    """Return the images as they are, and shifted and mirrored, always the same way: more of each sample, for a pass."""
    rng = torch.Generator().manual_seed(0)
    moved = flip_at_random(shift_each(images, images.shape[2] // _SHIFT, rng), rng)
    return {"plain": images, "moved": moved}


def lifelike(
    soft_labels: Float[Tensor, "sample num_classes"], logits: Float[Tensor, "sample num_classes"]
) -> Bool[Tensor, " sample"]:
    """Return which samples are to show one class and do so without doubt to the teacher; all, where none does.

    That is how it sees most real images. Superposed samples lie on its boundaries on purpose, and others do where they
    came out badly.
    """
    found = (shows_one_class(soft_labels)) & (logits.softmax(1).amax(1) > _SURE)
    return found if bool(found.any()) else torch.ones_like(found)


def distance(
    student: Float[Tensor, "sample num_classes"], teacher: Float[Tensor, "sample num_classes"]
) -> Float[Tensor, " sample"]:
    """Return the total variation between the class probabilities of both, in [0, 1].

    It is the share of draws in which a class drawn from one cannot be matched by one drawn from the other: a
    disagreement that does not jump, and so scatters less than counting classes.
    """
    return 0.5 * (student.softmax(1) - teacher.softmax(1)).abs().sum(1)


def estimate_from(
    distances: Float[Tensor, " sample"], agreement: float, calibration: Calibration = CALIBRATION
) -> Estimate:
    """Return the estimate that these distances of held-out samples come to.

    The interval joins the scatter of samples with that of networks and bit widths about the calibration.
    """
    drop = 100 * calibration.factor * float(distances.mean())
    error = math.hypot(calibration.fixed_error, calibration.relative_error * drop)
    spread = _QUANTILE * math.hypot(error, 100 * calibration.factor * standard_error(distances))
    return Estimate(drop, drop - spread, drop + spread, agreement, len(distances))


def standard_error(values: Float[Tensor, " sample"]) -> float:
    """Return the standard deviation of the mean of so many values; 0 of a single one."""
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _logits(model: Student | Teacher, images: Tensor) -> Tensor:
    return torch.cat([model(part.to(model.device)).float().cpu() for part in images.split(_BATCH)])
