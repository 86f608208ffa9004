"""Results of this folder -> the tables of docs/estimation.md."""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.estimation.calibration import (
    TRAINED_FROM,
    Known,
    holds,
    law,
    measured,
    measured_students,
    of_other_networks,
    students,
    told,
)

RESULTS = Path(__file__).parent / "results"
STEPS = RESULTS / "steps"
DOUBTS = RESULTS / "doubts"

Result = dict[str, Any]


def estimation_tables() -> dict[str, str]:
    """Return every table of the page by its name."""
    made = {"estimation": estimation(), "estimators": estimators(), "estimates": estimates(), "choices": choices()}
    return {**made, "coverage": coverage(), "steps": steps(), "doubts": doubts()}


def estimation() -> str:
    """Estimates against real drops, network by network and over all."""
    head = (
        "| network | students | held out | real drops | mean error | of drops below 10 | rank correlation "
        "| within the interval |\n"
    )
    rows = [head, "|---|---|---|---|---|---|---|---|\n"]
    constants = of_other_networks(students())
    held_out = {name: values["num_held_out"] for name, values in measured().items()}
    found = [row for row in measured_students() if row.gets_estimate]
    for name in (*dict.fromkeys(row.network for row in found), "all"):
        each = [row for row in found if name in ("all", row.network)]
        counts = sorted({held_out[row.network] for row in each})
        drops = [row.drop for row in each]
        estimates = [told(row, constants[row.network])[0] for row in each]
        errors = [abs(estimate - drop) for estimate, drop in zip(estimates, drops, strict=True)]
        small = [error for error, drop in zip(errors, drops, strict=True) if drop < SMALL_DROP]
        inside = sum(holds(row, constants[row.network]) for row in each)
        rows.append(
            f"| {name} | {len(each)} | {' to '.join(map(str, counts[:: max(1, len(counts) - 1)]))} "
            f"| {min(drops):.1f} to {max(drops):.1f} | {statistics.mean(errors):.2f} | {statistics.mean(small):.2f} "
            f"| {_rank_correlation(estimates, drops):.3f} | {inside} of {len(each)} |\n"
        )
    return "".join(rows)


def coverage() -> str:
    """How many intervals hold the real drop, by kind of student."""
    rows = students()
    constants = of_other_networks(rows)
    classes = {name: values["num_classes"] for name, values in measured().items()}
    without = [row for row in rows if not row.gets_estimate]
    rows = [row for row in rows if row.gets_estimate]
    few = [row for row in rows if classes[row.network] <= FEW_CLASSES]
    groups = {
        f"trained for less than {TRAINED_FROM:,} steps": [row for row in rows if not row.is_trained],
        "trained for 2,000 steps": [row for row in rows if TRAINED_FROM <= row.num_steps < LONG],
        "trained for 8,000 steps (`fast`, `qimera`)": [row for row in rows if row.num_steps >= LONG],
        "two-bit weights": [row for row in rows if row.bits.startswith("w2")],
        f"networks of {FEW_CLASSES} classes": few,
        "networks of 100 and 1,000 classes": [row for row in rows if row not in few],
        "all": rows,
        "networks without batch norms, which get no estimate": without,
    }
    head = "| students | number | networks | interval holds the real drop | largest error upwards | downwards |\n"
    table = [head, "|---|---|---|---|---|---|\n"]
    for name, group in ((name, group) for name, group in groups.items() if group):
        pairs = [(row, told(row, constants[row.network])[0]) for row in group]
        held = sum(holds(row, constants[row.network]) for row in group)
        high, low = (choose(pairs, key=lambda pair: pair[1] - pair[0].drop) for choose in (max, min))
        table.append(
            f"| {name} | {len(group)} | {len({row.network for row in group})} "
            f"| {held} ({100 * held / len(group):.0f} %) | {_pair(*high)} | {_pair(*low)} |\n"
        )
    return "".join(table)


def _pair(row: Known, estimate: float) -> str:
    return f"told {estimate:.1f}, lost {row.drop:.1f} ({row.network}, {row.bits.upper()})"


LONG = 8000
"""Steps of recipes that train."""

FEW_CLASSES = 10

SMALL_DROP = 10
"""Points; a larger drop is of interest to nobody but as a warning."""


def doubts() -> str:
    """Banks of right and wrong inputs: what their samples are like, and what would be estimated without the check."""
    head = (
        "| network | bank | largest gap | mean gap | recognised (%) | would be estimated | real drop | is estimated |\n"
    )
    rows = [head, "|---|---|---|---|---|---|---|---|\n"]
    for path in sorted(DOUBTS.glob("*.json")):
        found = json.loads(path.read_text())
        for name, case in found["cases"].items():
            said = "yes" if not case["doubts"] else f"no: {', '.join(case['doubts'])}"
            rows.append(
                f"| {found['network']} | {name} | {case['worst_gap']:.3f} | {case['mean_gap']:.4f} "
                f"| {case['recognised']:.0f} | {case['estimate']:.1f} ({case['low']:.1f} to {case['high']:.1f}) "
                f"| {case['drop']:.1f} | {said} |\n"
            )
    return "".join(rows)


def estimators() -> str:
    """What else could be looked at, each with a power law fitted on other networks."""
    looked_at: dict[str, Callable[[Known], float]] = {
        "distance of superposed held-out samples (this is it)": lambda row: row.superposed,
        "distance of held-out samples of one class": lambda row: row.one_class,
        "agreement on held-out samples of one class": lambda row: 100 - row.agreement,
        "agreement on the samples that the student was made from": lambda row: 100 - row.trained_agreement,
        "agreement on the real images, for comparison": lambda row: 100 - row.real_agreement,
    }
    rows = [
        "| from | power | mean error | of drops below 10 | of students trained for 2,000 steps | rank correlation |\n",
        "|---|---|---|---|---|---|\n",
    ]
    found = [row for row in measured_students() if row.gets_estimate]
    networks = dict.fromkeys(row.network for row in found)
    for name, score in looked_at.items():
        laws = {each: law([row for row in found if row.network != each], score) for each in networks}
        estimates = [laws[row.network][0] * score(row) ** laws[row.network][1] for row in found]
        errors = [abs(estimate - row.drop) for estimate, row in zip(estimates, found, strict=True)]
        small = [error for error, row in zip(errors, found, strict=True) if row.drop < SMALL_DROP]
        trained = [error for error, row in zip(errors, found, strict=True) if row.is_trained]
        rows.append(
            f"| {name} | {law(found, score)[1]:.2f} | {statistics.mean(errors):.2f} "
            f"| {statistics.mean(small):.2f} | {statistics.mean(trained):.2f} "
            f"| {_rank_correlation(estimates, [row.drop for row in found]):.3f} |\n"
        )
    return "".join(rows)


def estimates() -> str:
    """Every student."""
    head = (
        "| network | bits | student | real drop | estimate | interval | distance: superposed | of one class "
        "| agreement: held out | trained on | real |\n"
    )
    rows = [head, "|---|---|---|---|---|---|---|---|---|---|---|\n"]
    everyone = students()
    constants = of_other_networks(everyone)
    for network in dict.fromkeys(row.network for row in everyone):
        for row in sorted((row for row in everyone if row.network == network), key=lambda row: row.drop):
            estimate, low, high = told(row, constants[network])
            numbers = (row.superposed, row.one_class, row.agreement, row.trained_agreement, row.real_agreement)
            shown = " | ".join("" if math.isnan(each) else f"{each:.2f}" for each in numbers)
            rows.append(
                f"| {network} | {row.bits.upper()} | {_student(row)} | {row.drop:.2f} | {estimate:.2f} "
                f"| {low:.1f} to {high:.1f} | {shown} |\n"
            )
    return "".join(rows)


def choices() -> str:
    """What choosing among students of the same network and bits comes to."""
    rows = ["| network | bits | students | chosen | best | worst |\n", "|---|---|---|---|---|---|\n"]
    for network in measured():
        found = [row for row in measured_students() if row.network == network]
        for bits in sorted({row.bits for row in found}, reverse=True):
            same = [row for row in found if row.bits == bits]
            if len(same) > 1:
                drops = [row.drop for row in same]
                chosen = min(same, key=lambda row: row.superposed).drop
                rows.append(
                    f"| {network} | {bits.upper()} | {'; '.join(map(_student, same))} | **{chosen:.2f}** "
                    f"| {min(drops):.2f} | {max(drops):.2f} |\n"
                )
    return "".join(rows)


def steps() -> str:
    """Estimate and real drop in the course of trainings."""
    found = [json.loads(path.read_text()) for path in sorted(STEPS.glob("*.json"))]
    rows = ["| network | bits | step | estimate | real drop |\n", "|---|---|---|---|---|\n"]
    for each in found:
        for seen in each["seen"]:
            rows.append(
                f"| {each['network']} | {each['bits'].upper()} | {seen['step']} | {seen['estimate']:.2f} "
                f"| {seen['drop']:.2f} |\n"
            )
    return "".join(rows)


def _student(row: Known) -> str:
    """Return how a student was made."""
    is_recipe = row.start.startswith("recipe")
    return f"{row.start}, {row.num_steps:,} steps" if row.num_steps and not is_recipe else row.start


def _rank_correlation(one: list[float], other: list[float]) -> float:
    """Return Spearman's coefficient; equal values share the mean of their ranks, and a constant has none: 0."""
    ranks = [[sum(b < a for b in values) + sum(b == a for b in values) / 2 for a in values] for values in (one, other)]
    return 0.0 if any(len(set(each)) == 1 for each in ranks) else statistics.correlation(*ranks)
