"""Finished runs -> a table that puts them side by side."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from qimera.report.content import measured_of
from qimera.run_directory import RunDirectory
from qimera.summary import readable_bytes


def comparison_values(runs: Sequence[RunDirectory]) -> list[dict[str, Any]]:
    """Return what tells each run from the others; drops in points, agreement in percent, time in seconds."""
    found = []
    for run in runs:
        summary = run.summary()
        measured = measured_of(run)
        estimate = summary.estimate
        found.append(
            {
                "run": str(run.path),
                "model": summary.model,
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
            }
        )
    return found


def comparison_table(runs: Sequence[RunDirectory]) -> Table:
    """Return the same for a person, the smallest loss first."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    table.add_column("run", overflow="fold")
    for name in ("bits", "recipe"):
        table.add_column(name, overflow="fold")
    for name in ("seed", "size", "estimated drop", "measured", "agree (%)", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    values = comparison_values(runs)
    values.sort(key=lambda each: _drop(each))
    for each in values:
        bits = each["budget"] or each["bits"] + (f", {each['layer_bits']}" if each["layer_bits"] else "")
        estimated = "" if each["estimated_drop"] is None else f"{each['estimated_drop']:.2f}"
        interval = "" if not estimated else f" ({each['estimated_low']:.1f} to {each['estimated_high']:.1f})"
        measured = "" if each["measured_drop"] is None else f"{each['measured_drop']:.2f}"
        agreement = "" if each["agreement"] is None else f"{each['agreement']:.1f}"
        cells = (each["run"], bits, each["recipe"], str(each["seed"]), readable_bytes(each["bytes"]))
        table.add_row(*cells, estimated + interval, measured, agreement, f"{each['seconds']:.0f} s")
    if len({each["model"] for each in values}) > 1:
        table.caption = "These runs are of several models; drops are from each one's own full precision."
    return table


def _drop(values: dict[str, Any]) -> float:
    known = [values[name] for name in ("measured_drop", "estimated_drop") if values[name] is not None]
    return float(known[0]) if known else float("inf")
