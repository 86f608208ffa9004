"""Results of this folder -> the tables of docs/speed.md."""

import json
from pathlib import Path
from typing import Any

SPEED = Path(__file__).parent / "results"


def speed_tables() -> dict[str, str]:
    """Return all tables by name."""
    return {"steps": _steps(), "loops": _loops(), "prices": _prices()}


def _steps() -> str:
    """One row per network and kind of step: what it costs."""
    head = "| network | step | samples at a time | multiply-adds, M | memory read and written, MB | ms |\n"
    rows = [head, "|---|---|---|---|---|---|\n"]
    for result in _results("steps"):
        for name, stage in result["stages"].items():
            work = (stage.get("giga_multiply_adds"), stage.get("gigabytes"))
            each = " | ".join("" if value is None else f"{1000 * value / stage['batch']:.1f}" for value in work)
            milliseconds = f"{stage['milliseconds_per_sample']:.2f}"
            rows.append(f"| {result['network']} | {name} | {stage['batch']} | {each} | {milliseconds} |\n")
    return "".join(rows)


def _loops() -> str:
    """One row per network and kind of loop: how fast it is, and how long until it starts."""
    head = "| device | network | loop | samples at a time | steps/s, plain | steps/s, compiled | compiling, s |\n"
    rows = [head, "|---|---|---|---|---|---|---|\n"]
    for result in _results("loops-*"):
        for step, row in result["steps"].items():
            rates = " | ".join(f"{row[name]:.1f}" for name in ("plain", "compiled"))
            where = f"| {result['device']} | {result['network']} | {step} | {result['batch']} "
            rows.append(f"{where}| {rates} | {row['compiled_start_seconds']:.0f} |\n")
    return "".join(rows)


def _prices() -> str:
    """One row per network and recipe: what its result costs against the paper's schedule."""
    head = "| network | bits | recipe | drop | bank + student, s | a step of the paper's, s | 80,000 over ours |\n"
    rows = [head, "|---|---|---|---|---|---|---|\n"]
    for result in _results("results"):
        for row in result["rows"]:
            seconds = f"{row['bank_seconds']:.0f} + {row['student_seconds']:.0f}"
            rows.append(
                f"| {result['network']} | {result['bits'].upper()} | {row['recipe']} | {row['drop']:.2f} | {seconds} | "
                f"{result['paper_seconds_per_step']:.2f} | {row['paper_over_ours']:,} |\n"
            )
    return "".join(rows)


def _results(kind: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(SPEED.glob(f"*-{kind}.json"))]
