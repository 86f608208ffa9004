"""Kills runs at random moments until each is finished; forked by test_interruption.py.

    python -m tests.killed_runs KILLS SEED FOLDER

Prints one line of JSON: how often a run was killed, and how many came to the same files as one that was not.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from qimera.config.run_settings import RunSettings
from qimera.config.settings import DirectSettings, DistillationSettings, GeneratorSettings, SynthesisSettings
from qimera.machine import checkpoint
from qimera.machine.progress import silent
from qimera.runs.directory import RunDirectory
from qimera.runs.execution import carry_out
from qimera.teacher.sources import load_model
from qimera.teacher.teacher import Teacher
from tests.command_line import SMALL, tiny_settings

SYNTHESIS = SynthesisSettings(
    num_generated=16,
    num_optimized=32,
    num_held_out=8,
    generator=GeneratorSettings(num_steps=6, batch_size=16, base_channels=8, mapping_dim=8),
    direct=DirectSettings(num_steps=6, batch_size=16, start="generator"),
)
PLAIN = DistillationSettings(num_steps=24, batch_size=8)
BESIDE_GENERATOR = DistillationSettings(num_steps=24, batch_size=8, fresh_share=0.25, generator_steps_per_step=1)
BEST_STEP = DistillationSettings(num_steps=24, batch_size=8, start="compensated", select_every=8)
PAPER = DistillationSettings(num_steps=24, batch_size=8, optimizer="sgd", weight_learning_rate=1e-3, momentum=0.9)
WAYS = [(PLAIN,), (BESIDE_GENERATOR,), (BEST_STEP, PLAIN), (PAPER,)]
"""Everything that a training keeps from step to step."""


def settings(ways: Sequence[DistillationSettings]) -> RunSettings:
    """Return those of a run that makes generator, images, and a student in each of these ways."""
    recipes = ",".join("abcd"[: len(ways)])
    return tiny_settings(recipe=recipes, synthesis=SYNTHESIS, distillation=ways[0], alternatives=tuple(ways[1:]))


def start(path: Path, teacher: Teacher, ways: Sequence[DistillationSettings]) -> int:
    """Start or continue the run in a process of its own; return its number."""
    child = os.fork()
    if child == 0:
        try:
            carry_out(RunDirectory.start(path, settings(ways)), teacher, None, silent)
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
    return child


def ended(child: int) -> bool:
    """Return whether the process is done; fail if it failed."""
    number, status = os.waitpid(child, os.WNOHANG)
    if number and os.waitstatus_to_exitcode(status) > 0:
        raise SystemExit("a run failed")
    return bool(number)


def result(path: Path) -> tuple[bytes, ...]:
    """Return what a run came to."""
    names = ("student.safetensors", "bank/samples-00000.safetensors", "bank/generator.safetensors")
    return tuple((path / name).read_bytes() for name in names)


def main(arguments: list[str]) -> None:
    """Kill as often as was asked for."""
    kills, seed, folder = int(arguments[0]), int(arguments[1]), Path(arguments[2])
    torch.set_num_threads(1)
    checkpoint.SECONDS_BETWEEN = 0.0  # most of the time goes into writing
    teacher = Teacher.capture(load_model(SMALL), settings(WAYS[0]).input)
    tried = WAYS if kills >= 10 else WAYS[1:2]
    durations, expected = [], []
    for number, ways in enumerate(tried):
        begun, path = time.monotonic(), folder / f"whole-{number}"
        os.waitpid(start(path, teacher, ways), 0)
        durations.append(time.monotonic() - begun)
        expected.append(result(path))
    moments, killed, finished, equal, is_open = random.Random(seed), 0, 0, 0, True
    while killed < kills or is_open:
        path = folder / str(finished)
        child = start(path, teacher, tried[finished % len(tried)])
        deadline = time.monotonic() + (moments.uniform(0, durations[finished % len(tried)]) if killed < kills else 300)
        while (is_open := not ended(child)) and time.monotonic() < deadline:
            time.sleep(0.001)
        if is_open:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            killed += 1
        else:
            left = [each.name for each in path.iterdir() if "partial" in each.name or each.name == "checkpoints"]
            equal += result(path) == expected[finished % len(tried)] and not left
            finished += 1
    print(json.dumps({"killed": killed, "finished": finished, "equal": equal}))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
