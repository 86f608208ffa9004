"""LiteRT files: they compute what the student computes, and say what they are."""

import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qimera.config.bits import parse_bits
from qimera.config.settings import QuantizationSettings, SynthesisSettings
from qimera.errors import ConfigError, UnsupportedModelError, VerificationError
from qimera.export.comparison import compare
from qimera.litert import export as exporting
from qimera.litert.export import export_litert
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank
from qimera.teacher.teacher import Teacher
from tests import shared
from tests.networks import NETWORKS, SPEC, Head, Lambda

pytest.importorskip("ai_edge_litert", reason="pip install 'qimera[litert]'")

from qimera.litert import verification
from qimera.litert.runtime import Runtime, weights_in
from qimera.lowering.model import lower, lower_full_precision


def student_of(teacher: Teacher, bits: str = "w4a4", **settings: object) -> Student:
    weight_bits, activation_bits = parse_bits(bits)
    chosen = QuantizationSettings(weight_bits=weight_bits, activation_bits=activation_bits, **settings)
    return shared.fitted(teacher, shared.noise(32), chosen)


def channels_last(images: Tensor) -> np.ndarray:
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())


def assert_same(student: Student, images: Tensor, *, xnnpack: bool = True) -> None:
    """The student's logits up to rounding, on nearly every image."""
    with torch.no_grad():
        expected = student(images).numpy()
    actual = Runtime(lower(student).content(), xnnpack=xnnpack)(channels_last(images))
    difference = np.abs(actual - expected).max(1)
    assert (difference < 1e-4 * expected.std()).mean() >= 0.9
    assert difference.max() < 0.2 * expected.std()


def test_litert_itself_says_nothing(teacher: Teacher, capfd: pytest.CaptureFixture[str]) -> None:
    Runtime(lower(student_of(teacher)).content())
    assert capfd.readouterr() == ("", "")


# --- the file computes what the student computes ----------------------------------------------------------------------

PRODUCTS = {"many edges": 2, "transformer": 2}
"""Networks with products of activations, which are computed in floating point."""


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_of_any_network_runs_in_an_integer_kernel(name: str) -> None:
    student = shared.student_of(name)
    assert_same(student, shared.noise(24)[8:])
    lowered = lower(student)
    assert len(lowered.writer.float_layers) == PRODUCTS.get(name, 0)
    kernels = Runtime(lowered.content(), xnnpack=True).kernels()
    assert (kernels.partitions, kernels.outside) == (2, ("BATCH_MATMUL", "CAST"))


def test_a_file_is_compared_on_both_kinds_of_kernels(tmp_path: Path, teacher: Teacher, bank: SampleBank) -> None:
    verification = export_litert(student_of(teacher), tmp_path / "new" / "model.tflite", bank, time_full_precision=True)
    on_phones, built_in = verification.comparisons
    assert on_phones.agreement == 100
    assert on_phones.integer_layers == verification.num_layers == len(teacher.layers)
    assert (on_phones.partitions, on_phones.outside) == (2, ("BATCH_MATMUL", "CAST"))
    assert on_phones.latency_ms is not None
    assert on_phones.float_latency_ms is not None
    assert "round twice" in built_in.note
    assert verification.num_samples == len(bank)
    assert verification.num_bytes == (tmp_path / "new" / "model.tflite").stat().st_size


@pytest.mark.parametrize("bits", ["w2a2", pytest.param("w3a3", marks=pytest.mark.slow), "w5a6", "w8a8"])
def test_a_file_gives_the_students_logits_at_any_width(teacher: Teacher, toy_images: Tensor, bits: str) -> None:
    assert_same(student_of(teacher, bits), toy_images[:64])


class Odd(nn.Module):
    """What padding, pooling and moves can ask for: strides, dilation, edges, halves, and gates of floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.separable = nn.Conv2d(8, 16, (3, 1), padding=(1, 0), groups=8)
        self.up = nn.ConvTranspose2d(16, 4, 3, stride=2, padding=1)
        self.flat = nn.Linear(4 * 15 * 15, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.wide(x))
        x = F.max_pool2d(F.hardtanh(self.dilated(x), -0.3, 0.4), 3, 1, 1)
        first, second = self.separable(F.pad(x, (1, 0, 0, 1))[:, :, 1:, :-1]).chunk(2, 1)
        x = torch.cat([F.avg_pool2d(first, 3, 1, 1), F.hardsigmoid(second)], 1)
        x = F.relu6(self.up(x))
        return self.fc(F.gelu(self.flat(x.flatten(1))))


@pytest.mark.parametrize("bits", ["w4a4", "w8a8"])
def test_unusual_windows_and_moves_give_the_students_logits(bits: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = Teacher.capture(Odd().eval(), SPEC)
    assert_same(student_of(teacher, bits), shared.noise(48)[16:])


class Halves(nn.Module):
    """The two halves of a sum, whose axes change places before a function of floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.branch, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), Head(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        first, second = (x + self.branch(x)).chunk(2, 1)
        return self.head(torch.cat([torch.sigmoid(first.transpose(2, 3)), torch.tanh(second.transpose(2, 3))], 1))


def test_parts_of_a_sum_in_floating_point_can_be_moved_about() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = Teacher.capture(Halves().eval(), SPEC)
    assert_same(student_of(teacher), shared.noise(48)[16:])


@pytest.mark.parametrize("name", ["residual", "transposed convolution", "many edges", "transformer"])
def test_the_model_in_full_precision_is_the_teacher(name: str) -> None:
    student = shared.student_of(name)
    images = shared.noise(8)
    with torch.no_grad():
        expected = student.reference(images).numpy()
    actual = Runtime(lower_full_precision(student).content(), xnnpack=True)(channels_last(images))
    np.testing.assert_allclose(actual, expected, atol=1e-4 * expected.std())


def test_a_file_reads_the_pixels_of_a_camera(tmp_path: Path, teacher: Teacher, bank: SampleBank) -> None:
    student = student_of(teacher)
    export_litert(student, tmp_path / "model.tflite", bank, include_preprocessing=True)
    runtime = Runtime((tmp_path / "model.tflite").read_bytes(), xnnpack=True)
    pixels = bank.pixels[:16]
    with torch.no_grad():
        expected = student(SPEC.normalize(pixels)).numpy()
    np.testing.assert_allclose(runtime(channels_last(pixels)), expected, atol=1e-4 * expected.std())


def test_integer_logits_lie_on_a_grid_of_the_samples(tmp_path: Path, teacher: Teacher, bank: SampleBank) -> None:
    student = student_of(teacher)
    export_litert(student, tmp_path / "model.tflite", bank, integer_logits=True)
    runtime = Runtime((tmp_path / "model.tflite").read_bytes(), xnnpack=True)
    assert (runtime.kernels().partitions, runtime.kernels().outside) == (1, ())
    images = SPEC.normalize(bank.pixels)
    with torch.no_grad():
        expected = student(images).numpy()
    step = (expected.max() - expected.min()) / 255
    assert np.abs(runtime(channels_last(images)) - expected).max() <= 0.51 * step


def test_integer_logits_need_samples(tmp_path: Path, teacher: Teacher, bank: SampleBank) -> None:
    """Also where a bank is there: one that was made with images of the user's alone, and has not kept them."""
    nothing = SynthesisSettings(num_generated=0, num_optimized=0, num_held_out=0)
    empty = SampleBank.from_pixels(bank.pixels[:0], bank.soft_labels[:0], teacher, nothing, 0)
    for samples in (None, empty):
        with pytest.raises(ConfigError, match="their range comes from the samples of a bank, and there are none"):
            export_litert(student_of(teacher), tmp_path / "model.tflite", samples, integer_logits=True)
    assert not list(tmp_path.iterdir())


# --- its form ---------------------------------------------------------------------------------------------------------


def test_constants_lie_where_kernels_can_load_them(teacher: Teacher) -> None:
    content = lower(student_of(teacher)).content()
    weights = dict(weights_in(content))
    assert {"conv1.weight", "depthwise.weight", "fc.weight"} <= set(weights)
    for levels in weights.values():
        assert levels.min() >= -127
        assert content.index(levels.tobytes()) % 16 == 0


def test_the_archive_behind_the_model_names_classes_and_origin(tmp_path: Path, teacher: Teacher) -> None:
    labels = ["apple", "bear", "cat", "dog", "eel"]
    student = student_of(teacher)
    export_litert(student, tmp_path / "model.tflite", labels=labels)
    with zipfile.ZipFile(tmp_path / "model.tflite") as files:
        assert files.read("labels.txt").decode().split() == labels
        notes = json.loads(files.read("qimera.json"))
    assert notes["teacher_hash"] == student.teacher_hash
    assert notes["input_mean"] == list(SPEC.mean)
    assert notes["quantization"]["weight_bits"] == 4


def field(table: bytes, place: int, slot: int) -> int | None:
    """Return where a field of the table at ``place`` lies, by the format of flatbuffers alone."""
    of_fields = place - struct.unpack_from("<i", table, place)[0]
    if 4 + 2 * slot >= struct.unpack_from("<H", table, of_fields)[0]:
        return None
    offset = struct.unpack_from("<H", table, of_fields + 4 + 2 * slot)[0]
    return place + offset if offset else None


def followed(table: bytes, place: int, slot: int) -> int:
    """Return where the object begins that a field points to."""
    at = field(table, place, slot)
    assert at is not None
    return at + struct.unpack_from("<I", table, at)[0]


def only(table: bytes, place: int, slot: int) -> int:
    """Return where the only table of a list begins."""
    at = followed(table, place, slot)
    assert struct.unpack_from("<I", table, at)[0] == 1
    return at + 4 + struct.unpack_from("<I", table, at + 4)[0]


def floats(table: bytes, place: int, slot: int) -> list[float]:
    at = followed(table, place, slot)
    return list(struct.unpack_from(f"<{struct.unpack_from('<I', table, at)[0]}f", table, at + 4))


def test_android_reads_normalisation_and_labels_from_the_metadata(tmp_path: Path, teacher: Teacher) -> None:
    """Places of fields are those of metadata_schema.fbs (tflite-support), counted from 0."""
    export_litert(student_of(teacher), tmp_path / "model.tflite", labels=list("abcde"))
    content = (tmp_path / "model.tflite").read_bytes()
    start = content.index(b"M001") - 4
    table = content[start:]
    root = struct.unpack_from("<I", table)[0]
    assert b"without data" not in table  # which students of somebody's own images are not
    graph = only(table, root, 3)
    image, logits = only(table, graph, 2), only(table, graph, 3)
    content_of = followed(table, image, 3)
    kind = field(table, content_of, 0)
    assert kind is not None
    assert table[kind] == 2  # ImageProperties
    options = followed(table, only(table, image, 4), 1)
    mean, std = (np.array(floats(table, options, slot)) for slot in (0, 1))
    pixels = torch.tensor([0, 100, 255], dtype=torch.uint8).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    expected = SPEC.normalize(pixels)[0, :, 0].numpy()
    np.testing.assert_allclose((np.array([[0, 100, 255]]) - mean[:, None]) / std[:, None], expected, atol=1e-5)
    labels = only(table, logits, 6)
    name, role = followed(table, labels, 0), field(table, labels, 2)
    assert role is not None
    assert table[name + 4 : name + 14] == b"labels.txt"
    assert table[role] == 2  # TENSOR_AXIS_LABELS


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_file_that_disagrees_is_not_written(
    tmp_path: Path, teacher: Teacher, bank: SampleBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = student_of(teacher)
    spoilt = student_of(teacher)
    with torch.no_grad():
        spoilt.module.get_parameter("conv3.weight").neg_()
    wrong = lower(spoilt)
    monkeypatch.setattr("qimera.lowering.model.lower", lambda *_, **__: wrong)
    with pytest.raises(VerificationError, match=r"XNNPACK: file and student agree on .* first .* disagrees is conv3: "):
        export_litert(student, tmp_path / "model.tflite", bank)
    assert list(tmp_path.iterdir()) == []


def test_what_the_built_in_kernels_make_of_a_file_is_told_and_not_judged(
    tmp_path: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def upside_down(runtime: str, expected: np.ndarray, actual: np.ndarray, *others: object) -> object:
        return compare(runtime, expected, -actual if "built-in" in runtime else actual, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(verification, "compare", upside_down)
    found = export_litert(student_of(teacher), tmp_path / "model.tflite")
    assert found.comparisons[1].agreement < 50
    assert "they multiply sums by fixed-point numbers and round twice" in found.text()
    assert "partitions of XNNPACK: 2; outside of them: BATCH_MATMUL, CAST" in found.text()


def test_a_weight_of_minus_128_is_refused(tmp_path: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    student = shared.student_with_minus_128(teacher, monkeypatch)
    with pytest.raises(VerificationError, match=r"\.weight: .* weights are -128.* quantize again.* no file"):
        export_litert(student, tmp_path / "model.tflite")


class Sine(nn.Module):
    """A network with an operation that LiteRT's table does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), Head(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cumsum(self.conv(x), 1))


def test_what_has_no_counterpart_is_refused_by_name(tmp_path: Path) -> None:
    student = student_of(Teacher.capture(Sine().eval(), SPEC))
    with pytest.raises(UnsupportedModelError, match=r"cumsum: aten.cumsum.default has no counterpart in LiteRT"):
        export_litert(student, tmp_path / "model.tflite")


UNUSUAL = {
    "elu": (nn.ELU(0.5), "elu: aten.elu.default has no counterpart in LiteRT with these arguments"),
    "sum": (Lambda(lambda x: x.exp().sum(1, keepdim=True, dtype=torch.float32)), "sum_1: .* with these arguments"),
    "vector": (
        Lambda(lambda x, v: (x.permute(0, 2, 3, 1) @ v)[:, None], weight=torch.ones(4)),
        "LiteRT has no product of a matrix and a vector",
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_operations_with_unusual_arguments_are_refused_by_name(name: str) -> None:
    layer, message = UNUSUAL[name]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layer, Head(4 if name == "elu" else 1))
    with pytest.raises(UnsupportedModelError, match=message):
        lower(student_of(Teacher.capture(model.eval(), SPEC)))


def test_students_for_comparison_only_are_refused(tmp_path: Path, teacher: Teacher) -> None:
    with pytest.raises(UnsupportedModelError, match="integer kernels cannot run it"):
        export_litert(student_of(teacher, scheme="paper"), tmp_path / "model.tflite")


def test_what_is_missing_is_said(tmp_path: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'qimera\[litert\]'"):
        export_litert(student_of(teacher), tmp_path / "model.tflite")


def test_labels_must_fit(tmp_path: Path, teacher: Teacher) -> None:
    with pytest.raises(ConfigError, match="labels: 1 names for 5 classes"):
        export_litert(student_of(teacher), tmp_path / "model.tflite", labels=["one"])
    with pytest.raises(ConfigError, match=r"labels: 'b\\n' holds a line break"):
        export_litert(student_of(teacher), tmp_path / "model.tflite", labels=["a", "b\n", "c", "d", "e"])
