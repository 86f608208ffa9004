"""The programs beside the package start."""

import contextlib
import runpy
import sys
from pathlib import Path

import pytest

from benchmarks.queue.__main__ import Row, settings_of
from tests import shared

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "scripts", "tests"])
def test_no_program_hides_a_module_of_the_standard_library(folder: str) -> None:
    modules = {path.stem for path in (ROOT / folder).glob("*.py")}
    packages = {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")}
    assert not (modules | packages) & sys.stdlib_module_names


@pytest.mark.parametrize("command", [["benchmarks.demo", "--help"], ["benchmarks.queue", "--list"]])
def test_programs_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    """In this process, where what they import is imported already."""
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.delitem(sys.modules, f"{command[0]}.__main__", raising=False)
    with contextlib.suppress(SystemExit) if "--help" in command else contextlib.nullcontext():
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    assert capsys.readouterr().out


def test_a_part_of_the_papers_schedule_keeps_the_steps_of_the_generator_alone() -> None:
    settings = settings_of(Row("any", "w4a4", "paper", share=0.1), shared.teacher_of("many edges"))
    assert (settings.distillation.num_steps, settings.distillation.milestones) == (7920, (1920, 3920, 5920))
    generator = settings.synthesis.generator
    assert (generator.num_steps, generator.milestones) == (800, (2720, 4720, 6720))
