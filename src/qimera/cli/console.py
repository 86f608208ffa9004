"""Progress of a long stage -> a live bar in a terminal, lines with the time anywhere else."""

import time
from datetime import UTC, datetime
from types import TracebackType

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress as Bars,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from qimera.machine.progress import Progress

_SECONDS_BETWEEN_LINES = 5.0
_WIDTH_WITHOUT_TERMINAL = 120
_STAGES = {
    "generator": "train the generator",
    "direct": "optimise images",
    "sensitivity": "measure layers",
    "ranges": "search ranges",
    "rounding": "find integers",
    "reconstruction": "train blocks",
    "distillation": "train the student",
    "evaluation": "evaluate",
}


class ProgressDisplay:
    """Shows each stage on stderr: a live bar in a terminal, a line with the time every few seconds anywhere else.

    An instance is the ``ProgressCallback`` to pass on; use it as a context manager.

    Args:
        shown: Whether to show anything; of several processes only one does.
    """

    def __init__(self, shown: bool = True) -> None:
        self._shown = shown
        self._console = Console(stderr=True)
        self._bars = Bars(
            *_columns(self._console.width),
            console=self._console,
            disable=not (self._console.is_terminal and shown),
        )
        self._tasks: dict[str, TaskID] = {}
        self._start, self._first_step = 0.0, 0
        self._stage = ""
        self._last_line = 0.0

    def __enter__(self) -> "ProgressDisplay":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, progress: Progress) -> None:
        """Show one step."""
        if not self._shown:
            return
        if self._console.is_terminal:
            self._draw(progress)
        else:
            self._write(progress)

    def _draw(self, progress: Progress) -> None:
        if progress.note and self._console.width < _WIDTH_WITH_METRICS:
            self._bars.print(f"{_title(progress)}: {progress.note}")
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = self._bars.add_task(_title(progress), total=progress.total, metrics="")
        task = self._tasks[progress.stage]
        if progress.step < self._bars.tasks[task].completed:  # the stage comes again, of another recipe for example
            self._bars.reset(task)
        self._bars.update(task, completed=progress.step, total=progress.total, metrics=_metrics(progress))

    def _write(self, progress: Progress) -> None:
        now = time.monotonic()
        # Anew when a stage comes again, and after the first step: often compiled, it says nothing of the others.
        if progress.stage != self._stage or self._first_step == 0:
            self._stage, self._start, self._first_step = progress.stage, now, progress.step
        is_last, is_first = progress.step >= progress.total, progress.step == 0
        if not is_last and not is_first and now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        facts = [f"{_title(progress)}: {progress.step}/{progress.total}"]
        if not is_last and progress.step > self._first_step:
            per_step = (now - self._start) / (progress.step - self._first_step)
            facts.append(f"{per_step * (progress.total - progress.step):.0f} s left")
        typer.echo("  ".join(filter(None, (f"{timestamp()} {facts[0]}", *facts[1:], _metrics(progress)))), err=True)


_WIDTH_WITH_METRICS, _WIDTH_WITH_ELAPSED = 110, 72
"""Characters of a line from which losses, and the time that has passed, have room beside what matters more."""


def _columns(width: int) -> list[ProgressColumn]:
    """Return what a line of so many characters holds: stage, bar, count and time left always."""
    columns: list[ProgressColumn] = [
        TextColumn("{task.description:<20}"),
        BarColumn(bar_width=16 if width >= _WIDTH_WITH_ELAPSED else 6),
        MofNCompleteColumn(),
    ]
    if width >= _WIDTH_WITH_ELAPSED:
        columns.append(TimeElapsedColumn())
    columns += [TextColumn("left"), TimeRemainingColumn()]
    if width >= _WIDTH_WITH_METRICS:
        columns.append(TextColumn("{task.fields[metrics]}", style="dim"))
    return columns


def terminal_width() -> int:
    """Return how many characters a line of stdout holds."""
    console = Console()
    return console.width if console.is_terminal else _WIDTH_WITHOUT_TERMINAL


def timestamp() -> str:
    """Return the time in ISO 8601 to the second, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _title(progress: Progress) -> str:
    return _STAGES.get(progress.stage, progress.stage)


def _metrics(progress: Progress) -> str:
    if progress.note:
        return progress.note
    return "  ".join(f"{name} {value:.3g}" for name, value in progress.metrics.items())
