import json
from pathlib import Path

import onnxruntime
import pytest

from qimera.run_directory import RunDirectory
from tests.command_line import qimera, said, tiny_settings


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    tiny_settings().save(folder / "settings.json")
    result = qimera("quantize", "--settings", folder / "settings.json", "--output", folder / "run")
    assert result.exit_code == 0, result.stderr
    return folder / "run"


def test_export_writes_a_file_into_the_run_and_says_how_it_compares(finished_run: Path) -> None:
    result = qimera("export", finished_run)
    assert result.exit_code == 0, result.stderr
    file = finished_run / "student.onnx"
    assert onnxruntime.InferenceSession(file).get_inputs()[0].name == "input"
    assert f"file size {file.stat().st_size:,} bytes" in result.stdout
    assert "ONNX Runtime" in result.stdout
    assert "layers in integer kernels" in result.stdout
    record = json.loads((finished_run / "export.json").read_text())
    assert record["num_bytes"] == file.stat().st_size
    assert record["comparisons"][0]["agreement"] == 100
    assert RunDirectory.open(finished_run).is_finished


def test_export_takes_labels_and_preprocessing_to_a_path_of_choice(tmp_path: Path, finished_run: Path) -> None:
    (tmp_path / "labels.txt").write_text("".join(f"class {number}\n" for number in range(10)))
    options = ("--include-preprocessing", "--labels", tmp_path / "labels.txt", "--output", tmp_path / "x.onnx")
    result = qimera("export", finished_run, *options)
    assert result.exit_code == 0, result.stderr
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    assert session.get_inputs()[0].type == "tensor(uint8)"
    labels = json.loads(session.get_modelmeta().custom_metadata_map["qimera.labels"])
    assert labels[3] == "class 3"


def test_wrong_labels_and_places_are_refused_before_anything_is_written(tmp_path: Path, finished_run: Path) -> None:
    (tmp_path / "labels.txt").write_text("one\ntwo\n")
    result = qimera("export", finished_run, "--labels", tmp_path / "labels.txt", "--output", tmp_path / "x.onnx")
    assert result.exit_code == 2
    assert "has 2 lines, the model has 10 classes" in said(result)
    result = qimera("export", finished_run, "--output", tmp_path / "nowhere" / "x.onnx")
    assert result.exit_code == 2
    assert "in a folder that exists" in said(result)
    assert [path.name for path in tmp_path.iterdir()] == ["labels.txt"]


def test_a_file_below_the_threshold_is_not_written(
    tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison that always fails stands for a runtime that computes something else."""
    monkeypatch.setattr("qimera.export.verification.OPENVINO_MIN_AGREEMENT", 0.0)
    monkeypatch.setattr("qimera.export.run.MIN_AGREEMENT", 100.5)
    result = qimera("export", finished_run, "--output", tmp_path / "x.onnx")
    assert result.exit_code == 5
    assert "at least 100.5 % are required" in said(result)
    assert "no file was written" in said(result)
    assert list(tmp_path.iterdir()) == []
