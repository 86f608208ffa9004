"""What a command found -> text or one JSON object on stdout; notes, warnings and errors on stderr."""

import errno
import json
import logging
import os
import re
import signal
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from qimera.cli.arguments import OutputOptions
from qimera.cli.console import ProgressDisplay, terminal_width, timestamp
from qimera.errors import QimeraError

if TYPE_CHECKING:
    import pydantic

INTERRUPTED = 130
USAGE = 2
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""The disk is full, or the user's share of it, or a file has reached the size that is allowed."""


class Output:
    """Where a command says what it found."""

    def __init__(self, options: OutputOptions) -> None:
        self._options = options
        self._values: dict[str, object] = {}
        self._console = Console(stderr=True)

    def result(self, values: "pydantic.BaseModel", *shown: str | Table, warnings: Iterable[str] = ()) -> None:
        """Print what was found; with ``--json``, keep ``values`` in place of earlier ones until the command ends.

        Args:
            values: The object that ``--json`` prints.
            shown: The same for a person.
            warnings: Those that are a part of ``shown``; with ``--json`` they are printed like all others.
        """
        self._values = values.model_dump(mode="json", exclude={"error"})
        if self._options.as_json:
            self.warn(warnings)
            return
        for each in shown:
            if isinstance(each, Table):
                Console(width=terminal_width()).print(each)
            else:
                typer.echo(each, nl=False)

    def note(self, text: str) -> None:
        """Say what is being done, with the time where no person is watching; nothing with ``--quiet``."""
        if not self._options.quiet:
            typer.echo(text if self._console.is_terminal else f"{timestamp()} {text}", err=True)

    def hint(self, text: str) -> None:
        """Say what a person may want next; nothing with ``--quiet`` or ``--json``."""
        if not self._options.quiet and not self._options.as_json:
            typer.echo(text, err=True)

    def warn(self, warnings: Iterable[str]) -> None:
        """Print warnings, one a line."""
        for warning in warnings:
            typer.echo(f"warning: {warning}", err=True)

    def progress(self, shown: bool = True) -> ProgressDisplay:
        """Return a display of progress, which shows nothing with ``--quiet``.

        Args:
            shown: Whether this process shows anything; of several processes only one does.
        """
        return ProgressDisplay(shown and not self._options.quiet)

    def close(self, error: dict[str, object] | None) -> None:
        """Print the one JSON object, if it was asked for and this is the process that speaks for all."""
        if self._options.as_json and os.environ.get("RANK", "0") == "0":
            typer.echo(json.dumps({**self._values, "error": error}, indent=2))


@contextmanager
def speaking(options: OutputOptions, if_interrupted: str = "") -> Iterator[Output]:
    """Yield where a command says what it found, and turn errors that the user can mend into a message and an exit code.

    Args:
        options: How to talk.
        if_interrupted: What to do after Ctrl-C, or after a request to terminate.
    """
    output, debug = Output(options), options.debug
    try:
        level = logging.DEBUG if debug else logging.WARNING
        with _terminating_as_interrupted(), _log_to_stderr(level), warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")  # what torch and torchao say to developers
            yield output
    except QimeraError as error:
        if error.is_told:
            raise typer.Exit(error.exit_code) from None
        _fail(output, type(error).__name__, _naming_option(str(error)), error.exit_code, debug)
    except OSError as error:
        message = ": ".join(filter(None, (str(error.filename or ""), error.strerror or str(error))))
        advice = "; make room, then give the same command again" if error.errno in _NO_ROOM else ""
        _fail(output, "OSError", message + advice, USAGE, debug)
    except KeyboardInterrupt:
        with without_interrupts():
            message = "; ".join(filter(None, ("interrupted", if_interrupted)))
            _fail(output, "KeyboardInterrupt", message, INTERRUPTED, debug)
    output.close(None)


@contextmanager
def _terminating_as_interrupted() -> Iterator[None]:
    """Let a request to terminate end this process as Ctrl-C does, so that no half-written file stays.

    Of several processes each goes on to end at once, since it would wait for the others.
    """
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) < 2 and threading.current_thread() is threading.main_thread()
    if not is_alone or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C, which an impatient user presses more than once while the process is already ending."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _naming_option(message: str) -> str:
    """Call the setting that an error begins with as the command line calls it, where it is an option of its own."""
    return _OPTION.sub(lambda found: "--" + found[1].replace("_", "-"), message)


_OPTION = re.compile(r"^(?:QuantizationSettings: )?(bits|layer_bits|first_last_bits|budget|recipe)(?=: )")


def _fail(output: Output, kind: str, message: str, exit_code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    typer.echo(f"qimera: {message}", err=True)
    output.close({"kind": kind, "message": message, "exit_code": exit_code})
    raise typer.Exit(exit_code) from None


class _LogLines(logging.Handler):
    """Writes records as lines with the time."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(f"{timestamp()} {record.levelname.lower()}: {self.format(record)}", err=True)


@contextmanager
def _log_to_stderr(level: int) -> Iterator[None]:
    """Show the library's log on stderr."""
    console = Console(stderr=True)
    handler = RichHandler(console=console, show_path=False) if console.is_terminal else _LogLines()
    logger = logging.getLogger("qimera")
    level_before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level_before)
