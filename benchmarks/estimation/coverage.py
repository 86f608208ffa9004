"""All students with an estimate, of these benchmarks and those of accuracy: how many intervals hold the real drop.

The constants for each network are fitted to untrained students of the *other* networks. The files in ``results/drops``
and in ``accuracy/results/drops`` hold estimates and their intervals, from which distance and scatter follow; nothing is
measured here. docs/estimation.md has the table.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qimera.assessment.estimation import CALIBRATION, Calibration

ESTIMATION = Path(__file__).parent / "results" / "drops"
ACCURACY = Path(__file__).parents[1] / "accuracy" / "results" / "drops"
_QUANTILE = 1.645
_OFFSET = 0.5
"""As in drops.py: below, differences count rather than ratios."""

TRAINED_FROM = 1000
"""Steps from which a student counts as trained."""

CLASSES = {"resnet20_cifar100": 100, "mobilenet_v1_075_imagenet": 1000, "efficientnet_lite0_imagenet": 1000}
"""Of networks that have more than ten."""


@dataclass(frozen=True)
class Told:
    """One student: what its samples say, and what it lost."""

    network: str
    bits: str
    num_steps: int
    distance: float
    """Mean over held-out samples, in percent."""
    scatter: float
    """Standard error of it."""
    drop: float

    @property
    def is_trained(self) -> bool:
        """Whether it learned from samples for long."""
        return self.num_steps >= TRAINED_FROM

    @property
    def num_classes(self) -> int:
        """Of its network."""
        return CLASSES.get(self.network, 10)


def students() -> list[Told]:
    """Return all students with an estimate."""
    found = []
    for path in sorted(ESTIMATION.glob("*.json")):
        values = json.loads(path.read_text())
        calibration = Calibration(*values["calibration_of_other_networks"].values())
        for run in values["runs"]:
            found.append(_told(values["network"], run["bits"], run["num_steps"], run, run["drop"], calibration))
    for path in sorted(ACCURACY.glob("*/*.json")):
        values = json.loads(path.read_text())
        if values.get("estimate") and values["scheme"] == "hardware":
            is_large, is_ptq = "imagenet" in values["network"], values["recipe"] == "ptq"
            steps = 0 if is_large or is_ptq else 8000
            found.append(
                _told(
                    values["network"], values["bits"], steps, _renamed(values["estimate"]), values["drop"], CALIBRATION
                )
            )
    return found


def _renamed(estimate: dict[str, float]) -> dict[str, float]:
    return {"estimate": estimate["drop"], "low": estimate["low"], "high": estimate["high"]}


def _told(network: str, bits: str, steps: int, found: dict[str, float], drop: float, calibration: Calibration) -> Told:
    """Return a student from its estimate and the constants that it was made with."""
    deviation = (found["high"] - found["low"]) / 2 / _QUANTILE
    known = math.hypot(calibration.fixed_error, calibration.relative_error * found["estimate"])
    scatter = math.sqrt(max(deviation**2 - known**2, 0.0)) / calibration.factor
    return Told(network, bits, steps, found["estimate"] / calibration.factor, scatter, drop)


def calibrated(rows: Sequence[Told]) -> Calibration:
    """Return the constants that suit these students, as drops.py finds them."""
    factor, errors = _factor(rows), []
    for network in {row.network for row in rows}:
        known = _factor([row for row in rows if row.network != network] or rows)
        errors += [(row, known) for row in rows if row.network == network]
    estimate = np.array([known * row.distance for row, known in errors])
    missed = np.array([row.drop for row, _ in errors]) - estimate
    sampled = np.square([known * row.scatter for row, known in errors])
    fixed, relative = np.linspace(0.05, 3, 60)[:, None, None], np.linspace(0, 1.5, 151)[None, :, None]
    variance = fixed**2 + (relative * estimate) ** 2 + sampled
    likelihood = -(np.log(variance) + missed**2 / variance).mean(2)
    best = np.unravel_index(likelihood.argmax(), likelihood.shape)
    return Calibration(factor, float(fixed[best[0], 0, 0]), float(relative[0, best[1], 0]))


def _factor(rows: Sequence[Told]) -> float:
    factor = np.exp(np.linspace(-7, 2, 451))[:, None]
    distance, drop = np.array([row.distance for row in rows]), np.array([max(row.drop, 0.0) for row in rows])
    error = np.square(np.log(factor * distance + _OFFSET) - np.log(drop + _OFFSET)).mean(1)
    return float(factor[error.argmin(), 0])


def coverage() -> str:
    """Return one row for each group of students."""
    rows = students()
    untrained = [row for row in rows if not row.is_trained]
    networks = {row.network for row in rows}
    constants = {name: calibrated([row for row in untrained if row.network != name]) for name in networks}
    groups = {
        "not trained (`ptq`, large images, up to 200 steps)": untrained,
        "of these, ten classes": [row for row in untrained if row.num_classes == 10],
        "of these, 100 and 1,000 classes": [row for row in untrained if row.num_classes > 10],
        "of these, 2-bit weights": [row for row in untrained if row.bits.startswith("w2")],
        "trained for 8,000 steps": [row for row in rows if row.is_trained],
        "all": rows,
    }
    table = [
        "| students | number | networks | interval holds the real drop | largest error upwards | downwards |\n",
        "|---|---|---|---|---|---|\n",
    ]
    for name, group in groups.items():
        estimates = [constants[row.network].factor * row.distance for row in group]
        pairs = list(zip(group, estimates, strict=True))
        held = sum(_holds(row, estimate, constants[row.network]) for row, estimate in pairs)
        high, low = (choose(pairs, key=lambda pair: pair[1] - pair[0].drop) for choose in (max, min))
        table.append(
            f"| {name} | {len(group)} | {len({row.network for row in group})} "
            f"| {held} ({100 * held / len(group):.0f} %) | {_pair(*high)} | {_pair(*low)} |\n"
        )
    return "".join(table)


def _holds(row: Told, estimate: float, constants: Calibration) -> bool:
    spread = math.hypot(constants.fixed_error, constants.relative_error * estimate, constants.factor * row.scatter)
    return abs(row.drop - estimate) <= _QUANTILE * spread


def _pair(row: Told, estimate: float) -> str:
    return f"told {estimate:.1f}, lost {row.drop:.1f} ({row.network}, {row.bits.upper()})"
