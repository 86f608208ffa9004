"""Finished runs -> a table that puts them side by side."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from qimera.report.summary import readable_bytes
from qimera.runs.directory import RunDirectory
from qimera.runs.limits import Result


def comparison_values(runs: Sequence[RunDirectory]) -> list[dict[str, Any]]:
    """Return what tells each run from the others; drops in points, agreement in percent, time in seconds."""
    found = []
    for run in runs:
        summary = run.summary()
        measured = run.measured
        estimate = summary.estimate
        found.append(
            {
                "run": str(run.path),
                "model": summary.model,
                "teacher": summary.teacher_hash,
                "bits": summary.bits,
                "layer_bits": summary.layer_bits,
                "budget": summary.budget,
                "recipe": summary.recipe,
                "seed": summary.seed,
                "bytes": summary.student_bytes,
                "estimated_drop": estimate and round(estimate.drop, 3),
                "estimated_low": estimate and round(estimate.low, 3),
                "estimated_high": estimate and round(estimate.high, 3),
                "measured_drop": measured and round(measured.drop, 3),
                "measured_on": measured and measured.num_images,
                "agreement": measured.agreement if measured else estimate and estimate.agreement,
                "seconds": (summary.bank_seconds or 0) + (summary.student_seconds or 0),
                "warnings": [*(measured.warnings if measured else ()), *summary.warnings],
            }
        )
    return found


def result_of(run: RunDirectory) -> Result:
    """Return the drop of a run that can be trusted most, and all warnings: measured, else estimated."""
    summary, measured = run.summary(), run.measured
    warnings = (*(measured.warnings if measured else ()), *summary.warnings)
    if measured and not measured.warnings:
        return Result(str(run.path), warnings, measured.drop, "measured")
    return Result(str(run.path), warnings, summary.estimated_drop)


def comparison_table(runs: Sequence[RunDirectory], width: int) -> Table:
    """Return the same for a person, the smallest loss first, runs whose loss nobody knows last.

    Args:
        runs: Finished ones.
        width: Characters of a line; what matters least is left out where they are too few.
    """
    pairs = zip((result_of(run) for run in runs), comparison_values(runs), strict=True)
    ranked = sorted(pairs, key=lambda pair: float("inf") if pair[0].drop is None else pair[0].drop)
    rows = [_cells(values) for _, values in ranked]
    shown = _that_fit(rows, width)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    for name in shown:
        if name in _LEFT:
            table.add_column(name, overflow="fold", min_width=len(name))
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for cells in rows:
        table.add_row(*(cells[name] for name in shown))
    table.caption = "\n".join(_notes([values for _, values in ranked], [name for name in rows[0] if name not in shown]))
    return table


_LEFT = ("run", "bits", "recipe")
_DISPENSABLE = ("time", "agree (%)", "seed", "size")
"""Columns that narrow terminals do without, the first ones first."""

_BETWEEN = 3
"""Characters between two columns."""

_RUN_WIDTH, _LEFT_WIDTH = 24, 10
"""Characters to which a column at the left may be folded."""


def _cells(values: dict[str, Any]) -> dict[str, str]:
    """Return the cells of a run by their column."""
    estimated = "" if values["estimated_drop"] is None else f"{values['estimated_drop']:.2f}"
    interval = "" if not estimated else f" ({values['estimated_low']:.1f} to {values['estimated_high']:.1f})"
    return {
        "run": values["run"],
        "bits": values["budget"] or values["bits"] + (f", {values['layer_bits']}" if values["layer_bits"] else ""),
        "recipe": values["recipe"],
        "seed": str(values["seed"]),
        "size": readable_bytes(values["bytes"]),
        "estimated drop": estimated + interval or "none",
        "measured": "" if values["measured_drop"] is None else f"{values['measured_drop']:.2f}",
        "agree (%)": "" if values["agreement"] is None else f"{values['agreement']:.1f}",
        "time": f"{values['seconds']:.0f} s",
    }


def _that_fit(rows: Sequence[dict[str, str]], width: int) -> list[str]:
    """Return the columns that a line of ``width`` characters holds."""
    needed = {name: max(len(name), *(len(cells[name]) for cells in rows)) for name in rows[0]}
    for name in _LEFT:
        needed[name] = min(needed[name], _RUN_WIDTH if name == "run" else _LEFT_WIDTH)
    shown = list(needed)
    for name in _DISPENSABLE:
        if sum(needed[each] + _BETWEEN for each in shown) <= width:
            break
        shown.remove(name)
    return shown


def _notes(values: Sequence[dict[str, Any]], hidden: Sequence[str]) -> list[str]:
    notes = [f"warning: {each['run']}: {warning}" for each in values for warning in each["warnings"]]
    if len({each["teacher"] for each in values}) > 1:
        notes.append("These runs are of several models; drops are from each one's own full precision.")
    if hidden:
        notes.append(f"Not shown, for want of width: {', '.join(hidden)}.")
    return notes
