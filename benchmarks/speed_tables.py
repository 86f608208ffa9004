"""benchmarks/results/speed -> the tables of docs/speed.md."""

import json
from pathlib import Path
from typing import Any

SPEED = Path(__file__).parent / "results" / "speed"


def speed_tables() -> dict[str, str]:
    """Return both tables by name."""
    return {"steps": _steps(), "prices": _prices()}


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
