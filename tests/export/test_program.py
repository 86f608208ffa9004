from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config
from torch.nn import functional as F

from qimera.config.bits import parse_bits
from qimera.config.settings import QuantizationSettings
from qimera.errors import ConfigError, UnsupportedModelError, VerificationError
from qimera.export.program import export_aotinductor, export_pt2, integer_program
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank
from qimera.teacher.sources import EMBEDDED_MODELS, load_model
from qimera.teacher.teacher import Teacher
from tests import shared
from tests.networks import NETWORKS, SPEC, Head

CLIP = torch.ops.aten.hardtanh.default
MNIST = EMBEDDED_MODELS["mnist_cnn"].input_spec


def student_of(teacher: Teacher, bits: str = "w4a4", scheme: str = "hardware") -> Student:
    weight_bits, activation_bits = parse_bits(bits)
    settings = QuantizationSettings(weight_bits=weight_bits, activation_bits=activation_bits, scheme=scheme)
    return shared.fitted(teacher, shared.noise(32), settings)


def share_of_equal_classes(a: Tensor, b: Tensor) -> float:
    return float((a.argmax(1) == b.argmax(1)).float().mean())


# --- the program computes what the student computes -------------------------------------------------------------------


@pytest.mark.parametrize("bits", ["w2a2", "w4a4", "w5a6", "w8a8"])
def test_a_program_agrees_with_the_student(
    tmp_path: Path, teacher: Teacher, bank: SampleBank, toy_images: Tensor, bits: str
) -> None:
    student = student_of(teacher, bits)
    verification = export_pt2(student, tmp_path / "model.pt2", bank)
    program = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        assert share_of_equal_classes(program(toy_images), student(toy_images)) >= 0.99
    assert verification.comparisons[0].agreement >= 99
    assert verification.num_samples == len(bank)
    assert verification.num_layers == len(teacher.layers)
    assert verification.num_bytes == (tmp_path / "model.pt2").stat().st_size


@pytest.mark.parametrize("bits", ["w8a8", pytest.param("w3a3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_form_for_integer_kernels_changes_no_logits(name: str, bits: str) -> None:
    student = shared.student_of(name, bits)
    images = torch.randn(16, *SPEC.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = student.converted()(images)
        assert torch.equal(integer_program(student).module()(images), expected)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, teacher: Teacher) -> Path:
    """The file of a W4A4 student."""
    path = tmp_path_factory.mktemp("exported") / "model.pt2"
    export_pt2(student_of(teacher), path)
    return path


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_the_batch_is_dynamic(file: Path, teacher: Teacher, toy_images: Tensor, batch: int) -> None:
    program, student = torch.export.load(file).module(), student_of(teacher)
    with torch.no_grad():
        assert share_of_equal_classes(program(toy_images[:batch]), student(toy_images[:batch])) >= 0.98


def test_every_layer_is_said_to_run_in_floating_point_without_a_compiler(tmp_path: Path, teacher: Teacher) -> None:
    comparison = export_pt2(student_of(teacher), tmp_path / "new" / "model.pt2").comparisons[0]
    assert comparison.runtime == f"PyTorch {torch.__version__.partition('+')[0]}"
    assert comparison.integer_layers == 0
    assert comparison.float_layers == ("conv1", "conv2", "conv3", "depthwise", "pointwise", "fc")


def test_a_model_in_full_precision_that_does_not_run_costs_its_time_alone(
    tmp_path: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Student, "reference", property(lambda _: lambda image: image @ image.flatten()))
    comparison = export_pt2(student_of(teacher), tmp_path / "model.pt2").comparisons[0]
    assert "the model in full precision does not run" in caplog.text
    assert comparison.float_latency_ms is None
    assert comparison.latency_ms is not None


# --- its form ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.5, 6.0, 100.0])
def test_one_clip_stands_for_the_activation_function_and_the_grid(limit: float) -> None:
    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.next, self.head = (
                nn.Conv2d(3, 4, 3),
                nn.BatchNorm2d(4),
                nn.Conv2d(4, 4, 3),
                Head(4),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.next(F.hardtanh(self.bn(self.conv(x)), -limit / 2, limit))))

    graph = integer_program(student_of(Teacher.capture(Clipped(), SPEC))).graph
    clip = next(node for node in graph.nodes if node.target is CLIP)
    quantizer = next(iter(clip.users))
    _, scale, zero_point, *levels, _ = quantizer.args
    assert levels == [0, 15]
    assert clip.args[0].target is torch.ops.aten.conv2d.default
    expected = [max(-zero_point * scale, -limit / 2), min((15 - zero_point) * scale, limit)]
    assert list(clip.args[1:]) == pytest.approx(expected)


def test_biases_are_constants(teacher: Teacher) -> None:
    program = integer_program(student_of(teacher))
    assert not [node for node in program.graph.nodes if torch.int32 in node.args]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_program_that_fails_verification_leaves_no_file(tmp_path: Path, teacher: Teacher, bank: SampleBank) -> None:
    with pytest.raises(VerificationError, match=r"PyTorch 2.*100.00 % of 96 samples, at least 101 % are required"):
        export_pt2(student_of(teacher, "w8a8"), tmp_path / "model.pt2", bank, min_agreement=101.0)
    assert not list(tmp_path.iterdir())


def test_a_name_without_pt2_is_refused(tmp_path: Path, teacher: Teacher) -> None:
    with pytest.raises(ConfigError, match=r"call it model\.pt2"):
        export_pt2(student_of(teacher), tmp_path / "model.onnx")


def test_the_scheme_of_the_paper_is_refused(tmp_path: Path, teacher: Teacher) -> None:
    with pytest.raises(UnsupportedModelError, match="quantize with scheme hardware"):
        export_pt2(student_of(teacher, scheme="paper"), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_a_missing_compiler_is_reported(tmp_path: Path, teacher: Teacher) -> None:
    with config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(ConfigError, match=r"no C\+\+ compiler found"):
        export_aotinductor(student_of(teacher), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


# --- machine code -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_package_runs_every_layer_in_an_integer_kernel(
    tmp_path: Path, teacher: Teacher, bank: SampleBank, toy_images: Tensor
) -> None:
    student = student_of(teacher, "w4a3")
    verification = export_aotinductor(student, tmp_path / "model.pt2", bank)
    comparison = verification.comparisons[0]
    assert comparison.identical >= 90  # 6 % where kernels do not clip to narrow grids; classes hardly change by that
    assert comparison.float_layers == ()
    assert comparison.integer_layers == verification.num_layers == len(teacher.layers)
    program = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))
    with torch.no_grad():
        for batch in (1, 3, 64):
            assert share_of_equal_classes(program(toy_images[:batch]), student(toy_images[:batch])) >= 0.98


@pytest.mark.slow
def test_layers_that_a_package_computes_in_floating_point_are_named(tmp_path: Path) -> None:
    student = shared.student_of("transposed convolution")
    assert export_aotinductor(student, tmp_path / "model.pt2").comparisons[0].float_layers == ("up",)


@pytest.mark.slow
def test_a_package_that_fails_verification_leaves_no_file(tmp_path: Path, teacher: Teacher) -> None:
    with pytest.raises(VerificationError, match="AOTInductor 2"):
        export_aotinductor(student_of(teacher), tmp_path / "model.pt2", min_agreement=101.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_package_that_inductor_gets_wrong_is_refused(tmp_path: Path) -> None:
    """Images of one channel: torch 2.13 compiles a correct program to another function."""
    student = Student(Teacher.capture(load_model("mnist_cnn"), MNIST), QuantizationSettings())
    student.initialize_ranges_([torch.randn(32, *MNIST.shape, generator=torch.Generator().manual_seed(0))])
    export_pt2(student, tmp_path / "program.pt2")
    with pytest.raises(VerificationError, match="AOTInductor 2"):
        export_aotinductor(student, tmp_path / "package.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["program.pt2"]
