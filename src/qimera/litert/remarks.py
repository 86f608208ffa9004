"""What LiteRT's libraries write to stderr, for which they have no switch -> lines that can be read or forgotten."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def held_back() -> Iterator[Callable[[], list[str]]]:
    """Keep what C++ writes to stderr from the screen, and yield a function that returns its lines."""
    if sys.stderr is not None:
        sys.stderr.flush()
    kept = _stderr()
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)

        def said() -> list[str]:
            file.seek(0)
            return [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]

        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _stderr() -> int:
    """Return a copy of what is open as stderr; of nothing that can be read where it is closed, as in some services."""
    try:
        return os.dup(2)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)
