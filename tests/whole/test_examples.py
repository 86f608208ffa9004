"""The programs in examples/, run as a device team would run them."""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from qimera.config.settings import QuantizationSettings
from qimera.export.onnx import export_onnx
from qimera.litert.export import export_litert
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank
from qimera.teacher.teacher import Teacher
from tests.networks import SPEC, toy_pixels

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "examples" / "deploy_onnxruntime.py"
ON_LITERT = ROOT / "examples" / "deploy_litert.py"
LABELS = ["apple", "bear", "cat", "dog", "eel"]


@pytest.fixture(scope="module")
def student(teacher: Teacher, bank: SampleBank) -> Student:
    student = Student(teacher, QuantizationSettings(weight_bits=4, activation_bits=4))
    student.initialize_ranges_([SPEC.normalize(bank.pixels[:32])])
    return student


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return toy_pixels(12, seed=4)[0]


def write_images(folder: Path, pixels: Tensor) -> list[str]:
    """Write each image as a PNG and return the names of the files."""
    names = [f"{number}.png" for number in range(len(pixels))]
    for name, image in zip(names, pixels, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name)
    return names


def run(*arguments: object, interpreter: Path | str = sys.executable) -> subprocess.CompletedProcess[str]:
    """Run an interpreter that sees its own packages alone (-I: neither PYTHONPATH nor this folder)."""
    command = [str(each) for each in (interpreter, "-I", *arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def answers(output: str) -> list[str]:
    """Return the class on each line."""
    lines = [re.fullmatch(r".*\.png: (\w+), (\d+\.\d)%", line) for line in output.splitlines()]
    assert all(line is not None and 100 / len(LABELS) <= float(line[2]) <= 100 for line in lines), output
    return [line[1] for line in lines if line is not None]


def expected(student: Student, pixels: Tensor) -> list[int]:
    """Return the student's class of each image."""
    with torch.no_grad():
        return student(SPEC.normalize(pixels)).argmax(1).tolist()


@pytest.mark.parametrize("include_preprocessing", [True, False], ids=["pixels", "normalised input"])
def test_the_deployed_file_gives_the_class_of_the_student(
    tmp_path: Path, student: Student, bank: SampleBank, pixels: Tensor, include_preprocessing: bool
) -> None:
    model = tmp_path / "model.onnx"
    export_onnx(student, model, bank, include_preprocessing=include_preprocessing)
    files = [tmp_path / name for name in write_images(tmp_path, pixels)]
    done = run(PROGRAM, model, *files)
    assert done.returncode == 0, done.stderr
    assert len(set(answers(done.stdout))) > 1
    assert answers(done.stdout) == [str(index) for index in expected(student, pixels)]


@pytest.mark.parametrize("options", [{"include_preprocessing": True, "labels": LABELS}, {"integer_logits": True}])
def test_the_file_for_phones_gives_the_class_of_the_student(
    tmp_path: Path, student: Student, bank: SampleBank, pixels: Tensor, options: dict[str, Any]
) -> None:
    pytest.importorskip("ai_edge_litert", reason="pip install 'qimera[litert]'")
    model = tmp_path / "model.tflite"
    export_litert(student, model, bank, **options)
    files = [tmp_path / name for name in write_images(tmp_path, pixels)]
    done = run(ON_LITERT, model, *files)
    assert done.returncode == 0, done.stderr
    wanted = [LABELS[index] if "labels" in options else str(index) for index in expected(student, pixels)]
    assert answers(done.stdout) == wanted


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_device_needs_neither_torch_nor_qimera(
    tmp_path: Path, student: Student, bank: SampleBank, pixels: Tensor
) -> None:
    venv.create(tmp_path / "device", with_pip=True)
    interpreter = tmp_path / "device" / ("Scripts" if os.name == "nt" else "bin") / "python"
    packages = ("onnxruntime", "numpy", "pillow")
    installed = run("-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", *packages, interpreter=interpreter)
    assert installed.returncode == 0, installed.stderr
    for absent in ("torch", "qimera"):
        assert "ModuleNotFoundError" in run("-c", f"import {absent}", interpreter=interpreter).stderr

    model = tmp_path / "model.onnx"
    export_onnx(student, model, bank, include_preprocessing=True, labels=LABELS)
    files = [tmp_path / name for name in write_images(tmp_path, pixels)]
    done = run(PROGRAM, model, *files, interpreter=interpreter)
    assert done.returncode == 0, done.stderr
    assert answers(done.stdout) == [LABELS[index] for index in expected(student, pixels)]
