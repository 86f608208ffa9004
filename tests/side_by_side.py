"""Two processes that find each other as those of ``torchrun`` do, forked from one that has loaded what they need.

    python -m tests.side_by_side ARGUMENTS

gives both of them the command line of qimera, lets an interrupt reach both, and ends with the larger exit code.
"""

import importlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable

import torch

from qimera.cli.app import app
from qimera.teacher.sources import load_model
from qimera.teacher.teacher import Teacher
from tests.command_line import SMALL, tiny_settings

NUM_PROCESSES = 2


def started(function: Callable[[], object]) -> list[int]:
    """Return the numbers of processes that call ``function`` side by side."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(NUM_PROCESSES):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_PROCESSES)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os._exit(_exit_code(function))
        children.append(child)
    return children


def ended(children: list[int]) -> int:
    """Wait for the processes; return the largest exit code, which is negative only where a signal ended all."""
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def load_what_a_run_needs() -> None:
    """Import what commands import, and capture a network, which is when PyTorch loads most of itself."""
    torch.set_num_threads(1)
    for name in ("qimera.cli.options", "qimera.runs.reporting", "qimera.runs.execution"):
        importlib.import_module(name)
    Teacher.capture(load_model(SMALL), tiny_settings().input)


def _exit_code(function: Callable[[], object]) -> int:
    try:
        function()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def main() -> None:
    """Run the command line twice."""
    load_what_a_run_needs()
    children = started(app)

    def interrupt(*_: object) -> None:
        for child in children:
            os.kill(child, signal.SIGINT)

    signal.signal(signal.SIGINT, interrupt)
    sys.exit(abs(ended(children)))


if __name__ == "__main__":
    main()
