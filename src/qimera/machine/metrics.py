"""The steps of a run as lines of JSON: which stage, how far, how long, and its losses."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qimera.errors import ConfigError
from qimera.machine.files import naming
from qimera.machine.progress import Progress, ProgressCallback

Line = dict[str, Any]


class Metrics:
    """``metrics.jsonl`` of one run; each step belongs to a stage, and each stage to a part of the run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[Line]:
        """Return the recorded steps, oldest first, without one that was cut off when the process was killed."""
        if not self.path.exists():
            return []
        return [found for line in self._text().splitlines() if (found := _parse(line))]

    def _text(self) -> str:
        return self.path.read_text(encoding="utf-8", errors="replace")

    def seconds(self, part: str) -> float | None:
        """Return how long a part took, to its last recorded step; None if none is recorded."""
        found = [float(line["seconds"]) for line in self.lines() if line["part"] == part]
        return found[-1] if found else None

    @contextmanager
    def recording(self, part: str, also: ProgressCallback) -> Iterator[ProgressCallback]:
        """Yield a callback that appends one line per step and then calls ``also``.

        A stage that goes on after an interruption takes the place of the lines of the steps that it does again.

        Raises:
            ConfigError: the file is a link to another one.
        """
        if self.path.is_symlink():
            raise ConfigError(f"{self.path}: is a link, and nothing is written outside of a run; replace or remove it")
        start, stages = time.monotonic() - (self.seconds(part) or 0.0), set[str]()
        with self.path.open("ab", buffering=0) as file:
            self._forget(lambda line: False)  # but for what was cut off

            def record(progress: Progress) -> None:
                if progress.stage not in stages:
                    stages.add(progress.stage)
                    self._forget(
                        lambda line: (
                            (line["part"], line["stage"]) == (part, progress.stage) and line["step"] >= progress.step
                        )
                    )
                line = {
                    "part": part,
                    "stage": progress.stage,
                    "step": progress.step,
                    "total": progress.total,
                    "seconds": round(time.monotonic() - start, 3),
                    **progress.metrics,
                }
                with naming(self.path):
                    file.write(f"{json.dumps(line)}\n".encode())
                also(progress)

            yield record

    def _forget(self, is_outdated: Callable[[Line], bool]) -> None:
        """Remove lines; the file stays the same one, for it is open at its end."""
        kept = [line for line in self.lines() if not is_outdated(line)]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        if text != self._text():
            self.path.write_text(text, encoding="utf-8")


def _parse(line: str) -> Line | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not found.keys() >= KEYS:
        return None
    are_numbers = all(type(found[key]) in (int, float) for key in ("step", "total", "seconds"))
    return found if are_numbers and isinstance(found["part"], str) and isinstance(found["stage"], str) else None


KEYS = {"part", "stage", "step", "total", "seconds"}
"""What every line has; the rest are losses."""
