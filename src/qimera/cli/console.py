"""What the command line shows a person: progress with the time left, tables, and errors as one message."""

import errno
import logging
import signal
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler
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
from rich.table import Table

from qimera.errors import QimeraError
from qimera.machine.progress import Progress

INTERRUPTED = 130
USAGE = 2
_SECONDS_BETWEEN_LINES = 5.0
_WIDTH_WITHOUT_TERMINAL = 120
_STAGES = {
    "generator": "train the generator",
    "direct": "optimise images",
    "sensitivity": "measure layers",
    "ranges": "search ranges",
    "rounding": "find integers",
    "distillation": "train the student",
    "evaluation": "evaluate",
}


class ProgressDisplay:
    """Shows each stage on stderr: a live bar in a terminal, a line every few seconds anywhere else.

    An instance is the ``ProgressCallback`` to pass on; use it as a context manager.

    Args:
        shown: Whether to show anything; of several processes one does.
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
        typer.echo("  ".join(filter(None, (*facts, _metrics(progress)))), err=True)


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


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""The disk is full, or the user's share of it, or a file has reached the size that is allowed."""


@contextmanager
def errors_as_messages(debug: bool, if_interrupted: str = "") -> Iterator[None]:
    """Turn an error that the user can mend into one message on stderr and its exit code.

    Args:
        debug: Show the traceback too.
        if_interrupted: What to do after Ctrl-C.
    """
    try:
        with _log_to_stderr(logging.DEBUG if debug else logging.WARNING), warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")  # what torch and torchao say to developers
            yield
    except QimeraError as error:
        if error.is_told:
            raise typer.Exit(error.exit_code) from None
        _fail(str(error), error.exit_code, debug)
    except OSError as error:
        message = ": ".join(filter(None, (str(error.filename or ""), error.strerror or str(error))))
        advice = "; make room, then give the same command again" if error.errno in _NO_ROOM else ""
        _fail(message + advice, USAGE, debug)
    except KeyboardInterrupt:
        with without_interrupts():
            _fail("; ".join(filter(None, ("interrupted", if_interrupted))), INTERRUPTED, debug)


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C, which an impatient user presses more than once while the process is already ending."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _fail(message: str, exit_code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    typer.echo(f"qimera: {message}", err=True)
    raise typer.Exit(exit_code) from None


@contextmanager
def _log_to_stderr(level: int) -> Iterator[None]:
    """Show the library's log on stderr."""
    logger, handler = logging.getLogger("qimera"), RichHandler(console=Console(stderr=True), show_path=False)
    level_before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level_before)


def warn(warnings: Iterable[str]) -> None:
    """Print warnings on stderr, one a line."""
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)


def print_table(table: Table) -> None:
    """Print a table on stdout, wide enough for pipes and files too."""
    Console(width=terminal_width()).print(table)


def terminal_width() -> int:
    """Return how many characters a line of stdout holds."""
    console = Console()
    return console.width if console.is_terminal else _WIDTH_WITHOUT_TERMINAL


def _title(progress: Progress) -> str:
    return _STAGES.get(progress.stage, progress.stage)


def _metrics(progress: Progress) -> str:
    if progress.note:
        return progress.note
    return "  ".join(f"{name} {value:.3g}" for name, value in progress.metrics.items())
