"""What the shell offers after the tab key."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qimera.cli import completion
from qimera.config.bits import parse_bits
from qimera.mixed_precision.budget import Budget
from qimera.teacher.sources import EMBEDDED_MODELS
from tests.command_line import qimera

ROOT = Path(__file__).parents[2]


def offered(line: str, folder: Path) -> list[str]:
    """Return what bash is told to offer after ``line``."""
    words = line.split(" ")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "_QIMERA_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    code = "from qimera.cli.app import app; app(prog_name='qimera')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("qimera q", ["quantize"]),
        ("qimera quantize mnist_cnn --recipe p", ["ptq", "paper"]),
        ("qimera quantize mnist_cnn --bits w8a8,w4", ["w8a8,w4a8", "w8a8,w4a4"]),
        ("qimera export runs/ --format pt", ["pt2"]),
        ("qimera inspect mn", ["mnist_cnn", "mnist_convnext", "mnist_vit"]),
        ("qimera export runs/", ["runs/one"]),
    ],
)
def test_the_shell_completes(tmp_path: Path, line: str, expected: list[str]) -> None:
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "settings.json").touch()
    assert offered(line, tmp_path) == expected


def test_completion_loads_neither_torch_nor_pydantic_and_little_else() -> None:
    """It took 0.15 s when this was written; what would make it slow is here."""
    code = (
        "import sys, qimera.cli.app; from qimera.cli import completion as c; "
        "[f('') for f in (c.recipes, c.bits, c.models, c.runs, c.devices, c.budgets)]; "
        "print({'torch', 'numpy', 'pydantic', 'matplotlib', 'jinja2'} & sys.modules.keys())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_what_is_offered_is_accepted() -> None:
    assert [each for each in completion.models("") if each in EMBEDDED_MODELS] == sorted(EMBEDDED_MODELS)
    assert all(parse_bits(each) for each in completion.bits(""))
    assert all(Budget.parse(f"{each}0.5") for each in completion.budgets(""))


def test_of_several_values_none_is_offered_twice() -> None:
    assert completion.recipes("ptq,fast,") == [
        f"ptq,fast,{name}" for name in ("best", "qimera", "paper", "gdfq", "images")
    ]


def test_folders_and_files_are_offered_as_far_as_they_can_be_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("net.py", "net.pt2", "net.txt"):
        (tmp_path / name).touch()
    (tmp_path / "nets").mkdir()
    assert completion.models("net") == ["net.pt2", "net.py:", "nets/"]
    assert completion.models("nowhere/") == []


def test_the_script_for_a_shell_can_be_shown_and_installed() -> None:
    options = qimera("--help").stdout
    assert "--install-completion" in options
    assert "--show-completion" in options
