"""Disks that are full and folders that may not be written to: a message that names the file, and nothing is lost."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qimera.config.run_settings import RunSettings
from qimera.machine.progress import Progress, silent
from qimera.runs.directory import RunDirectory
from qimera.runs.execution import carry_out, load_bank
from qimera.synthesis.formats import write_bank
from qimera.teacher.teacher import Teacher
from tests.command_line import qimera, said, tiny_settings
from tests.killed_runs import PLAIN, result, settings


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """Let no file grow beyond ``num_bytes``: the operating system refuses writes as it does when a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def asked() -> RunSettings:
    return settings((PLAIN,))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small_teacher: Teacher, asked: RunSettings) -> RunDirectory:
    run = RunDirectory.start(tmp_path_factory.mktemp("whole") / "run", asked)
    carry_out(run, small_teacher, None, silent)
    return run


@pytest.mark.parametrize(
    ("stage", "step", "file"),
    [
        ("generator", 1, "metrics.jsonl"),
        ("direct", 18, "bank/"),
        ("distillation", 24, "student.pt"),
    ],
)
def test_a_run_on_a_disk_that_fills_up_stops_and_goes_on_when_there_is_room(
    tmp_path: Path, small_teacher: Teacher, asked: RunSettings, whole: RunDirectory, stage: str, step: int, file: str
) -> None:
    """Full from one step on, so that the next thing to be written is a line of metrics, the bank, or a student."""
    run = RunDirectory.start(tmp_path / "run", asked)

    def fill(progress: Progress) -> None:
        if (progress.stage, progress.step) == (stage, step):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    with room_for(unlimited), pytest.raises(OSError, match="File too large") as caught:
        carry_out(run, small_teacher, None, fill)
    assert file in f"{caught.value.filename}/"
    assert not list(run.path.rglob("*.partial*"))
    carry_out(RunDirectory.start(run.path, asked), small_teacher, None, silent)
    assert result(run.path) == result(whole.path)


def test_the_command_says_which_file_and_what_to_do(tmp_path: Path) -> None:
    tiny_settings().save(tmp_path / "tiny.json")
    command = ("quantize", "--settings", tmp_path / "tiny.json", "--output", tmp_path / "run")
    with room_for(5_000):
        full = qimera(*command)
    assert full.exit_code == 2
    assert "run/teacher.safetensors: File too large; make room, then give the same command again" in said(full)
    assert [each.name for each in (tmp_path / "run").iterdir()] == ["settings.json"]
    assert qimera(*command).exit_code == 0


@pytest.mark.parametrize("form", ["bank", "npz", "imagefolder", "safetensors"])
def test_half_a_bank_is_never_left(tmp_path: Path, small_teacher: Teacher, whole: RunDirectory, form: str) -> None:
    bank = load_bank(whole, small_teacher)
    with room_for(200), pytest.raises(OSError, match="File too large") as caught:
        write_bank(bank, tmp_path / "bank", form)  # type: ignore[arg-type]
    assert str(caught.value.filename).startswith(str(tmp_path / "bank"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["quantize", "synthesize"])
def test_a_place_that_is_for_reading_only_is_refused_before_the_work(command: str) -> None:
    """Not even the superuser may make folders in /sys."""
    result = qimera(command, "mnist_cnn", "--output", "/sys/qimera/result")
    assert result.exit_code == 2
    assert "qimera: /sys/qimera: " in said(result)
    assert "samples" not in said(result)
