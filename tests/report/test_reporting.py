"""Reports of runs: when they are written, and what they say of files and images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from qimera.config.settings import DirectSettings, QuantizationSettings, SynthesisSettings
from qimera.machine.progress import silent
from qimera.pipeline import synthesize
from qimera.report.content import Report, curves
from qimera.runs.directory import RunDirectory
from qimera.runs.execution import carry_out
from qimera.runs.reporting import report_run
from qimera.teacher.sources import load_model
from qimera.teacher.teacher import Teacher
from tests.command_line import INPUT, SMALL_INPUT, qimera, run_tiny_settings, said, tiny_settings, write_model_file

FEW = DirectSettings(num_steps=1, batch_size=8)


BAD_SYNTHESIS = SynthesisSettings(num_optimized=48, num_held_out=16, direct=DirectSettings(num_steps=10, batch_size=32))


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished run of three layers, for what is said of files and images rather than of samples."""
    return RunDirectory.open(run_tiny_settings(tmp_path_factory.mktemp("small")))


def test_a_run_of_the_papers_scheme_ends_with_its_report(tmp_path: Path) -> None:
    paper = QuantizationSettings(scheme="paper")
    tiny_settings(synthesis=BAD_SYNTHESIS, quantization=paper).save(tmp_path / "settings.json")
    done = qimera("quantize", "--settings", tmp_path / "settings.json", "--output", tmp_path / "run")
    assert done.exit_code == 0, done.stderr
    assert len(Report.load(tmp_path / "run" / "report.json").layers) == 3


def test_a_run_beside_a_python_call_can_be_reported(tmp_path: Path, small_teacher: Teacher) -> None:
    run = RunDirectory.start(tmp_path / "run", tiny_settings())
    carry_out(run, small_teacher, None, silent)
    assert report_run(run).summary.estimate is None  # no held-out samples
    assert "holds no samples to estimate from" in run.report_page_file.read_text().replace("\n", " ")


def test_long_curves_are_thinned_out() -> None:
    lines = [{"part": "a", "stage": "s", "step": step, "total": 9, "seconds": 0, "kl": 1.0} for step in range(5000)]
    (found,) = curves(lines)
    assert 200 <= len(found.steps) <= 400
    assert found.steps[0] == 0


def test_a_measurement_on_images_that_the_teacher_does_not_know_is_no_drop(
    small_run: RunDirectory, tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (40, 8, 8, 1), np.uint8), generator.integers(0, 10, 40)
    np.savez(tmp_path / "test.npz", images=images, labels=labels)
    copied = shutil.copytree(small_run.path, tmp_path / "run")
    done = qimera("evaluate", copied, "--data", tmp_path / "test.npz", "--json")
    assert done.exit_code == 0, done.stderr
    assert "warning: data: the full-precision model gets" in done.stderr
    values = json.loads(done.stdout)
    assert len(values["warnings"]) == 1
    measured = (copied / "report.html").read_text()
    assert "points lost, measured" not in measured.lower()
    assert f"{values['student_top1']:.2f} %" in measured
    assert "so the drop says nothing about quantization" in measured
    assert Report.load(copied / "report.json").measured.num_images == 40
    strict = qimera("evaluate", copied, "--data", tmp_path / "test.npz", "--strict", "--max-drop", "99")
    assert strict.exit_code == 5
    assert "has 1 warning, shown above" in said(strict)
    assert "has no measured drop to compare with 99 points" in said(strict)


def test_the_report_does_not_tell_where_the_users_files_are(tmp_path: Path) -> None:
    model = write_model_file(tmp_path)
    save_file(load_model(f"{model}:build").state_dict(), tmp_path / "toy.safetensors")
    options = (f"{model}:build", "--weights", tmp_path / "toy.safetensors", *INPUT, "--recipe", "ptq")
    bank = synthesize(load_model(f"{model}:build"), SMALL_INPUT, SynthesisSettings(num_optimized=8, direct=FEW))
    bank.save(tmp_path / "bank")
    done = qimera("quantize", *options, "--bank", tmp_path / "bank", "--output", tmp_path / "run")
    assert done.exit_code == 0, done.stderr
    assert qimera("export", tmp_path / "run", "--output", tmp_path / "toy.onnx", "--min-agreement", 0).exit_code == 0
    for file in ("report.html", "report.json", "summary.json", "summary.txt", "export-onnx-toy.onnx.json"):
        text = (tmp_path / "run" / file).read_text()
        assert str(tmp_path.parent) not in text, file
    assert RunDirectory.open(tmp_path / "run").summary().model == "toy.py:build"
    assert RunDirectory.open(tmp_path / "run").settings.model == f"{model}:build"


def test_an_exported_file_is_listed(small_run: RunDirectory, tmp_path: Path) -> None:
    copied = shutil.copytree(small_run.path, tmp_path / "run")
    done = qimera("export", copied)
    assert done.exit_code == 0, done.stderr
    (listed,) = Report.load(copied / "report.json").exports
    assert listed.num_bytes == (copied / "student.onnx").stat().st_size
    page = (copied / "report.html").read_text()
    assert "student.onnx" in page
    assert f"{listed.comparisons[0]['integer_layers']} of {listed.num_layers}" in page
    assert listed.comparisons[0]["latency_ms"] > 0
    assert f"<b>{listed.comparisons[0]['latency_ms']:.3g} ms</b>full precision:" in page
    assert page.count(f"{listed.comparisons[0]['float_latency_ms']:.3g} ms") >= 2  # in the first lines and the table


def test_the_report_is_written_anew_when_asked_for(small_run: RunDirectory, tmp_path: Path) -> None:
    copied = shutil.copytree(small_run.path, tmp_path / "run")
    (copied / "report.html").unlink()
    assert qimera("report", copied).exit_code == 0
    assert (copied / "report.html").exists()
