"""Finished runs -> a table that puts them side by side."""

from collections.abc import Sequence
from textwrap import fill

from rich.box import SIMPLE_HEAD
from rich.table import Table

from qimera.config.base import Settings
from qimera.errors import enumerate_names
from qimera.report.content import Measured
from qimera.report.summary import Summary, readable_bytes
from qimera.runs.directory import RunDirectory
from qimera.runs.limits import Result


class ComparedRun(Settings):
    """What tells one run from the others."""

    run: str
    """Path of the run directory."""

    model: str
    """Where the model came from, without directories."""

    teacher: str
    """Hash of the graph and all weights."""

    bits: str
    """Such as ``w4a4``."""

    layer_bits: str
    """Exceptions by layer name, as ``--layer-bits`` takes them."""

    first_last_bits: int
    """Bits of the first and the last layer, unless ``layer_bits`` names one of them; 0 where they have the bits of all
    others, or ``layer_bits`` names both."""

    budget: str
    """Such as ``size=0.14``; empty if there was none."""

    recipe: str
    """Name of the recipe."""

    num_images: int
    """Unlabelled images of the user's that the student was made from too."""

    seed: int
    """Start of all random numbers."""

    bytes: int
    """The student's parameters, packed at their bits."""

    estimated_drop: float | None
    """Top-1 that the student loses, in points; null if there is no estimate."""

    estimated_low: float | None
    """Lower end of the 90 percent interval of the estimate, in points."""

    estimated_high: float | None
    """Upper end of the same interval."""

    measured_drop: float | None
    """Top-1 that the student loses on labelled images, in points; null without any, or if a warning doubts them."""

    measured_on: int | None
    """Number of labelled images."""

    agreement: float | None
    """Percent of images, or else of held-out samples, that student and teacher put into the same class."""

    seconds: float
    """Time that bank and student took."""

    warnings: tuple[str, ...]
    """What a person should know before trusting the figures; empty for a good run."""


def compared(run: RunDirectory) -> ComparedRun:
    """Return what tells a finished run from others."""
    summary, measured = run.summary(), run.measured
    estimate = summary.estimate
    return ComparedRun(
        run=str(run.path),
        model=summary.model,
        teacher=summary.teacher_hash,
        bits=summary.bits,
        layer_bits=summary.layer_bits,
        first_last_bits=summary.first_last_bits,
        budget=summary.budget,
        recipe=summary.recipe,
        num_images=summary.num_images,
        seed=summary.seed,
        bytes=summary.student_bytes,
        estimated_drop=estimate and round(estimate.drop, 3),
        estimated_low=estimate and round(estimate.low, 3),
        estimated_high=estimate and round(estimate.high, 3),
        measured_drop=round(measured.drop, 3) if measured and not measured.warnings else None,
        measured_on=measured and measured.num_images,
        agreement=measured.agreement if measured else estimate and estimate.agreement,
        seconds=(summary.bank_seconds or 0) + (summary.student_seconds or 0),
        warnings=_warnings(summary, measured),
    )


def result_of(run: RunDirectory) -> Result:
    """Return the drop of a run, measured if possible and estimated otherwise, and all warnings."""
    summary, measured = run.summary(), run.measured
    warnings = _warnings(summary, measured)
    if measured and not measured.warnings:
        return Result(str(run.path), warnings, measured.drop, "measured")
    return Result(str(run.path), warnings, summary.estimated_drop)


def _warnings(summary: Summary, measured: Measured | None) -> tuple[str, ...]:
    return (*(measured.warnings if measured else ()), *summary.warnings)


def comparison_table(runs: Sequence[RunDirectory], width: int) -> Table:
    """Return a table of the runs for a person, the smallest drop first; runs without a known drop come last.

    Args:
        runs: Finished runs.
        width: Characters of a line; the least important columns are left out if they do not fit.
    """
    ranked = [compared(run) for run in sorted(runs, key=_drop_or_infinity)]
    rows = [_cells(each) for each in ranked]
    shown = _that_fit(rows, width)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption_justify="left", caption_style="")
    for name in shown:
        if name in _LEFT:
            table.add_column(name, overflow="fold", min_width=len(name))
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for cells in rows:
        table.add_row(*(cells[name] for name in shown))
    table.caption = "\n".join(_notes(ranked, [name for name in rows[0] if name not in shown]))
    return table


def warning_lines(runs: Sequence[RunDirectory], width: int) -> str:
    """Return every warning once, with the runs that it is about, in lines of at most ``width`` characters."""
    about: dict[str, list[str]] = {}
    for found in map(compared, runs):
        for warning in found.warnings:
            about.setdefault(warning, []).append(found.run)
    paragraphs = [f"warning: {enumerate_names(names)}: {warning}" for warning, names in about.items()]
    lines = [fill(each, width, subsequent_indent="  ", break_on_hyphens=False) for each in paragraphs]
    return "".join(f"{each}\n" for each in lines)


_LEFT = ("run", "bits", "recipe")
_DISPENSABLE = ("time", "agree (%)", "seed", "size")
"""Columns that narrow terminals leave out, in this order."""

_BETWEEN = 3
"""Characters between two columns."""

_RUN_WIDTH, _LEFT_WIDTH = 24, 10
"""Least width of a column at the left, in characters."""


def _drop_or_infinity(run: RunDirectory) -> float:
    drop = result_of(run).drop
    return float("inf") if drop is None else drop


def _cells(found: ComparedRun) -> dict[str, str]:
    """Return the cells of a run by their column."""
    estimate = "none"
    if found.estimated_drop is not None:
        estimate = f"{found.estimated_drop:z.2f} ({found.estimated_low:z.1f} to {found.estimated_high:z.1f})"
    return {
        "run": found.run,
        "bits": _bits(found),
        "recipe": found.recipe + (f", {found.num_images:,} images" if found.num_images else ""),
        "seed": str(found.seed),
        "size": readable_bytes(found.bytes),
        "estimated drop": estimate,
        "measured": "" if found.measured_drop is None else f"{found.measured_drop:.2f}",
        "agree (%)": "" if found.agreement is None else f"{found.agreement:.1f}",
        "time": f"{found.seconds:.0f} s",
    }


def _bits(found: ComparedRun) -> str:
    ends = f"first and last {found.first_last_bits}" if found.first_last_bits else ""
    return ", ".join(filter(None, (found.budget or found.bits, ends, "" if found.budget else found.layer_bits)))


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


def _notes(runs: Sequence[ComparedRun], hidden: Sequence[str]) -> list[str]:
    notes = []
    if len({each.teacher for each in runs}) > 1:
        notes.append("These runs are of several models; each drop is from that model's own full precision.")
    if hidden:
        notes.append(f"Left out on this narrow line: {', '.join(hidden)}.")
    return notes
