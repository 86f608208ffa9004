"""Processes that find each other as those of ``torchrun`` do, forked from one that has loaded what they need.

    python -m tests.side_by_side

reads a line of JSON for each start: the ``function`` that every process calls, as MODULE:NAME, the list of its
``arguments``, the number of ``processes``, the ``folder`` that they work in, and the file that gets what they print, as
``errors``. It answers with the numbers of the processes, and once all have ended with the largest exit code.
"""

import contextlib
import importlib
import json
import os
import runpy
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import run
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from qimera.teacher.sources import load_model
from qimera.teacher.teacher import Teacher
from tests.command_line import SMALL, tiny_settings


def started(request: dict[str, Any]) -> list[int]:
    """Return the numbers of processes that call the function side by side."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    module, _, name = request["function"].partition(":")
    function = getattr(importlib.import_module(module), name)
    children = []
    for rank in range(request["processes"]):
        child = os.fork()
        if child == 0:
            if request["processes"] > 1:
                world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["processes"]}
                os.environ |= {key: str(value) for key, value in world.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.chdir(request["folder"])
            errors = os.open(request["errors"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(errors, 1)
            os.dup2(errors, 2)
            os._exit(_exit_code(function, request["arguments"]))
        children.append(child)
    return children


def ended(children: list[int]) -> int:
    """Wait for the processes; return the largest exit code, which is negative only where a signal ended all."""
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def load_what_a_run_needs() -> None:
    """Import what commands import, and capture a network, which is when PyTorch loads most of itself."""
    torch.set_num_threads(1)
    for name in ("qimera.cli.app", "qimera.cli.options", "qimera.runs.reporting", "qimera.runs.execution"):
        importlib.import_module(name)
    Teacher.capture(load_model(SMALL), tiny_settings().input)


def command(arguments: list[str]) -> None:
    """Run the command line as ``python -m qimera`` does."""
    sys.argv = ["qimera", *arguments]
    importlib.import_module("qimera.cli.app").main()


def program(arguments: list[str]) -> None:
    """Run a module as ``python -m`` does."""
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def script(arguments: list[str]) -> None:
    """Run code as ``python -c`` does."""
    sys.argv = ["-c", *arguments[1:]]
    exec(arguments[0], {"__name__": "__main__"})


def torchrun(arguments: list[str]) -> None:
    """Run the command line as ``torchrun`` does with these arguments, in forked processes instead of new ones."""

    def forking(config: LaunchConfig, entrypoint: str) -> Callable[..., object]:
        config.start_method, config.monitor_interval = "fork", 0.01
        return lambda *words: elastic_launch(config, _without_exit)(*words[words.index("qimera") + 1 :])

    run.elastic_launch = forking
    run.main(arguments)


def _without_exit(*arguments: str) -> None:
    """Run the command line; the launcher would wait for what a process returns that exits."""
    with contextlib.suppress(SystemExit):
        command(list(arguments))


def _exit_code(function: Callable[[list[str]], object], arguments: list[str]) -> int:
    try:
        function(arguments)
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
    """Start what is asked for, one after the other."""
    load_what_a_run_needs()
    for line in sys.stdin:
        children = started(json.loads(line))
        print(json.dumps(children), flush=True)  # noqa: T201
        print(ended(children), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
