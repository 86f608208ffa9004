import json
import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._traceback import CapturedTraceback

from qimera.config.bits import parse_bits, parse_layer_bits
from qimera.config.settings import QuantizationSettings
from qimera.errors import ConfigError, UnsupportedModelError, VerificationError
from qimera.export.onnx import export_onnx
from qimera.export.onnx_model import onnx_model
from qimera.export.verification import onnx_runtime
from qimera.quantization.fake_quantize import LearnedStepFakeQuantize
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank
from qimera.teacher.teacher import Teacher
from tests import shared
from tests.networks import NETWORKS, SPEC, Head, Lambda, calibrated, toy_pixels


def student_of(teacher: Teacher, bits: str = "w4a4", scheme: str = "hardware") -> Student:
    weight_bits, activation_bits = parse_bits(bits)
    settings = QuantizationSettings(weight_bits=weight_bits, activation_bits=activation_bits, scheme=scheme)
    return shared.fitted(teacher, shared.noise(32), settings)


def logits_of(path: Path, inputs: np.ndarray, **options: object) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, **options)
    return session.run(["logits"], {session.get_inputs()[0].name: inputs})[0]


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
    """Sums are exact on both sides; the formulas that round them differ now and then."""
    difference = np.abs(actual - expected).max(1)
    assert (difference < 1e-5 * expected.std()).mean() >= 0.95
    assert difference.max() < 0.1 * expected.std()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, teacher: Teacher) -> Path:
    """The file of a W4A4 student; PyTorch noted where each node of its graph was made, as it does outside of tests."""
    path = tmp_path_factory.mktemp("exported") / "new" / "model.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.fx.proxy, "CapturedTraceback", CapturedTraceback)
        export_onnx(student_of(teacher), path)
    return path


def operations(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


# --- the file computes what the student computes ----------------------------------------------------------------------


@pytest.mark.parametrize("bits", ["w2a2", pytest.param("w3a3", marks=pytest.mark.slow), "w4a4", "w5a6", "w8a8"])
def test_a_file_gives_the_students_logits_on_real_integers(
    tmp_path: Path, teacher: Teacher, bank: SampleBank, toy_images: Tensor, bits: str
) -> None:
    student = student_of(teacher, bits)
    verification = export_onnx(student, tmp_path / "model.onnx", bank)
    with torch.no_grad():
        expected = student(toy_images[:64]).numpy()
    assert_same(logits_of(tmp_path / "model.onnx", toy_images[:64].numpy()), expected)
    comparison = verification.comparisons[0]
    assert comparison.identical >= 98
    assert comparison.integer_layers == verification.num_layers == len(teacher.layers)
    assert verification.num_bytes == (tmp_path / "model.onnx").stat().st_size
    assert verification.num_samples == len(bank)


def test_the_kernels_of_a_target_run_every_layer(tmp_path: Path, bank: SampleBank, teacher: Teacher) -> None:
    pytest.importorskip("openvino", reason="an optional runtime")
    student = Student(teacher, QuantizationSettings(weight_bits=4, activation_bits=4, target="openvino"))
    student.initialize_ranges_([bank.input_spec.normalize(bank.pixels[:64])])
    verification = export_onnx(student, tmp_path / "model.onnx", bank, min_agreement=95.0)
    elsewhere, there = sorted(verification.comparisons, key=lambda each: each.runtime)
    assert there.float_layers == ()
    assert elsewhere.float_layers == ("conv3",)  # the convolution before an addition, which returns sums


WITHOUT_KERNEL = {
    "transposed convolution": ("up",),  # there is none in ONNX Runtime
}


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in WITHOUT_KERNEL])
def test_every_layer_of_any_network_runs_in_an_integer_kernel(tmp_path: Path, name: str) -> None:
    student = shared.student_of(name)
    verification = export_onnx(student, tmp_path / "model.onnx")
    assert verification.comparisons[0].float_layers == ()
    assert verification.comparisons[0].identical >= 98


def test_the_kernel_of_a_product_scales_it(tmp_path: Path) -> None:
    """Attention divides its products by the square root of their width, which no operation is left to do."""
    student = shared.student_of("transformer")
    assert torch.ops.aten.mul.Tensor in {node.target for node in student.module.graph.nodes}
    path = tmp_path / "model.onnx"
    export_onnx(student, path)
    assert "Softmax" in operations(path)
    assert "Mul" not in operations(path)


@pytest.mark.parametrize("name", WITHOUT_KERNEL)
def test_layers_without_integer_kernel_are_named(tmp_path: Path, name: str) -> None:
    student = shared.student_of(name)
    verification = export_onnx(student, tmp_path / "model.onnx")
    assert verification.comparisons[0].float_layers == WITHOUT_KERNEL[name]
    assert f"in floating point: {WITHOUT_KERNEL[name][0]}" in verification.text()


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_the_batch_is_dynamic(file: Path, toy_images: Tensor, batch: int) -> None:
    assert logits_of(file, toy_images[:batch].numpy()).shape == (batch, 5)


# --- its form ---------------------------------------------------------------------------------------------------------


def test_activations_are_clipped_as_integers(file: Path) -> None:
    model = onnx.load(file)
    values = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    clips = [node for node in model.graph.node if node.op_type == "Clip"]
    assert clips
    for clip in clips:
        assert [values[name].dtype for name in clip.input[1:]] == [np.uint8, np.uint8]
        assert int(values[clip.input[2]]) <= 15


def test_relu6_and_relu_are_left_to_the_integer_grids(tmp_path: Path, teacher: Teacher) -> None:
    export_onnx(student_of(teacher, "w8a8"), tmp_path / "model.onnx")
    assert "Relu" not in operations(tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    types = {each.name: each.data_type for each in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Clip":
            assert types[node.input[1]] == onnx.TensorProto.UINT8


LIMITS = (0.5, 6.0, 100.0)


class Clipped(nn.Module):
    """Branches that are clipped at 0.5, at 6 and at 100; a layer behind each clip reads a grid of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in LIMITS)
        self.second, self.head = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in LIMITS), Head(4 * len(LIMITS))

    def forward(self, x: Tensor) -> Tensor:
        branches = zip(LIMITS, self.first, self.second, strict=True)
        clipped = [second(F.hardtanh(first(x), -limit / 2, limit)) for limit, first, second in branches]
        return self.head(torch.cat(clipped, 1))


@pytest.fixture(scope="module")
def clipped() -> Teacher:
    return Teacher.capture(Clipped(), SPEC)


@pytest.mark.parametrize("bits", ["w8a8", "w4a3"])
@pytest.mark.parametrize("growth", [1.0, 1.8])
def test_a_clip_inside_or_outside_of_the_grid_is_absorbed_exactly(
    tmp_path: Path, clipped: Teacher, bits: str, growth: float
) -> None:
    student = student_of(clipped, bits)
    for quantizer in student.module.modules():
        if isinstance(quantizer, LearnedStepFakeQuantize) and quantizer.log_scale.numel() == 1:
            quantizer.log_scale.data += math.log(growth)  # as training does: the grid reaches beyond the clip
    export_onnx(student, tmp_path / "model.onnx")
    images = 3 * torch.randn(32, *SPEC.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = student(images).numpy()
    assert_same(logits_of(tmp_path / "model.onnx", images.numpy()), expected)


class Wide(nn.Module):
    """A layer of 129 inputs and outputs for each of the numbers of bits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 129, 3), nn.BatchNorm2d(129), Head(129)
        self.of2, self.of3, self.of4, self.of6 = (nn.Conv2d(129, 129, 3, padding=1, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        for layer in (self.of2, self.of3, self.of4, self.of6):
            x = F.relu(layer(x))
        return self.head(x)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Student, Path]:
    """A student with layers of several bits, and its file."""
    rules = parse_layer_bits("of2=w2a4,of3=w3a4,of4=w4a4,of6=w6a4")
    student = Student(Teacher.capture(Wide(), SPEC), QuantizationSettings(layer_bits=rules))
    student.initialize_ranges_([shared.noise()])
    path = tmp_path_factory.mktemp("wide") / "model.onnx"
    export_onnx(student, path)
    return student, path


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_weights_take_the_bits_that_they_have(wide: tuple[Student, Path], bits: int) -> None:
    student, path = wide
    model, name = onnx.load(path), f"of{bits}"
    packed = {each.name: each for each in model.graph.initializer}
    weight = packed[f"{name}.weight.int{bits}"]
    assert len(weight.raw_data) == -(-129 * 129 * 9 // 8) * bits - (bits == 4) * 3
    integers = dict(student.converted().named_buffers())[f"{name}.weight"]
    # the name of the expanded tensor is what the DequantizeLinear in front of the layer reads
    layer = next(node for node in model.graph.node if node.name == name)
    dequantize = next(node for node in model.graph.node if node.output[0] == layer.input[1])
    model.graph.output.append(onnx.ValueInfoProto(name=dequantize.input[0]))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    _, expanded = session.run(None, {"input": np.zeros((1, *SPEC.shape), np.float32)})
    assert expanded.dtype == np.int8
    assert np.array_equal(expanded, integers.numpy())


def test_values_that_were_moved_about_stay_integers(file: Path, teacher: Teacher) -> None:
    """The classifier behind a Reshape is an integer kernel too."""
    _, float_layers = onnx_runtime(file, [layer.name for layer in teacher.layers])
    assert float_layers == []


BETWEEN = {
    "a roll, which is two slices and their concatenation": lambda x: x.roll((1, 2), (2, 3)),
    "a sum over products": lambda x: torch.einsum("bchw,bdhw->bcd", x, x.tanh())[..., None].expand(-1, -1, -1, 3),
    "a product with a table": lambda x: torch.einsum("bchw,hwv->bchv", x, torch.linspace(-1, 1, 588).view(14, 14, 3)),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_lies_between_layers_stays_in_integers(tmp_path: Path, name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Lambda(BETWEEN[name]), nn.Conv2d(8, 8, 3), Head(8))
    student = student_of(Teacher.capture(calibrated(model), SPEC), "w8a8")
    onnx_runtime = export_onnx(student, tmp_path / "model.onnx").comparisons[0]
    assert onnx_runtime.float_layers == ()
    assert onnx_runtime.identical >= 98


def test_the_metadata_says_what_a_device_team_asks(tmp_path: Path, teacher: Teacher) -> None:
    labels = ["apple", "bear", "cat", "dog", "eel"]
    export_onnx(student_of(teacher, "w3a5"), tmp_path / "model.onnx", labels=labels)
    metadata = onnxruntime.InferenceSession(tmp_path / "model.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(metadata["qimera.labels"]) == labels
    assert json.loads(metadata["qimera.input_mean"]) == list(SPEC.mean)
    assert json.loads(metadata["qimera.input_std"]) == list(SPEC.std)
    assert metadata["qimera.teacher_hash"] == teacher.hash
    assert QuantizationSettings.model_validate_json(metadata["qimera.quantization"]).weight_bits == 3


def test_nothing_of_the_exporting_machine_is_in_the_file(file: Path) -> None:
    content = file.read_bytes()
    for trace in (b"site-packages", b"pkg.torch", b"/home", str(file.parent).encode()):
        assert trace not in content


def test_with_preprocessing_a_file_reads_camera_bytes(tmp_path: Path, teacher: Teacher, bank: SampleBank) -> None:
    student = student_of(teacher)
    verification = export_onnx(student, tmp_path / "model.onnx", bank, include_preprocessing=True)
    assert verification.comparisons[0].agreement == 100
    pixels, _ = toy_pixels(16, seed=3)
    with torch.no_grad():
        expected = student(SPEC.normalize(pixels)).numpy()
    nhwc = np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())
    assert_same(logits_of(tmp_path / "model.onnx", nhwc), expected)


def test_parameters_may_have_names_that_the_file_uses_itself() -> None:
    names = ("v1", "input", "logits", "pixels")

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), Head(4)
            for factor, name in enumerate(names, 1):
                self.register_parameter(name, nn.Parameter(torch.full((4, 1, 1), 1 / factor)))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.sigmoid(self.conv(x))
            for name in names:
                x = x * self.get_parameter(name)
            return self.head(x)

    student = student_of(Teacher.capture(Scaled().eval(), SPEC))
    onnx_model(student, include_preprocessing=True)  # which the checker of onnx has seen
    images = shared.noise(8)
    session = onnxruntime.InferenceSession(ir.to_proto(onnx_model(student)).SerializeToString())
    assert_same(session.run(None, {"input": images.numpy()})[0], student(images).numpy())


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reads_pixels", [False, True])
def test_a_file_that_disagrees_is_not_handed_over(
    tmp_path: Path, teacher: Teacher, bank: SampleBank, *, reads_pixels: bool
) -> None:
    """The student changes between translation and comparison: as if the file computed something else."""
    student = student_of(teacher)
    model = onnx_model(student)

    class Changed(Student):
        def converted(self) -> torch.fx.GraphModule:
            weight = self.module.get_parameter("conv3.weight")
            with torch.no_grad():
                kept = weight.clone()
                weight.neg_()
                result = super().converted()
                weight.copy_(kept)
            return result

    assert isinstance(model, ir.Model)
    student.__class__ = Changed
    with pytest.raises(VerificationError, match=r"agree on .* the first layer that disagrees is conv3: .* no file"):
        export_onnx(student, tmp_path / "model.onnx", bank, include_preprocessing=reads_pixels)
    assert list(tmp_path.iterdir()) == []


def test_labels_must_be_as_many_as_classes(tmp_path: Path, teacher: Teacher) -> None:
    with pytest.raises(ConfigError, match="labels: 2 names for 5 classes"):
        export_onnx(student_of(teacher), tmp_path / "model.onnx", labels=["a", "b"])


def test_the_paper_scheme_is_refused(tmp_path: Path, teacher: Teacher) -> None:
    with pytest.raises(UnsupportedModelError, match="scheme paper"):
        export_onnx(student_of(teacher, scheme="paper"), tmp_path / "model.onnx")
