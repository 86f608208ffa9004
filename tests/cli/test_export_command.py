import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from qimera.export.comparison import Comparison, compare
from qimera.export.coreml import NOT_RUN
from qimera.runs.directory import RunDirectory
from qimera.runs.model_card import card_beside, write_model_card
from tests.command_line import qimera, said


def test_export_writes_a_file_into_the_run_and_says_how_it_compares(finished_run: Path) -> None:
    result = qimera("export", finished_run)
    assert result.exit_code == 0, result.stderr
    file = finished_run / "student.onnx"
    assert onnxruntime.InferenceSession(file).get_inputs()[0].name == "input"
    assert f"file size {file.stat().st_size:,} bytes" in result.stdout
    assert "ONNX Runtime" in result.stdout
    assert "layers in integer kernels" in result.stdout
    record = json.loads((finished_run / "export-onnx.json").read_text())
    assert record["num_bytes"] == file.stat().st_size
    assert record["comparisons"][0]["agreement"] == 100
    assert RunDirectory.open(finished_run).is_finished


def test_export_takes_labels_and_preprocessing_to_a_path_of_choice(tmp_path: Path, finished_run: Path) -> None:
    names = "".join(f"class {number}\r\n" for number in range(10))
    (tmp_path / "labels.txt").write_bytes(names.encode("utf-8-sig"))  # as Notepad saves it
    place = tmp_path / "made" / "for" / "it" / "x.onnx"
    options = ("--include-preprocessing", "--labels", tmp_path / "labels.txt", "--output", place)
    result = qimera("export", finished_run, *options)
    assert result.exit_code == 0, result.stderr
    session = onnxruntime.InferenceSession(place)
    assert session.get_inputs()[0].type == "tensor(uint8)"
    labels = json.loads(session.get_modelmeta().custom_metadata_map["qimera.labels"])
    assert labels == [f"class {number}" for number in range(10)]


def test_files_are_recorded_apart_whatever_the_alphabet_of_their_names(tmp_path: Path, finished_run: Path) -> None:
    copied = shutil.copytree(finished_run, tmp_path / "run")
    for name in ("\u6a21\u578b.pt2", "\u6570\u636e.pt2", f"{200 * 'x'}.pt2"):
        result = qimera("export", copied, "--format", "pt2", "--output", tmp_path / name)
        assert result.exit_code == 0, result.stderr
        assert f"`{name}`" in (tmp_path / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert len(list(copied.glob("export-pt2-*.json"))) == 3


def test_wrong_labels_and_places_are_refused_before_anything_is_written(tmp_path: Path, finished_run: Path) -> None:
    (tmp_path / "labels.txt").write_text("one\ntwo\n")
    result = qimera("export", finished_run, "--labels", tmp_path / "labels.txt", "--output", tmp_path / "x.onnx")
    assert result.exit_code == 2
    assert "has 2 lines, the model has 10 classes" in said(result)
    for place in (tmp_path / "labels.txt" / "x.onnx", tmp_path):
        result = qimera("export", finished_run, "--output", place)
        assert result.exit_code == 2
        assert f"{'is no folder' if place.name == 'x.onnx' else 'is a folder; give the name of a file'}" in said(result)
    assert [path.name for path in tmp_path.iterdir()] == ["labels.txt"]


@pytest.mark.parametrize(
    "name", ["summary.json", "student.safetensors", "bank/samples-00000.safetensors", "report.html"]
)
def test_files_of_the_run_are_not_replaced_by_an_exported_one(finished_run: Path, name: str) -> None:
    before = (finished_run / name).read_bytes()
    result = qimera("export", finished_run, "--format", "pt2", "--output", finished_run / name)
    assert result.exit_code == 2
    assert "has the name of a file that qimera writes itself; give another name, such as student.pt2" in said(result)
    assert (finished_run / name).read_bytes() == before


@pytest.mark.parametrize("name", ["student.safetensors", "bank/manifest.json", "student.onnx"])
def test_files_of_another_run_are_not_replaced_by_an_exported_one(
    tmp_path: Path, finished_run: Path, name: str
) -> None:
    file = tmp_path / "other" / name
    file.parent.mkdir(parents=True)
    (tmp_path / "other" / "settings.json").touch()
    file.write_text("of the other run")
    result = qimera("export", finished_run, "--format", "pt2", "--output", file)
    assert result.exit_code == 2
    assert f"qimera writes itself; give another name, such as {finished_run.name}.pt2" in said(result)
    assert file.read_text() == "of the other run"


def test_the_place_of_the_model_card_is_not_taken(tmp_path: Path, finished_run: Path) -> None:
    result = qimera("export", finished_run, "--format", "pt2", "--output", tmp_path / "MODEL_CARD.md")
    assert result.exit_code == 2
    assert "has the name of a file that qimera writes itself" in said(result)


def test_a_device_or_a_pipe_is_not_replaced_by_a_file(tmp_path: Path, finished_run: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt2")
    result = qimera("export", finished_run, "--format", "pt2", "--output", tmp_path / "pipe.pt2")
    assert result.exit_code == 2
    assert "pipe.pt2: is a device or a pipe, and is not replaced by a file" in said(result)
    assert (tmp_path / "pipe.pt2").is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe.pt2"]


def test_export_writes_a_program_that_torch_loads(finished_run: Path) -> None:
    result = qimera("export", finished_run, "--format", "pt2")
    assert result.exit_code == 0, result.stderr
    program = torch.export.load(finished_run / "student.pt2").module()
    assert program(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    assert json.loads((finished_run / "export-pt2.json").read_text())["num_layers"] == 3


def test_export_writes_a_file_for_phones(tmp_path: Path, finished_run: Path) -> None:
    pytest.importorskip("ai_edge_litert", reason="pip install 'qimera[litert]'")
    (tmp_path / "labels.txt").write_text("".join(f"class {number}\n" for number in range(10)))
    options = ("--include-preprocessing", "--integer-logits", "--labels", tmp_path / "labels.txt")
    result = qimera("export", finished_run, "--format", "litert", *options)
    assert result.exit_code == 0, result.stderr
    assert "XNNPACK: same class" in result.stdout
    assert "partitions of XNNPACK: 1\n" in result.stdout
    with zipfile.ZipFile(finished_run / "student.tflite") as files:
        assert files.read("labels.txt").decode().splitlines()[3] == "class 3"
    on_phones, built_in = json.loads((finished_run / "export-litert.json").read_text())["comparisons"]
    assert (on_phones["partitions"], on_phones["outside"], on_phones["note"]) == (1, [], "")
    assert "round twice" in built_in["note"]


@pytest.mark.slow
def test_export_says_that_a_package_for_core_ml_was_not_run(tmp_path: Path, finished_run: Path) -> None:
    pytest.importorskip("coremltools", reason="pip install 'qimera[coreml]'")
    for _ in range(2):  # a package that is there is replaced
        result = qimera("export", finished_run, "--format", "coreml", "--output", tmp_path / "x.mlpackage")
        assert result.exit_code == 0, result.stderr
        assert "was not run" in result.stdout
    record = json.loads((finished_run / "export-coreml-x.mlpackage.json").read_text())
    assert record["not_run"] == NOT_RUN
    assert record["comparisons"] == []
    assert [path.name for path in tmp_path.iterdir() if "mlpackage" in path.name] == ["x.mlpackage"]
    with_labels = ("--format", "coreml", "--include-preprocessing", "--output", tmp_path / "x.mlpackage")
    assert "is for --format onnx, litert or tflm" in said(qimera("export", finished_run, *with_labels))


def test_export_for_microcontrollers_writes_three_files(finished_run: Path) -> None:
    pytest.importorskip("tflite_micro", reason="pip install 'qimera[tflm]'")
    result = qimera("export", finished_run, "--format", "tflm", "--min-agreement", "50")
    assert result.exit_code == 0, result.stderr
    assert "memory of the interpreter" in result.stdout
    written = {path.suffix for path in finished_run.glob("student-tflm.*")}
    assert written == {".tflite", ".cc", ".h"}
    record = json.loads((finished_run / "export-tflm.json").read_text())
    assert record["comparisons"][0]["arena_bytes"] > 0


def test_options_of_another_format_are_refused(tmp_path: Path, finished_run: Path) -> None:
    options = ("--format", "pt2", "--include-preprocessing", "--output", tmp_path / "x.pt2")
    result = qimera("export", finished_run, *options)
    assert result.exit_code == 2
    assert "is for --format onnx, litert or tflm, given --format pt2" in said(result)
    result = qimera("export", finished_run, "--integer-logits", "--output", tmp_path / "x.onnx")
    assert result.exit_code == 2
    assert "--integer-logits is for --format litert or tflm, given --format onnx" in said(result)


def test_a_file_below_the_threshold_is_not_written(
    tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turned upside down, the logits stand for a runtime that computes something else."""

    def upside_down(*_: object) -> str:
        return "the first layer that disagrees is 7"

    monkeypatch.setattr("qimera.export.verification.compare", _compared_with_the_negative)
    monkeypatch.setattr("qimera.export.verification._first_difference", upside_down)
    result = qimera("export", finished_run, "--output", tmp_path / "x.onnx")
    assert result.exit_code == 5
    assert "at least 99 % are required" in said(result)
    assert "no file was written" in said(result)
    assert list(tmp_path.iterdir()) == []


def test_a_runtime_that_fails_is_named_with_what_it_said(
    tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's errors are no RuntimeErrors."""

    def broken(*_: object) -> None:
        raise Fail("no kernel for this node")

    monkeypatch.setattr("qimera.export.verification.onnx_runtime", broken)
    result = qimera("export", finished_run, "--output", tmp_path / "x.onnx")
    assert result.exit_code == 5
    assert "cannot run the file (no kernel for this node); no file was written" in said(result)
    assert list(tmp_path.iterdir()) == []


def _compared_with_the_negative(
    runtime: str,
    expected: np.ndarray,
    actual: np.ndarray,
    num_layers: int,
    float_layers: list[str],
    latencies: list[float],
) -> Comparison:
    return compare(runtime, expected, -actual, num_layers, float_layers, latencies)


def test_export_writes_a_model_card_beside_the_file_and_the_report_links_to_it(
    tmp_path: Path, finished_run: Path
) -> None:
    result = qimera("export", finished_run, "--format", "pt2", "--output", tmp_path / "x.pt2", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["model_card"] == str(tmp_path / "MODEL_CARD.md")
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert "| `x.pt2` |" in card
    assert "No images and no labels were used" in card
    assert str(tmp_path) not in card
    assert str(finished_run.parent) not in card
    assert "| `x.pt2` |" in (finished_run / "MODEL_CARD.md").read_text()
    assert 'href="MODEL_CARD.md"' in (finished_run / "report.html").read_text()


def test_a_card_of_another_model_beside_the_file_stays(tmp_path: Path, finished_run: Path) -> None:
    run = RunDirectory.open(finished_run)
    (tmp_path / "MODEL_CARD.md").write_text("# My own")
    write_model_card(run, tmp_path / "y.onnx")
    assert (tmp_path / "MODEL_CARD.md").read_text() == "# My own"
    assert "a model in full precision" in (tmp_path / "y-MODEL_CARD.md").read_text()
    (tmp_path / "MODEL_CARD.md").unlink()
    write_model_card(run, tmp_path / "y.onnx")
    write_model_card(run, tmp_path / "z.onnx")
    assert card_beside(run, tmp_path / "z.onnx") == tmp_path / "MODEL_CARD.md"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["MODEL_CARD.md", "y-MODEL_CARD.md"]


def test_a_card_lists_all_files_of_the_run_that_lie_beside_it(tmp_path: Path, finished_run: Path) -> None:
    for options in (("float.onnx",), ("bytes.onnx", "--include-preprocessing"), ("student.pt2", "--format", "pt2")):
        result = qimera("export", finished_run, "--output", tmp_path / options[0], *options[1:])
        assert result.exit_code == 0, result.stderr
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert [f"| `{name}` |" in card for name in ("float.onnx", "bytes.onnx", "student.pt2")] == [True, True, True]
    (tmp_path / "float.onnx").write_bytes(b"another file by now")
    write_model_card(RunDirectory.open(finished_run), tmp_path / "bytes.onnx")
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert [f"| `{name}` |" in card for name in ("float.onnx", "bytes.onnx", "student.pt2")] == [False, True, True]


def test_no_card_takes_the_place_of_another_models(tmp_path: Path, finished_run: Path) -> None:
    run = RunDirectory.open(finished_run)
    for name in ("MODEL_CARD.md", "y-MODEL_CARD.md"):
        (tmp_path / name).write_text("# Another model")
    write_model_card(run, tmp_path / "y.tflite")
    assert (tmp_path / "y-MODEL_CARD.md").read_text() == "# Another model"
    assert card_beside(run, tmp_path / "y.tflite") == tmp_path / "y.tflite-MODEL_CARD.md"
    assert (tmp_path / "y.tflite-MODEL_CARD.md").is_file()
    (tmp_path / "folder" / "MODEL_CARD.md").mkdir(parents=True)
    write_model_card(run, tmp_path / "folder" / "y.tflite")
    assert (tmp_path / "folder" / "y-MODEL_CARD.md").is_file()
