"""What is written is on the disk before what it was made from is removed."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

import qimera
from qimera.config.settings import QuantizationSettings
from qimera.errors import ConfigError
from qimera.machine.checkpoint import Checkpoints
from qimera.machine.files import replace_directory, replacing, sync_tree
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank
from qimera.synthesis.formats import write_bank
from qimera.teacher.teacher import Teacher
from tests.forked import Starter, said_by


class Journal:
    """Records which files reach the disk, and what is renamed, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        fsync, rename, replace = os.fsync, os.rename, os.replace

        def synced(descriptor: int) -> None:
            self.events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
            fsync(descriptor)

        def moved(move):  # type: ignore[no-untyped-def]
            def call(source, target, **more):  # type: ignore[no-untyped-def]
                self.events.append(f"move {Path(target).name}")
                move(source, target, **more)

            return call

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "rename", moved(rename))
        monkeypatch.setattr(os, "replace", moved(replace))


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Journal:
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to tell files by their descriptors")
    return Journal(monkeypatch)


def test_a_bank_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, bank: SampleBank, journal: Journal) -> None:
    bank.save(tmp_path / "bank")
    before, after = (journal.events[part] for part in journal_parts(journal, "move bank"))
    assert {f"sync {each.name}" for each in (tmp_path / "bank").iterdir()} <= set(before)
    assert f"sync {tmp_path.name}" in after


@pytest.mark.parametrize("form", ["npz", "safetensors", "imagefolder"])
def test_samples_for_others_are_too(tmp_path: Path, bank: SampleBank, journal: Journal, form: str) -> None:
    write_bank(bank, tmp_path / "samples", form)  # type: ignore[arg-type]
    before, after = (journal.events[part] for part in journal_parts(journal, "move samples"))
    files = [each for each in (tmp_path / "samples").rglob("*") if each.is_file()] or [tmp_path / "samples"]
    assert {f"sync {each.name}" for each in files} <= set(before)
    assert f"sync {tmp_path.name}" in after


def journal_parts(journal: Journal, event: str) -> tuple[slice, slice]:
    index = journal.events.index(event)
    return slice(0, index), slice(index, None)


def test_a_replaced_file_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, journal: Journal) -> None:
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("whole")
    assert journal.events[-2:] == ["move a.txt", f"sync {tmp_path.name}"]
    assert journal.events[0].startswith("sync .a.partial")


def test_a_folder_stays_where_nothing_can_take_its_place(tmp_path: Path) -> None:
    (tmp_path / "x.mlpackage").mkdir()
    (tmp_path / "x.mlpackage" / "old.txt").write_text("old")
    with pytest.raises(FileNotFoundError):
        replace_directory(tmp_path / "nowhere", tmp_path / "x.mlpackage")
    assert (tmp_path / "x.mlpackage" / "old.txt").read_text() == "old"
    (tmp_path / "new").mkdir()
    replace_directory(tmp_path / "new", tmp_path / "x.mlpackage")
    assert [each.name for each in tmp_path.iterdir()] == ["x.mlpackage"]
    assert not list((tmp_path / "x.mlpackage").iterdir())


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_a_link_to_a_folder_is_replaced_and_nothing_else(tmp_path: Path, target: str) -> None:
    for name in ("elsewhere", "new", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere" / "old.txt").write_text("old")
    path = tmp_path / "here" / "x.mlpackage"
    path.symlink_to(tmp_path / target)
    replace_directory(tmp_path / "new", path)
    assert list((tmp_path / "here").iterdir()) == [path]
    assert not path.is_symlink()
    assert (tmp_path / "elsewhere" / "old.txt").read_text() == "old"


def test_everything_in_a_folder_is_brought_to_the_disk(tmp_path: Path, journal: Journal) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "deep.txt").write_text("x")
    sync_tree(tmp_path)
    assert journal.events == ["sync deep.txt", "sync inner", f"sync {tmp_path.name}"]


EXPORTS = {
    "export_onnx": ("x.onnx", "onnx"),
    "export_pt2": ("x.pt2", "torch"),
    "export_aotinductor": ("x.pt2", "torch"),
    "export_executorch": ("x.pte", "executorch"),
    "export_litert": ("x.tflite", "ai_edge_litert"),
    "export_tflm": ("x.tflite", "tflite_micro"),
    "export_coreml": ("x.mlpackage", "coremltools"),
}


@pytest.mark.parametrize("function", EXPORTS)
def test_a_place_that_no_file_can_go_to_is_refused_before_a_student_is_looked_at(
    tmp_path: Path, teacher: Teacher, function: str
) -> None:
    name, package = EXPORTS[function]
    if find_spec(package) is None:
        pytest.skip(f"needs {package}")
    student = Student(teacher, QuantizationSettings(scheme="paper"))  # which no format takes
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file: is no folder, and files cannot go below it"):
        getattr(qimera, function)(student, tmp_path / "file" / "folder" / name)
    if function != "export_coreml":
        (tmp_path / name).mkdir()
        with pytest.raises(ConfigError, match=rf"{name}: is a folder; give the name of a file"):
            getattr(qimera, function)(student, tmp_path / name)
    if function == "export_tflm":
        (tmp_path / "y.cc").mkdir()
        with pytest.raises(ConfigError, match=r"y.cc: is a folder"):
            getattr(qimera, function)(student, tmp_path / "y.tflite")


WRITERS: dict[str, Callable[[Path, Teacher, SampleBank], object]] = {
    "a bank": lambda path, teacher, bank: bank.save(path),
    "samples for others": lambda path, teacher, bank: write_bank(bank, path, "npz"),
    "a teacher": lambda path, teacher, bank: teacher.save(path),
    "a student": lambda path, teacher, bank: Student(teacher, QuantizationSettings()).save_state(path),
    "settings": lambda path, teacher, bank: bank.settings.save(path),
    "a checkpoint": lambda path, teacher, bank: Checkpoints(path).of("x").save({}),
}


@pytest.mark.parametrize("what", WRITERS)
def test_whatever_is_written_goes_into_a_folder_that_was_not_there(
    tmp_path: Path, teacher: Teacher, bank: SampleBank, what: str
) -> None:
    WRITERS[what](tmp_path / "new" / "folder" / "x", teacher, bank)
    assert (tmp_path / "new" / "folder" / "x").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file: is no folder"):
        WRITERS[what](tmp_path / "file" / "x", teacher, bank)


def test_checkpoints_that_cannot_be_kept_are_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file: is no folder"):
        Checkpoints(tmp_path / "file" / "checkpoints")


WITHOUT_ONNX = """
import sys
for name in ("onnx", "onnxruntime", "onnxscript", "onnx_ir", "openvino", "executorch", "coremltools", "ai_edge_litert"):
    assert name not in sys.modules
    sys.modules[name] = None
import torch
from qimera import *
from qimera import ConfigError
from tests.networks import SPEC, TinyNet

student = Student(Teacher.capture(TinyNet().eval(), SPEC), QuantizationSettings())
student.initialize_ranges_([torch.randn(8, *SPEC.shape)])
print(export_pt2(student, sys.argv[1] + "/student.pt2", min_agreement=0.0).comparisons[0].runtime)
try:
    export_onnx(student, sys.argv[1] + "/student.onnx")
except ConfigError as error:
    print(error)
try:
    export_litert(student, sys.argv[1] + "/student.tflite")
except ConfigError as error:
    print(error)
"""


def test_every_format_needs_its_own_packages_alone(tmp_path: Path, starter: Starter) -> None:
    said = said_by(starter, tmp_path, "tests.side_by_side:script", [WITHOUT_ONNX, str(tmp_path)])
    assert "PyTorch" in said
    assert "format onnx needs onnx, onnxruntime, onnxscript; pip install 'qimera[onnx]'" in said
    assert "needs ai-edge-litert; pip install 'qimera[litert]'" in said
