"""Runs that are interrupted or killed and go on: bit for bit what they would have been."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qimera.config.settings import DirectSettings, DistillationSettings, SynthesisSettings
from qimera.machine import checkpoint
from qimera.machine.progress import Progress, silent
from qimera.pipeline import quantize, synthesize
from qimera.runs.directory import RunDirectory
from qimera.runs.execution import carry_out
from qimera.synthesis.bank import SampleBank
from qimera.teacher.teacher import Teacher
from tests.command_line import tiny_settings
from tests.forked import Forked, Starter
from tests.killed_runs import BEST_STEP, PLAIN, SYNTHESIS, WAYS, result, settings
from tests.networks import NUM_CLASSES, SPEC, Head


@pytest.fixture(scope="module", params=WAYS)
def ways(request: pytest.FixtureRequest) -> tuple[DistillationSettings, ...]:
    return request.param


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, small_teacher: Teacher, ways: tuple[DistillationSettings, ...]
) -> tuple[bytes, ...]:
    """What a run comes to that is not interrupted."""
    run = RunDirectory.start(tmp_path_factory.mktemp("whole") / "run", settings(ways))
    carry_out(run, small_teacher, None, silent)
    return result(run.path)


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN", 0.0)


@dataclass
class Stop:
    """Interrupts at one step, and remembers what it was told."""

    stage: str = ""
    step: int = 0
    seen: list[tuple[str, int]] = field(default_factory=list)

    def __call__(self, progress: Progress) -> None:
        self.seen.append((progress.stage, progress.step))
        if self.seen[-1] == (self.stage, self.step):
            raise KeyboardInterrupt


@pytest.mark.usefixtures("every_step")
def test_an_interrupted_run_goes_on_at_its_last_step_and_comes_to_the_same(
    tmp_path: Path, small_teacher: Teacher, ways: tuple[DistillationSettings, ...], whole: tuple[bytes, ...]
) -> None:
    """Interrupted again and again: while it trains the generator, makes the first and a later part, and the student."""
    path, again = tmp_path / "run", Stop()
    for stage, step, goes_on_at in [("generator", 4, 1), ("direct", 3, 0), ("direct", 14, 2), ("distillation", 20, 0)]:
        stop = Stop(stage, step)
        with pytest.raises(KeyboardInterrupt):
            carry_out(RunDirectory.start(path, settings(ways)), small_teacher, None, stop)
        assert next(number for name, number in stop.seen if name == stage) == goes_on_at
    run = RunDirectory.start(path, settings(ways))
    carry_out(run, small_teacher, None, again)
    assert again.seen[0] == ("distillation", 19)
    assert result(path) == whole
    assert not run.checkpoints_directory.exists()
    recorded = [(line["part"], line["stage"], line["step"]) for line in run.metrics.lines()]
    assert len(set(recorded)) == len(recorded)
    assert [number for _, name, number in recorded if name == "direct"] == list(range(19))


@pytest.mark.usefixtures("every_step")
def test_a_student_that_is_finished_is_not_made_again(tmp_path: Path, small_teacher: Teacher) -> None:
    asked = settings((BEST_STEP, PLAIN))
    carry_out(RunDirectory.start(tmp_path / "whole", asked), small_teacher, None, silent)
    run, first = RunDirectory.start(tmp_path / "run", asked), Stop()

    def stop_in_the_second(progress: Progress) -> None:
        first(progress)
        if first.seen.count(("ranges", 0)) + first.seen.count(("rounding", 0)) == 2:  # one for each student
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(run, small_teacher, None, stop_in_the_second)
    again = Stop()
    carry_out(RunDirectory.start(run.path, asked), small_teacher, None, again)
    assert [number for name, number in again.seen if name == "distillation"] == [24, 0, 10, 20, 24]
    assert result(run.path) == result(tmp_path / "whole")


@pytest.mark.usefixtures("every_step")
def test_calls_from_python_go_on_too(tmp_path: Path, small_teacher: Teacher) -> None:
    asked = SynthesisSettings(num_optimized=32, direct=DirectSettings(num_steps=6, batch_size=16))
    bank = synthesize(small_teacher, settings=asked)
    student = quantize(small_teacher, bank, settings=PLAIN)
    with pytest.raises(KeyboardInterrupt):
        synthesize(small_teacher, settings=asked, checkpoints=tmp_path / "a", progress=Stop("direct", 9))
    again = Stop()
    other_bank = synthesize(small_teacher, settings=asked, checkpoints=tmp_path / "a", progress=again)
    assert again.seen[0] == ("direct", 8)
    assert torch.equal(other_bank.pixels, bank.pixels)
    with pytest.raises(KeyboardInterrupt):
        quantize(small_teacher, bank, settings=PLAIN, checkpoints=tmp_path / "b", progress=Stop("distillation", 10))
    resumed = quantize(small_teacher, other_bank, settings=PLAIN, checkpoints=str(tmp_path / "b"))
    assert states_equal(resumed.module, student.module)


class Clamping(nn.Module):
    """Two convolutions with ReLU6 between them, whose channels differ tenfold."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 8, 3, groups=8), Head(8)
        with torch.no_grad():
            self.norm.weight.copy_(torch.logspace(-0.7, 0.3, 8))
            self.second.weight /= self.norm.weight.view(-1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(F.relu6(self.norm(self.first(x)))))


@pytest.mark.usefixtures("every_step")
def test_a_student_whose_teachers_channels_are_scaled_goes_on(tmp_path: Path) -> None:
    """Scaled channels have clamps of their own, which a teacher that is captured anew has not."""
    torch.manual_seed(0)
    teacher = Teacher.capture(Clamping().eval(), SPEC)
    labels = torch.full((32, NUM_CLASSES), 1 / NUM_CLASSES)
    bank = SampleBank.from_images(torch.randn(32, *SPEC.shape), labels, teacher, SynthesisSettings(), 0)
    asked = PLAIN.model_copy(update={"start": "compensated"})
    student = quantize(teacher, bank, settings=asked)
    assert "limit_of_relu6" in student.reference.state_dict()
    with pytest.raises(KeyboardInterrupt):
        quantize(teacher, bank, settings=asked, checkpoints=tmp_path, progress=Stop("distillation", 10))
    again = Stop()
    resumed = quantize(teacher, bank, settings=asked, checkpoints=tmp_path, progress=again)
    assert next(number for stage, number in again.seen if stage == "distillation") == 9
    assert states_equal(resumed.module, student.module)


def states_equal(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[1])


@pytest.mark.usefixtures("every_step")
def test_nothing_of_another_seed_is_taken_up(tmp_path: Path, small_teacher: Teacher) -> None:
    with pytest.raises(KeyboardInterrupt):
        synthesize(small_teacher, settings=SYNTHESIS, seed=1, checkpoints=tmp_path, progress=Stop("direct", 8))
    kept = synthesize(small_teacher, settings=SYNTHESIS, seed=2, checkpoints=tmp_path)
    assert torch.equal(kept.pixels, synthesize(small_teacher, settings=SYNTHESIS, seed=2).pixels)


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, small_teacher: Teacher, starter: Starter) -> None:
    """The command itself, in a process of its own."""
    long = tiny_settings(distillation=DistillationSettings(num_steps=100_000, batch_size=8, compile="never"))
    long.save(tmp_path / "long.json")
    arguments = ["quantize", "--settings", "long.json", "--output", "run"]
    process = Forked(starter, tmp_path, "tests.side_by_side:command", arguments, processes=1)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"step": 20,' in metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.interrupt()
    code, said = process.end()
    assert code == 130
    assert "saving after this step" in said
    assert "interrupted; the same command continues with what is in run" in said
    kept = torch.load(tmp_path / "run" / "checkpoints" / "student-0" / "student.pt", weights_only=True)
    assert kept["state"]["num_steps"] >= 20
    SampleBank.load(tmp_path / "run" / "bank", small_teacher)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_runs_that_are_killed_come_to_the_same(tmp_path: Path, kills: int, starter: Starter) -> None:
    arguments = [str(kills), "0", str(tmp_path)]
    code, said = Forked(starter, tmp_path, "tests.killed_runs:main", arguments, processes=1).end()
    assert code == 0, said
    found = json.loads(said.splitlines()[-1])
    assert found["killed"] == kills
    assert found["equal"] == found["finished"] >= 1
