"""Students whose real drop is known -> the constants of assessment/estimation.py.

The students are those of ``results/drops``, and those of ``accuracy/results/drops`` whose distance was kept. What
anything here says of a student comes from constants that were fitted to the other networks alone.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qimera.assessment.estimation import Calibration, interval

ESTIMATION = Path(__file__).parent / "results" / "drops"
ACCURACY = Path(__file__).parents[1] / "accuracy" / "results" / "drops"

TRAINED_FROM = 1000
"""Steps from which a student counts as trained."""

_LONG_STEPS = {"fast": 8000, "qimera": 8000, "best": 32000}
"""Of recipes, for images of up to 96 x 96."""

WITHOUT_BATCH_NORMS = ("cct4_cifar10", "mnist_convnext", "mnist_vit")


@dataclass(frozen=True)
class Known:
    """One student: what its samples say, and what it lost."""

    network: str
    bits: str
    start: str
    num_steps: int
    drop: float
    """In points."""
    superposed: float
    """Mean distance of superposed held-out samples, in percent."""
    superposed_error: float
    """Standard error of it."""
    one_class: float = math.nan
    """The same of held-out samples of one class that the teacher is sure of."""
    one_class_error: float = math.nan
    agreement: float = math.nan
    """On these, in percent."""
    trained_agreement: float = math.nan
    """On samples that the student was made from, in percent."""
    real_agreement: float = math.nan
    """On real images, in percent."""

    @property
    def gets_estimate(self) -> bool:
        """Whether its network has batch norms; users are told nothing about others."""
        return self.network not in WITHOUT_BATCH_NORMS

    @property
    def is_trained(self) -> bool:
        """Whether it learned from samples for long."""
        return self.num_steps >= TRAINED_FROM


def measured() -> dict[str, dict[str, Any]]:
    """Return what drops.py wrote of each network."""
    found = [json.loads(path.read_text()) for path in sorted(ESTIMATION.glob("*.json"))]
    return {each["network"]: each for each in found}


def measured_students() -> list[Known]:
    """Return the students of drops.py."""
    return [
        Known(network, **{name: value for name, value in run.items() if name != "seed"})
        for network, values in measured().items()
        for run in values["runs"]
    ]


def students() -> list[Known]:
    """Return all students, those of drops.py first."""
    others = [json.loads(path.read_text()) for path in sorted(ACCURACY.glob("*/*.json"))]
    return measured_students() + [
        _of_recipe(each) for each in others if each["scheme"] == "hardware" and "superposed_error" in each
    ]


def of_one_class() -> list[Known]:
    """Return the students of drops.py with the distances of samples of one class in the place of superposed ones."""
    return [replace(row, superposed=row.one_class, superposed_error=row.one_class_error) for row in measured_students()]


def _of_recipe(found: dict[str, Any]) -> Known:
    steps = 0 if found["network"].endswith("_imagenet") else _LONG_STEPS.get(found["recipe"], 0)
    facts = [found[key] for key in ("drop", "superposed", "superposed_error")]
    return Known(found["network"], found["bits"], f"recipe {found['recipe']}", steps, *facts)


_OFFSET = 0.5
"""Points that drops are moved by before logarithms are taken: below, differences count rather than ratios."""

_POWERS = np.arange(0.5, 2.5, 0.05)


def fit(rows: Sequence[Known]) -> Calibration:
    """Return the law nearest to the drops, and the errors that it made for networks that it did not know.

    Networks without batch norms do not count.
    """
    rows = [row for row in rows if row.gets_estimate]
    errors = []
    for network in dict.fromkeys(row.network for row in rows):
        factor, power = law([row for row in rows if row.network != network] or rows)
        errors += [(row, factor, power) for row in rows if row.network == network]
    return Calibration(*(round(each, 4) for each in (*law(rows), *_scatter(errors))))


def of_other_networks(rows: Sequence[Known]) -> dict[str, Calibration]:
    """Return for each network the constants that the others give."""
    networks = dict.fromkeys(row.network for row in rows)
    return {network: fit([row for row in rows if row.network != network]) for network in networks}


def told(row: Known, calibration: Calibration) -> tuple[float, float, float]:
    """Return the estimate that these constants give, and the ends of its interval."""
    return interval(row.superposed, row.superposed_error, calibration)


def holds(row: Known, calibration: Calibration) -> bool:
    """Whether the interval that these constants give holds the real drop."""
    _, low, high = told(row, calibration)
    return low <= row.drop <= high


def law(rows: Sequence[Known], score_of: Callable[[Known], float] = lambda row: row.superposed) -> tuple[float, float]:
    """Return factor and power of the law with the least squared error of the logarithm, by trying all."""
    factor = np.exp(np.linspace(-9, 2, 551))[:, None, None]
    power = _POWERS[None, :, None]
    score = np.array([score_of(row) for row in rows])
    drop = np.array([max(row.drop, 0) for row in rows])
    error = np.square(np.log(factor * score**power + _OFFSET) - np.log(drop + _OFFSET)).mean(2)
    best = np.unravel_index(error.argmin(), error.shape)
    return float(factor[best[0], 0, 0]), float(power[0, best[1], 0])


def _scatter(errors: Sequence[tuple[Known, float, float]]) -> tuple[float, float]:
    """Return the fixed and the relative error under which rows miss the estimates of these laws as they do.

    By trying all. What so few held-out samples scatter is known and counted apart; what so few real images do is not.
    """
    estimate = np.array([factor * row.superposed**power for row, factor, power in errors])
    missed = np.array([row.drop for row, _, _ in errors]) - estimate
    share = [power * row.superposed_error / max(row.superposed, 1e-9) for row, _, power in errors]
    sampled = np.square(np.array(share) * estimate)
    fixed = np.linspace(0.05, 3, 60)[:, None, None]
    relative = np.linspace(0, 1.5, 151)[None, :, None]
    variance = fixed**2 + (relative * estimate) ** 2 + sampled
    likelihood = -(np.log(variance) + missed**2 / variance).mean(2)
    best = np.unravel_index(likelihood.argmax(), likelihood.shape)
    return float(fixed[best[0], 0, 0]), float(relative[0, best[1], 0])
