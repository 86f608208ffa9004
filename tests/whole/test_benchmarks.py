"""The programs beside the package start."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "scripts", "tests"])
def test_no_program_hides_a_module_of_the_standard_library(folder: str) -> None:
    modules = {path.stem for path in (ROOT / folder).glob("*.py")}
    packages = {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")}
    assert not (modules | packages) & sys.stdlib_module_names


@pytest.mark.parametrize("command", [["-m", "benchmarks.demo", "--help"], ["-m", "benchmarks.queue", "--list"]])
def test_programs_start(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout
