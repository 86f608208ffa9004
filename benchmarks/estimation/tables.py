"""Results of this folder -> the tables of docs/estimation.md."""

import json
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ESTIMATION = RESULTS / "drops"
STEPS = RESULTS / "steps"
DOUBTS = RESULTS / "doubts"

Result = dict[str, Any]


def estimation_tables() -> dict[str, str]:
    """Return every table of the page by its name."""
    made = {"estimation": estimation(), "estimators": estimators(), "estimates": estimates(), "choices": choices()}
    return {**made, "steps": steps(), "doubts": doubts()}


def estimation() -> str:
    """Estimates against real drops, network by network and over all."""
    head = (
        "| network | runs | held out | real drops | mean error | of drops below 10 | rank correlation "
        "| within the interval |\n"
    )
    rows = [head, "|---|---|---|---|---|---|---|---|\n"]
    found = _estimation()
    photographs = [run for network, each in found.items() if network != "mnist_cnn" for run in each]
    groups = [*found.items(), ("all", [*photographs, *found["mnist_cnn"]]), ("all but mnist_cnn", photographs)]
    for network, runs in groups:
        drops = [run["drop"] for run in runs]
        errors = [abs(run["estimate"] - run["drop"]) for run in runs]
        small = [error for error, drop in zip(errors, drops, strict=True) if drop < SMALL_DROP]
        inside = sum(run["low"] <= run["drop"] <= run["high"] for run in runs)
        held_out = sorted({run["num_held_out"] for run in runs})
        rows.append(
            f"| {network} | {len(runs)} | {' to '.join(map(str, {held_out[0], held_out[-1]}))} "
            f"| {min(drops):.1f} to {max(drops):.1f} | {statistics.mean(errors):.2f} | {statistics.mean(small):.2f} "
            f"| {_rank_correlation([run['estimate'] for run in runs], drops):.3f} | {inside} of {len(runs)} |\n"
        )
    return "".join(rows)


ENOUGH_RUNS = 6
"""For a rank correlation."""

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
    looked_at = {
        "total variation on held-out samples (this is it)": "estimate",
        "agreement on held-out samples": "from_agreement",
        "agreement on the samples that the student was made from": "from_trained_agreement",
        "agreement on the real images, for comparison": "from_real_agreement",
    }
    head = (
        "| from | mean error | of drops below 10 | rank correlation, all | within networks of 6 runs and more, mean |\n"
    )
    rows = [head, "|---|---|---|---|---|\n"]
    found = _estimation()
    runs = [run for runs in found.values() for run in runs]
    for name, key in looked_at.items():
        errors = [abs(run[key] - run["drop"]) for run in runs]
        small = [error for error, run in zip(errors, runs, strict=True) if run["drop"] < SMALL_DROP]
        within = [
            _rank_correlation([run[key] for run in each], [run["drop"] for run in each])
            for each in found.values()
            if len(each) >= ENOUGH_RUNS
        ]
        over_all = _rank_correlation([run[key] for run in runs], [run["drop"] for run in runs])
        rows.append(
            f"| {name} | {statistics.mean(errors):.2f} | {statistics.mean(small):.2f} | {over_all:.3f} "
            f"| {statistics.mean(within):.3f} |\n"
        )
    return "".join(rows)


def estimates() -> str:
    """Every run."""
    head = (
        "| network | bits | student | real drop | estimate | interval | distance | agreement: held out | trained on "
        "| real |\n"
    )
    rows = [head, "|---|---|---|---|---|---|---|---|---|---|\n"]
    for network, runs in _estimation().items():
        for run in sorted(runs, key=lambda run: run["drop"]):
            shares = (run[key] for key in ("agreement", "trained_agreement", "real_agreement"))
            rows.append(
                f"| {network} | {run['bits'].upper()} | {_student(run)} | {run['drop']:.2f} "
                f"| {run['estimate']:.2f} | {run['low']:.1f} to {run['high']:.1f} | {run['distance']:.2f} "
                f"| {' | '.join(f'{share:.2f}' for share in shares)} |\n"
            )
    return "".join(rows)


def choices() -> str:
    """What choosing among students of the same network and bits comes to."""
    rows = ["| network | bits | students | chosen | best | worst |\n", "|---|---|---|---|---|---|\n"]
    for network, runs in _estimation().items():
        for bits in sorted({run["bits"] for run in runs}, reverse=True):
            same = [run for run in runs if run["bits"] == bits]
            if len(same) > 1:
                drops = [run["drop"] for run in same]
                chosen = min(same, key=lambda run: run["estimate"])["drop"]
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


def _student(run: Result) -> str:
    """Return how a student was made."""
    return f"{run['start']}, {run['num_steps']} steps" if run["num_steps"] else f"{run['start']}"


def _estimation() -> dict[str, list[Result]]:
    """Return the runs of each network."""
    found = [json.loads(path.read_text()) for path in sorted(ESTIMATION.glob("*.json"))]
    return {each["network"]: [run | {"num_held_out": each["num_held_out"]} for run in each["runs"]] for each in found}


def _rank_correlation(one: list[float], other: list[float]) -> float:
    """Return Spearman's coefficient; equal values share the mean of their ranks, and a constant has none: 0."""
    ranks = [[sum(b < a for b in values) + sum(b == a for b in values) / 2 for a in values] for values in (one, other)]
    return 0.0 if any(len(set(each)) == 1 for each in ranks) else statistics.correlation(*ranks)
