import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qimera.config.settings import QuantizationSettings
from qimera.errors import VerificationError
from qimera.export.comparison import Verification, check_agreement, compare, latencies_ms, sample_pixels
from qimera.export.onnx import export_onnx
from qimera.export.onnx_model import float_model
from qimera.export.program import export_pt2
from qimera.export.verification import _without, onnx_runtime, verify_onnx
from qimera.student.student import Student
from qimera.teacher.teacher import Teacher
from tests import shared
from tests.networks import NUM_CLASSES, SPEC


def agreement(expected: list[list[float]], actual: list[list[float]]) -> float:
    return compare("a runtime", np.array(expected), np.array(actual), 1, []).agreement


def test_agreement_is_the_share_of_images_with_the_students_class() -> None:
    expected = [[1.0, 0.0, -1.0], [0.0, 2.0, 1.0], [0.0, 1.0, 3.0], [5.0, 1.0, 3.0]]
    actual = [[0.9, 0.1, -1.0], [0.0, 1.0, 1.5], [0.0, 1.0, 3.0], [5.0, 1.0, 3.0]]
    assert agreement(expected, actual) == pytest.approx(75)


def test_of_equal_logits_a_runtime_may_pick_either() -> None:
    """Logits of few bits are often equal; rounding errors of the last digit then decide."""
    expected = [[-1.0, 0.0, 0.0], [0.0, 0.0, -2.0]]
    assert agreement(expected, [[-1.0, -2e-8, 0.0], [-3e-8, 0.0, -2.0]]) == pytest.approx(100)
    assert agreement(expected, [[0.1, -2e-8, 0.0], [-3e-8, 0.0, -2.0]]) == pytest.approx(50)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_no_agreement_and_are_named(number: float) -> None:
    """NaN wins an argmax, and a file of nothing else would always say class 0, as the student may."""
    expected = np.array([[1.0, 0.0], [2.0, 1.0], [0.0, 3.0], [0.0, 3.0]])
    actual = expected.copy()
    actual[:3] = [[number, number], [2.0, number], [0.0, 2.5]]
    found = compare("a runtime", expected, actual, 1, [])
    assert (found.agreement, found.identical, found.not_finite) == (50, 25, 2)
    assert found.largest_difference == 0.5
    with pytest.raises(VerificationError, match=r"on 2 samples the file returns NaN or infinite logits; no file"):
        check_agreement(found, 4, 99.0)
    assert "on 2 samples the file returns NaN or infinite logits" in Verification(1, 1, 4, (found,)).text()


def test_latency_is_the_median_without_the_first_call() -> None:
    """Here the first takes much longer than the others, of which two in five are quick."""
    pauses = iter([1.0, *[0.0, 0.0, 0.3, 0.3, 0.3]])
    (latency,) = latencies_ms([lambda: time.sleep(next(pauses))])
    assert 300 <= latency < 900


def test_times_of_two_models_are_taken_in_turns() -> None:
    called: list[str] = []
    first, second = latencies_ms([lambda: (called.append("file"), time.sleep(0.11)), lambda: called.append("model")])
    assert called == 6 * ["file", "model"]
    assert second < 50 < first


@pytest.mark.parametrize("export", [export_onnx, export_pt2])
def test_a_weight_of_minus_128_is_refused(
    tmp_path: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch, export: Callable[..., object]
) -> None:
    student = shared.student_with_minus_128(teacher, monkeypatch)
    with pytest.raises(VerificationError, match=r"\.weight: .* weights are -128.* quantize again.* no file"):
        export(student, tmp_path / "model.pt2")
    assert not (tmp_path / "model.pt2").exists()


@pytest.mark.parametrize("include_preprocessing", [False, True])
def test_the_time_of_full_precision_is_of_the_teacher(
    teacher: Teacher, tmp_path: Path, include_preprocessing: bool
) -> None:
    student = Student(teacher, QuantizationSettings())
    pixels = sample_pixels(student, None)
    onnx.save(ir.to_proto(float_model(student, include_preprocessing=include_preprocessing)), tmp_path / "float.onnx")
    session, _ = onnx_runtime(tmp_path / "float.onnx", [])
    images = teacher.input_spec.normalize(pixels)
    given = pixels.permute(0, 2, 3, 1) if include_preprocessing else images
    (logits,) = session.run(None, {session.get_inputs()[0].name: given.contiguous().numpy()})
    with torch.no_grad():
        # 1e-4: batch norms are folded into layers, and sums run in another order
        np.testing.assert_allclose(logits, teacher(images).numpy(), rtol=1e-4, atol=1e-4)


def test_a_model_in_full_precision_that_does_not_run_costs_its_time_alone(
    tmp_path: Path, teacher: Teacher, caplog: pytest.LogCaptureFixture
) -> None:
    student = shared.fitted(teacher, shared.noise(), QuantizationSettings())
    export_onnx(student, tmp_path / "model.onnx")
    (tmp_path / "float.onnx").write_bytes(b"no model at all")
    paths = tmp_path / "model.onnx", tmp_path / "float.onnx"
    found = verify_onnx(student, paths[0], None, min_agreement=99.0, float_path=paths[1])
    assert "the model in full precision does not run" in caplog.text
    assert {each.float_latency_ms for each in found.comparisons} == {None}
    assert all(each.latency_ms for each in found.comparisons)


# --- which layers run in integer kernels ------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Two layers, and between them a product with a parameter and an attention, which may stay one operation."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.stem, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, NUM_CLASSES)
        self.mixing = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = (self.stem(x).flatten(2).transpose(1, 2) @ self.mixing)[:, None]
        return self.head(F.scaled_dot_product_attention(x, x, x, enable_gqa=self.fused).mean((1, 2)))


@pytest.fixture(scope="module")
def student() -> Student:
    return student_of_tokens(fused=True)


def student_of_tokens(*, fused: bool) -> Student:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Tokens(fused=fused)
    made = Student(Teacher.capture(model, SPEC), QuantizationSettings())
    made.initialize_ranges_([torch.randn(8, *SPEC.shape, generator=torch.Generator().manual_seed(0))])
    return made


def test_attention_runs_in_integer_kernels(tmp_path: Path) -> None:
    found = export_onnx(student_of_tokens(fused=False), tmp_path / "model.onnx")
    (on_onnx_runtime, *_) = found.comparisons
    assert (found.num_layers, on_onnx_runtime.integer_layers, on_onnx_runtime.float_layers) == (5, 5, ())
    assert on_onnx_runtime.agreement == 100


def test_products_without_a_quantized_weight_count_among_the_layers_of_a_file(tmp_path: Path, student: Student) -> None:
    found = export_onnx(student, tmp_path / "model.onnx", min_agreement=0.0)
    assert found.num_layers == 5  # stem and head, the parameter's product, and two of attention
    assert {"MatMul@1", "MatMul@2"} <= set(found.comparisons[0].float_layers)
    assert f"{found.comparisons[0].integer_layers} of 5 layers in integer kernels" in found.text()


def test_products_without_a_quantized_weight_count_among_the_layers_of_a_program(
    tmp_path: Path, student: Student
) -> None:
    found = export_pt2(student, tmp_path / "model.pt2", min_agreement=0.0)
    assert found.num_layers == 4  # where attention is one operation
    assert len(found.comparisons[0].float_layers) == 4


def test_a_kernel_is_of_the_layer_whose_whole_name_it_bears() -> None:
    names = ["conv", "conv_1", "conv_1.down", "fc", "fc@1"]
    assert _without(names, ["conv_1_quant", "fc@1_gemm/quant"]) == ["conv", "conv_1.down", "fc"]
    assert _without(names, ["conv_1.down", "conv/fused"]) == ["conv_1", "fc", "fc@1"]
