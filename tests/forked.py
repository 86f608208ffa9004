"""Processes of their own for tests, forked by ``side_by_side`` from one that has loaded PyTorch."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}

Starter = subprocess.Popen[str]


@contextmanager
def loaded_process() -> Iterator[Starter]:
    """Yield the process that others are forked from."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.side_by_side"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, text=True, **pipes) as process:
        yield process


class Forked:
    """Processes that call ``function`` side by side; an interrupt reaches each of them, as from a terminal."""

    def __init__(self, starter: Starter, folder: Path, function: str, arguments: list[str], processes: int = 2) -> None:
        self._starter, self._errors = starter, folder / f"errors-{time.monotonic_ns()}"
        request = {"function": function, "arguments": arguments, "processes": processes}
        assert starter.stdin is not None
        starter.stdin.write(json.dumps({**request, "folder": str(folder), "errors": str(self._errors)}) + "\n")
        starter.stdin.flush()
        assert starter.stdout is not None
        self.workers: list[int] = json.loads(starter.stdout.readline())

    def interrupt(self) -> None:
        for worker in self.workers:
            os.kill(worker, signal.SIGINT)

    def end(self) -> tuple[int, str]:
        """Return the exit code, and what was said."""
        assert self._starter.stdout is not None
        return int(self._starter.stdout.readline()), self._errors.read_text()


def said_by(starter: Starter, folder: Path, function: str, arguments: list[str], processes: int = 1) -> str:
    """Return what processes print that must not fail."""
    code, said = Forked(starter, folder, function, arguments, processes).end()
    assert code == 0, said
    return said
