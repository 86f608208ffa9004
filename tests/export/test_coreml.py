"""Core ML packages, where coremltools is installed: ``pip install 'qimera[coreml]'``; what is in them, run by torch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qimera.config.settings import QuantizationSettings
from qimera.errors import ConfigError, UnsupportedModelError, VerificationError
from qimera.export import coreml
from qimera.export.coreml import NOT_RUN, export_coreml
from qimera.student.student import Student
from qimera.teacher.teacher import Teacher
from tests import shared


def require_coremltools() -> None:
    pytest.importorskip("coremltools", reason="pip install 'qimera[coreml]'")


def run_package(package: Path, images: Tensor) -> Tensor:
    """Return the logits that the operations of the package come to, as Apple's documentation describes them."""
    values: dict[str, Any] = {"input": images}
    for each in coreml._operations(package):
        given = {
            name: values.get(value.name, value.val) for name, value in each.inputs.items() if hasattr(value, "val")
        }
        given = {name: torch.tensor(x) if isinstance(x, np.ndarray) else x for name, x in given.items()}
        if each.op_type != "const":
            values[each.outputs[0].name] = OPERATIONS[each.op_type](**given)
    return values["logits"]


def quantize(input: Tensor, scale: float, output_dtype: str, zero_point: int = 0) -> Tensor:
    limits = {"uint8": (0, 255), "int8": (-128, 127)}[output_dtype]
    return ((input / float(scale)).round() + int(zero_point)).clamp(*limits)


def dequantize(input: Tensor, scale: float, zero_point: int = 0) -> Tensor:
    return (input - int(zero_point)) * float(scale)


def expand(quantized_data: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    shape = [-1 if each == axis else 1 for each in range(quantized_data.ndim)]
    return (quantized_data.float() - zero_point.reshape(shape)) * scale.reshape(shape)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor, strides: Tensor, pad: Tensor, dilations: Tensor, groups: int, **_: str
) -> Tensor:
    before, after = pad[0::2].tolist(), pad[1::2].tolist()
    padded = F.pad(x, (before[1], after[1], before[0], after[0]))
    return F.conv2d(padded, weight, bias, strides.tolist(), 0, dilations.tolist(), int(groups))


OPERATIONS = {
    "quantize": quantize,
    "dequantize": dequantize,
    "constexpr_affine_dequantize": expand,
    "conv": convolve,
    "linear": lambda x, weight, bias: F.linear(x, weight, bias),
    "relu": lambda x: x.clamp(min=0),
    "clip": lambda x, alpha, beta: x.clamp(float(alpha), float(beta)),
    "add": lambda x, y: x + y,
    "reduce_mean": lambda x, axes, keep_dims: x.mean(axes.tolist(), keepdim=bool(keep_dims)),
    "reshape": lambda x, shape: x.reshape(shape.tolist()),
}


@pytest.mark.parametrize("bits", ["w8a8", pytest.param("w4a4", marks=pytest.mark.slow)])
def test_the_operations_of_a_package_come_to_the_logits_of_the_student(tmp_path: Path, bits: str) -> None:
    require_coremltools()
    student, images = shared.student_of("residual", bits), shared.noise()
    verification = export_coreml(student, tmp_path / "model.mlpackage")
    assert verification.not_run == NOT_RUN
    assert "so the file was not run" in verification.text()
    actual = torch.cat([run_package(tmp_path / "model.mlpackage", image[None]) for image in images])
    difference = (actual - student(images)).abs().amax(1)
    # sums of floats in another order carry some over the edge between two levels
    assert float((difference <= 1e-4 * student(images).std()).float().mean()) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["many edges", "transformer", "transposed convolution", "depthwise convolution"])
def test_steps_and_integers_of_other_networks_are_those_of_the_student(tmp_path: Path, name: str) -> None:
    require_coremltools()
    student = shared.student_of(name, "w4a8")
    export_coreml(student, tmp_path / "model.mlpackage")
    operations = list(coreml._operations(tmp_path / "model.mlpackage"))
    steps = {float(np.float32(step.exp().item())) for step in student.steps if not step.ndim}
    in_package = {float(each.scale.val) for each in operations if each.op_type == "quantize"}
    assert in_package
    assert in_package <= steps
    per_channel = {step.exp().detach().numpy().tobytes() for step in student.steps if step.ndim}
    weights = [each.scale.val for each in operations if each.op_type == "constexpr_affine_dequantize"]
    assert {each.tobytes() for each in weights if each.ndim} <= per_channel


@pytest.mark.slow
def test_a_package_with_another_step_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """coremltools has a pass that divides the steps of additions by one of them."""
    require_coremltools()
    monkeypatch.setattr(coreml, "_RESCALING", "common::const_elimination")
    with pytest.raises(VerificationError, match=r"step .* is only the package's|only the student's"):
        export_coreml(shared.student_of("residual", "w8a8"), tmp_path / "model.mlpackage")
    assert not list(tmp_path.iterdir())


def test_what_is_missing_or_in_the_way_is_said(
    tmp_path: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = Student(teacher, QuantizationSettings())
    monkeypatch.setattr(coreml, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'qimera\[coreml\]'"):
        export_coreml(student, tmp_path / "model.mlpackage")
    monkeypatch.setattr(coreml, "find_spec", lambda _: True)
    with pytest.raises(ConfigError, match=r"call it model.mlpackage"):
        export_coreml(student, tmp_path / "model.mlmodel")
    (tmp_path / "mine.mlpackage").mkdir()
    with pytest.raises(ConfigError, match="is there and no Core ML package"):
        export_coreml(student, tmp_path / "mine.mlpackage")
    with pytest.raises(UnsupportedModelError, match="scheme paper"):
        export_coreml(Student(teacher, QuantizationSettings(scheme="paper")), tmp_path / "model.mlpackage")
