"""A student and held-out synthetic samples -> the accuracy that it loses on real images, estimated without any.

What is measured is how far the student's class probabilities lie from the teacher's on samples that no student learned
from and that lie near decision boundaries, where both differ first. What that means in points of top-1 is a
calibration, as of any measuring device: its constants come from students of other networks, whose real drop is known
(benchmarks/estimation, docs/estimation.md).
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import ConfigDict
from torch import Tensor, nn

from qimera.assessment.diagnostics import diagnose
from qimera.errors import ConfigError
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank
from qimera.synthesis.superposition import shows_one_class
from qimera.teacher.teacher import Teacher, as_teacher

CONFIDENCE = 0.9
"""Share of runs whose real drop the interval should hold."""

_QUANTILE = 1.645
"""Of the normal distribution, for a two-sided interval of that confidence."""

_BATCH = 32

_SURE = 0.95
"""Probability of its class from which the teacher has no doubt."""

_ENOUGH = 8
"""Samples of a kind that an estimate needs, if the other kind has them. With two classes, only half of the pairs that
are drawn are of both, so few samples are superposed."""


class Calibration(NamedTuple):
    """What a distance between class probabilities means in points of top-1: ``factor * percent ** power``."""

    factor: float
    power: float
    fixed_error: float
    """Standard deviation of the real drop about the estimate where that is 0, in points."""
    relative_error: float
    """Standard deviation that comes on top, as a share of the estimate."""


SUPERPOSED = Calibration(factor=0.0136, power=1.75, fixed_error=0.2, relative_error=0.61)
"""For superposed samples; ``python -m benchmarks.estimation.drops fit`` finds it."""

ONE_CLASS = Calibration(factor=0.961, power=0.7, fixed_error=0.3, relative_error=0.66)
"""For samples of one class, where few are superposed; found likewise."""


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
    """Percent of the held-out samples of one class that student and teacher put into the same class."""

    num_samples: int
    """Held-out samples that this is from: superposed ones, or those of one class where few are superposed."""

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


def estimate_drop(student: Student, teacher: nn.Module, bank: SampleBank) -> Estimate:
    """Return how much accuracy the student loses on real images, estimated on the held-out part of ``bank``.

    Args:
        student: Of ``teacher``.
        teacher: The full-precision model, or its ``Teacher``.
        bank: Samples of this teacher, whose held-out part the student has not learned from.

    Returns:
        The estimate. Its drop is NaN, and ``doubts`` says why, if the samples do not resemble what the network was
        trained on, or if nothing tells whether they do.

    Raises:
        ConfigError: the bank is of another teacher, or it lacks held-out samples and has no doubts to return instead.
    """
    teacher = as_teacher(teacher, bank.input_spec)
    _check_teachers(student, teacher, bank)
    doubts = diagnose(bank, teacher).doubts
    if doubts and not bank.settings.num_held_out:
        return Estimate(math.nan, math.nan, math.nan, math.nan, 0, doubts)
    estimate = estimate_on_held_out(student, teacher, bank)
    return replace(estimate, drop=math.nan, low=math.nan, high=math.nan, doubts=doubts) if doubts else estimate


def estimate_on_held_out(student: Student, teacher: Teacher, bank: SampleBank) -> Estimate:
    """``estimate_drop``, whatever the samples are like: enough to compare students of one bank.

    Raises:
        ConfigError: the bank is of another teacher, or holds no held-out samples.
    """
    _check_teachers(student, teacher, bank)
    single, superposed, agreement = held_out_distances(student, bank)
    if not len(superposed) or len(superposed) < _ENOUGH <= len(single):
        return estimate_from(single, agreement, ONE_CLASS)
    return estimate_from(superposed, agreement)


def _check_teachers(student: Student, teacher: Teacher, bank: SampleBank) -> None:
    if not bank.teacher_hash == student.teacher_hash == teacher.hash:
        raise ConfigError("estimate: student, teacher and bank belong to different teachers; give those of one")


@torch.inference_mode()
def held_out_distances(student: Student, bank: SampleBank) -> tuple[Tensor, Tensor, float]:
    """Return the distances (sample,) of held-out samples of one class and of superposed ones, and the agreement.

    The agreement is the percentage of the former that student and teacher put into the same class.
    """
    samples = bank.held_out
    answers = torch.cat([student(part.to(student.device)).float().cpu() for part in samples.images.split(_BATCH)])
    single, superposed = telling(samples.soft_labels, samples.logits)
    agrees = answers.argmax(1) == samples.logits.argmax(1)
    distances = distance(answers, samples.logits)
    return distances[single], distances[superposed], 100 * float(agrees[single].float().mean())


def telling(
    soft_labels: Float[Tensor, "sample num_classes"], logits: Float[Tensor, "sample num_classes"]
) -> tuple[Bool[Tensor, " sample"], Bool[Tensor, " sample"]]:
    """Return which samples show one class and do so without doubt to the teacher, and which are superposed.

    The teacher is as sure of most real images as of the first; where there are none, all samples are taken for them.
    Superposed ones lie near its boundaries on purpose. A student that was trained for long agrees with it about the
    first, but not there.
    """
    is_single = shows_one_class(soft_labels)
    sure = is_single & (logits.softmax(1).amax(1) > _SURE)
    return (sure if bool(sure.any()) else torch.ones_like(sure)), ~is_single


def distance(
    student: Float[Tensor, "sample num_classes"], teacher: Float[Tensor, "sample num_classes"]
) -> Float[Tensor, " sample"]:
    """Return the total variation between the class probabilities of both, in [0, 1].

    It is the share of draws in which a class drawn from one cannot be matched by one drawn from the other: a
    disagreement that does not jump, and so scatters less than counting classes.
    """
    return 0.5 * (student.softmax(1) - teacher.softmax(1)).abs().sum(1)


def estimate_from(
    distances: Float[Tensor, " sample"], agreement: float, calibration: Calibration = SUPERPOSED
) -> Estimate:
    """Return the estimate that these distances of held-out samples, in [0, 1], come to."""
    return Estimate(*interval(*mean_percent(distances), calibration), agreement, len(distances))


def interval(percent: float, error: float, calibration: Calibration = SUPERPOSED) -> tuple[float, float, float]:
    """Return the drop that a mean distance and its standard error stand for, and the ends of its interval, in points.

    The interval joins the scatter of samples with that of networks and bit widths about the calibration.
    """
    factor, power, fixed, relative = calibration
    drop = factor * percent**power
    sampled = power * drop * error / percent if percent else 0.0
    spread = _QUANTILE * math.hypot(fixed, relative * drop, sampled)
    return drop, drop - spread, drop + spread


def mean_percent(distances: Float[Tensor, " sample"]) -> tuple[float, float]:
    """Return the mean of distances in [0, 1] and its standard error, in percent; a single one has an error of 0."""
    error = float(distances.std()) / math.sqrt(len(distances)) if len(distances) > 1 else 0.0
    return 100 * float(distances.mean()), 100 * error
