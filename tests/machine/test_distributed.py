"""Two processes beside each other, as torchrun starts them or nearly so, against one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qimera.config.run_settings import RunSettings
from qimera.config.settings import DirectSettings, DistillationSettings, SynthesisSettings
from qimera.runs.directory import RunDirectory
from tests.command_line import tiny_settings
from tests.forked import ENVIRONMENT, Forked, Starter, said_by

TWO = ["--standalone", "--nproc-per-node", "2"]
TORCHRUN = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *TWO]
QIMERA = [*TORCHRUN, "-m", "qimera"]
STARTS = ["forked", pytest.param("torchrun", marks=pytest.mark.slow)]
"""Starts of the command line: processes that are forked when all is loaded cost a tenth."""

Results = dict[str, dict[str, Tensor]]


class Torchrun:
    """The same as ``torchrun`` starts them."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        command = [*QIMERA, *arguments]
        self._process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)

    @property
    def workers(self) -> list[int]:
        launcher = self._process.pid
        return [int(each) for each in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def end(self) -> tuple[int, str]:
        _, said = self._process.communicate(timeout=120)
        return self._process.returncode, said


@pytest.fixture(params=STARTS)
def start(request: pytest.FixtureRequest, starter: Starter, tmp_path: Path) -> Callable[[list[str]], Forked | Torchrun]:
    """Start the command line twice, in the folder of the test."""
    if request.param == "torchrun":
        return lambda arguments: Torchrun(tmp_path, arguments)
    return lambda arguments: Forked(starter, tmp_path, "qimera.cli.app:app", arguments)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, starter: Starter) -> tuple[Results, Results, Results]:
    """What one process comes to, and each of two."""
    folders = [tmp_path_factory.mktemp(name) for name in ("alone", "together")]
    for folder, count in zip(folders, (1, 2), strict=True):
        said_by(starter, folder, "tests.two_processes:write_into", [str(folder)], count)
    files = (folders[0] / "0.pt", folders[1] / "0.pt", folders[1] / "1.pt")
    one, two, three = (torch.load(file, weights_only=True) for file in files)
    return one, two, three


def test_every_process_has_the_same_bank_and_the_same_students(results: tuple[Results, Results, Results]) -> None:
    _, main, other = results
    for name, tensors in main.items():
        assert all(torch.equal(value, other[name][key]) for key, value in tensors.items()), name


def test_optimised_samples_are_those_of_one_process(results: tuple[Results, Results, Results]) -> None:
    alone, main, _ = results
    assert torch.equal(main["bank"]["pixels"], alone["bank"]["pixels"])
    assert torch.equal(main["bank"]["soft_labels"], alone["bank"]["soft_labels"])


@pytest.mark.parametrize("student", ["plain", "features"])
def test_a_student_learns_from_two_halves_what_it_learns_from_the_whole(
    results: tuple[Results, Results, Results], student: str
) -> None:
    """Gradients are summed in another order, and of Adam's first steps those of small gradients may turn by that."""
    alone, main, _ = results
    weights = [name for name, value in alone[student].items() if value.is_floating_point()]
    states = (alone["start"], alone[student], main[student])
    start, one, two = (torch.cat([state[name].flatten() for name in weights]) for state in states)
    assert float((one - two).norm() / (one - start).norm()) < 0.01


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory, starter: Starter) -> tuple[Results, Results]:
    """What each of two processes makes of samples of its own."""
    folder = tmp_path_factory.mktemp("starts")
    said_by(starter, folder, "tests.two_processes:write_starts_into", [str(folder)], 2)
    main, other = (torch.load(folder / f"{number}.pt", weights_only=True) for number in range(2))
    return main, other


@pytest.mark.parametrize("start", ["nearest", "compensated"])
def test_levels_and_scales_are_those_of_the_main_process(starts: tuple[Results, Results], start: str) -> None:
    """Where two kinds of processors, say, would find other zero points."""
    main, other = (each[start] for each in starts)
    assert main.keys() == other.keys()
    assert [name for name, value in main.items() if not torch.equal(value, other[name])] == []


def test_processes_draw_the_same_batches_even_if_their_starts_drew_others(starts: tuple[Results, Results]) -> None:
    main, _ = starts
    assert all(torch.equal(value, main["own seed"][name]) for name, value in main["one seed"].items())


def test_the_variance_of_parts_is_that_of_the_whole(starts: tuple[Results, Results]) -> None:
    values = torch.linspace(-1, 3, 6).square().view(3, 2)
    for each in starts:
        found = list(each["variances"].values())
        torch.testing.assert_close(found, [values.var(), values[:, :1].var()])


def settings(num_steps: int, **changes: object) -> RunSettings:
    synthesis = SynthesisSettings(num_optimized=32, num_held_out=8, direct=DirectSettings(num_steps=2, batch_size=16))
    distillation = DistillationSettings(num_steps=num_steps, batch_size=8, compile="never")
    return tiny_settings(synthesis=synthesis, distillation=distillation, **changes)


QUANTIZE = ["quantize", "--settings", "settings.json", "--output", "run"]


@pytest.mark.parametrize("way", STARTS)
def test_the_command_makes_one_run(tmp_path: Path, starter: Starter, way: str) -> None:
    """By default the launcher of torchrun forks its processes."""
    settings(6).save(tmp_path / "settings.json")
    if way == "torchrun":
        command = [*QIMERA, *QUANTIZE]
        said = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout
    else:
        said = said_by(starter, tmp_path, "tests.side_by_side:torchrun", [*TWO, "-m", "qimera", *QUANTIZE])
    assert said.count("estimate ") == 1
    run = RunDirectory.open(tmp_path / "run")
    assert run.summary().num_steps == 6
    steps = [(line["stage"], line["step"]) for line in run.metrics.lines()]
    assert len(steps) == len(set(steps))
    assert {each.name for each in run.path.iterdir()} == {
        *(
            "bank",
            "metrics.jsonl",
            "settings.json",
            "student.safetensors",
            "summary.json",
            "summary.txt",
            "teacher.safetensors",
        ),
        *("report.html", "report.json"),
    }


def test_too_many_processes_are_refused(tmp_path: Path, start: Callable[[list[str]], Forked | Torchrun]) -> None:
    few = DistillationSettings(num_steps=1, batch_size=1, compile="never")
    settings(1).model_copy(update={"distillation": few}).save(tmp_path / "settings.json")
    code, said = start(QUANTIZE).end()
    assert code != 0
    assert "batch_size: 1 samples cannot be shared by 2 processes" in said


def test_where_a_process_is_killed_all_stop_with_a_message_and_the_run_goes_on(
    tmp_path: Path, start: Callable[[list[str]], Forked | Torchrun]
) -> None:
    settings(100_000).save(tmp_path / "settings.json")
    metrics = tmp_path / "run" / "metrics.jsonl"

    def under_way() -> Forked | Torchrun:
        processes = start(QUANTIZE)
        deadline = time.monotonic() + 120
        while not (metrics.exists() and '"step": 20,' in metrics.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return processes

    processes = under_way()
    os.kill(processes.workers[-1], signal.SIGKILL)
    code, said = processes.end()
    assert code != 0
    assert "another process of this run has ended" in said
    assert (tmp_path / "run" / "bank").exists()
    metrics.unlink()
    processes = under_way()
    processes.interrupt()
    processes.end()
    stages = {json.loads(line)["stage"] for line in metrics.read_text().splitlines()}
    assert stages == {"ranges", "distillation"}  # the bank was not made again
    kept = torch.load(tmp_path / "run" / "checkpoints" / "student-0" / "student.pt", weights_only=True)
    assert kept["state"]["num_steps"] >= 20
