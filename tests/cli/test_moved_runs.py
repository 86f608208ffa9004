"""The same command continues a run whose folder was moved together with its model."""

import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import Result

from qimera.teacher.sources import load_model
from tests.command_line import INPUT, qimera, said, write_model_file

QUICK = ("--recipe", "ptq", "--set", "synthesis.num_optimized=16", "--set", "synthesis.num_held_out=8")


def quantize(project: Path, *bits: str) -> Result:
    options = (f"{project / 'toy.py'}:build", "--weights", project / "toy.pth", *INPUT, *QUICK)
    return qimera(
        "quantize", *options, "--set", "direct.num_steps=2", "--bits", ",".join(bits), "--output", project / "run"
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file, its weights, and a run of two students that share a bank."""
    project = tmp_path_factory.mktemp("project")
    model = load_model(f"{write_model_file(project)}:build")
    torch.save(model.state_dict(), project / "toy.pth")
    made = quantize(project, "w8a8", "w4a4")
    assert made.exit_code == 0, made.stderr
    return project


def test_the_same_command_finds_its_run_after_everything_was_moved(tmp_path: Path, project: Path) -> None:
    away = tmp_path / "away"
    shutil.copytree(project, away)
    project.rename(tmp_path / "gone")
    try:
        again = quantize(away, "w8a8", "w4a4")
    finally:
        (tmp_path / "gone").rename(project)
    assert again.exit_code == 0, again.stderr
    assert said(again).count("finished already") == 2


def test_the_same_command_finds_its_run_in_a_copy_beside_the_original(tmp_path: Path, project: Path) -> None:
    away = shutil.copytree(project, tmp_path / "away")
    again = quantize(away, "w8a8", "w4a4")
    assert again.exit_code == 0, again.stderr
    assert said(again).count("finished already") == 2


def test_another_bank_in_the_place_of_a_copy_is_another_bank(tmp_path: Path, project: Path) -> None:
    away = shutil.copytree(project, tmp_path / "away")
    manifest = away / "run" / "w8a8" / "bank" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 1'))
    again = quantize(away, "w8a8", "w4a4")
    assert again.exit_code == 2
    assert "holds a run with other settings (bank: " in said(again)


def test_a_moved_model_with_other_weights_is_another_model(tmp_path: Path, project: Path) -> None:
    away = tmp_path / "away"
    shutil.copytree(project, away)
    weights = torch.load(away / "toy.pth", weights_only=True)
    torch.save({**weights, "4.bias": weights["4.bias"] + 1}, away / "toy.pth")
    shutil.move(away / "run" / "w8a8", away / "single")
    shutil.rmtree(away / "run")
    (away / "single").rename(away / "run")
    again = quantize(away, "w8a8")
    assert again.exit_code == 2
    assert "holds a run with other settings (model: " in said(again)


def test_another_function_of_a_moved_file_is_another_model(tmp_path: Path, project: Path) -> None:
    again = qimera(
        "quantize",
        f"{write_model_file(tmp_path)}:build_broken",
        "--weights",
        project / "toy.pth",
        *INPUT,
        *QUICK,
        "--set",
        "direct.num_steps=2",
        "--bits",
        "w8a8",
        "--output",
        project / "run" / "w8a8",
    )
    assert again.exit_code == 2
    assert "holds a run with other settings (model: " in said(again)
