"""What an interrupted loop needs to go on where it was: its state on disk, after a step, whole or absent.

A loop that goes on comes to the same result, bit for bit on the CPU, as one that was never interrupted.
"""

import hashlib
import io
import logging
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qimera.errors import PeerError
from qimera.machine.distributed import from_main, is_main
from qimera.machine.files import check_folder, replacing
from qimera.machine.weights_file import allowing_only, is_tape

logger = logging.getLogger(__name__)

State = dict[str, Any]
"""Tensors, numbers, strings, lists and dictionaries of them: what ``torch.load`` reads without executing anything."""

SECONDS_BETWEEN = 30.0
"""Most that an interrupted loop has to do again."""


class Checkpoints:
    """The checkpoints of one result that is made in several loops.

    Args:
        directory: Where they are kept; None keeps none. It is made when there is something to keep.
        belongs_to: Everything that determines the result; checkpoints of other runs are ignored.
    """

    def __init__(self, directory: Path | str | None = None, *belongs_to: object) -> None:
        self.directory = None if directory is None else Path(directory)
        if self.directory is not None:
            check_folder(self.directory)
        self._owner = hashlib.sha256(repr(belongs_to).encode()).hexdigest()

    def of(self, name: str, *, is_shared: bool = True) -> "Checkpoint":
        """Return the checkpoint of the loop called ``name``.

        One that all processes run together is shared: the main process keeps it for all of them.
        """
        return Checkpoint(self.directory and self.directory / f"{name}.pt", self._owner, is_shared=is_shared)

    def forget(self) -> None:
        """Remove them all: the result is safe."""
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)


class Checkpoint:
    """The state of one loop; ``Checkpoint()`` keeps nothing."""

    def __init__(self, path: Path | None = None, owner: str = "", *, is_shared: bool = True) -> None:
        self._path, self._owner, self._is_shared = path, owner, is_shared
        self._saved_at = time.monotonic()
        self._interrupted = False

    def load(self) -> State:
        """Return the state that was saved last; empty if there is none, or one that is damaged or of something else."""
        if self._path is None:
            return {}
        return from_main(self._read) if self._is_shared else self._read()

    def _read(self) -> State:
        assert self._path is not None
        if not self._path.exists():
            return {}
        try:
            if is_tape(self._path):
                raise ValueError("a tape archive")
            with allowing_only([]):
                kept = torch.load(self._path, map_location="cpu", weights_only=True)
            if kept["owner"] == self._owner:
                return dict(kept["state"])
            logger.warning("%s: of other settings or another model; starting anew", self._path)
        except Exception as error:  # whatever a damaged file makes torch.load raise
            logger.warning("%s: damaged (%s); starting anew", self._path, type(error).__name__)
        return {}

    def save(self, state: State) -> None:
        """Write the state.

        Raises:
            KeyboardInterrupt: the loop was interrupted while ``guarding``; the state is safe now.
        """
        if self._path is None or not self._is_kept_here():
            return
        with replacing(self._path) as temporary:
            content = io.BytesIO()  # for torch.save itself turns a full disk into an internal error
            torch.save({"owner": self._owner, "state": state}, content)
            temporary.write_bytes(content.getbuffer())
        self._saved_at = time.monotonic()
        if self._interrupted:
            raise KeyboardInterrupt

    def after_step(self, state: Callable[[], State]) -> None:
        """Save if it is time to, or if the loop was interrupted; after the last step the owner saves what came out.

        Raises:
            KeyboardInterrupt: as ``save``.
        """
        if not self._is_kept_here():
            return  # and goes on: the main process saves and ends, and then this one notices
        if self._path is not None and (self._interrupted or time.monotonic() - self._saved_at >= SECONDS_BETWEEN):
            self.save(state())

    def _is_kept_here(self) -> bool:
        return is_main() or not self._is_shared

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """Let Ctrl-C and a request to terminate wait for the end of a step; the second one acts at once."""
        if self._path is None or threading.current_thread() is not threading.main_thread():
            yield
            return
        # A shell lets its background jobs ignore Ctrl-C, and what is ignored stays so.
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

        def ask(*_: object) -> None:
            self._interrupted = True
            restore()
            logger.warning("interrupted: saving after this step; once more to stop at once")

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        except PeerError as error:
            if self._interrupted:
                raise KeyboardInterrupt from error  # the others were interrupted too
            raise
        finally:
            restore()
