"""equalization.py: channels scaled between two layers, so that the quiet ones use their tensor's grid."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qimera import QuantizationSettings, Student, Teacher
from qimera.export.onnx import export_onnx
from qimera.graph.nodes import WEIGHTED
from qimera.student.equalization import Edge, candidate_scales, edge_into
from tests import shared
from tests.networks import NUM_CLASSES, SPEC, Head


class Uneven(nn.Module):
    """Depthwise layers whose channels differ two hundredfold, behind ReLU6, padding and pooling; a skipped block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, stride=2, groups=16, bias=False)
        self.pointwise = nn.Conv2d(16, 24, 1)
        self.around = nn.Conv2d(24, 24, 3, padding=1)
        self.fc = nn.Linear(24 * 4, NUM_CLASSES)
        with torch.no_grad():
            self.norm.weight.copy_(torch.logspace(-2, 0.3, 16))
            self.norm.bias.copy_(self.norm.weight)
            self.norm.bias[-4:] = 4.0
            self.depthwise.weight /= self.norm.weight.view(-1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.conv(x)))
        x = F.relu(self.pointwise(F.hardtanh(self.depthwise(F.pad(x, (0, 1, 0, 1))), 0.0, 6.0)))
        x = F.relu(x + self.around(x))
        return self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))


@pytest.fixture(scope="module")
def uneven() -> Teacher:
    torch.manual_seed(0)
    model = Uneven()
    model.train()(images_of(0, 256))
    model.norm.momentum = 1.0
    model(images_of(0, 256))
    return Teacher.capture(model, SPEC)


def images_of(seed: int, count: int = 32) -> Tensor:
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(16, 16), mode="bilinear")


def student_of(teacher: Teacher, bits: int = 4, *, equalize: bool = True) -> Student:
    student = Student(teacher, QuantizationSettings(weight_bits=bits, activation_bits=bits))
    student.initialize_layers_(images_of(0), torch.Generator().manual_seed(0), equalize=equalize)
    return student


def edges_of(teacher: Teacher) -> dict[str, Edge]:
    """Return the edge into each layer that has one, by the layer's name."""
    student = Student(teacher, QuantizationSettings())
    layers = [node for node in student.module.graph.nodes if node.target in WEIGHTED]
    edges = {student.layer_names()[layer.name]: edge_into(student.module, layer) for layer in layers}
    return {name: edge for name, edge in edges.items() if edge is not None}


# --- where channels can be scaled -------------------------------------------------------------------------------------


def test_edges_lead_through_clamps_and_padding_and_end_where_others_read(uneven: Teacher) -> None:
    edges = edges_of(uneven)
    assert {name: edge.limit for name, edge in edges.items()} == {"depthwise": 6.0, "pointwise": 6.0}


def test_a_pooled_and_flattened_map_reaches_the_classifier() -> None:
    class Flattening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3)
            self.norm = nn.BatchNorm2d(6)
            self.fc = nn.Linear(6 * 4, NUM_CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.avg_pool2d(F.relu(self.norm(self.conv(x))), 7).flatten(1))

    assert list(edges_of(Teacher.capture(Flattening(), SPEC))) == ["fc"]


@pytest.mark.parametrize(
    ("name", "readers"),
    [
        ("shared convolution", ["conv", "conv@1", "conv@2", "head.fc"]),  # folded norms make three of it
        ("norms before convolutions", ["convs.1", "convs.3"]),
        ("convolution read twice", []),
        ("residual", ["conv3", "pointwise", "fc"]),
        ("transposed convolution", []),
        ("transformer", ["qkv", "up"]),  # the last norm is read at one token
    ],
)
def test_only_tensors_between_two_layers_of_their_own_are_edges(name: str, readers: list[str]) -> None:
    assert list(edges_of(shared.teacher_of(name))) == readers


def test_a_weight_that_two_layers_read_is_not_scaled_for_one_of_them() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.again, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, NUM_CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.again(F.relu(self.again(F.relu(self.conv(x))))))
            return self.fc(x.mean((2, 3)))

    assert edges_of(Teacher.capture(Twice(), SPEC)) == {}


class Clamped(nn.Module):
    """An activation function that clamps on both sides of zero, and one that does not reach zero."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 6, 1)
        self.limits = low, high
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(self.norm(self.stem(x)), *self.limits)
        return self.head(F.sigmoid(self.conv(x)))


@pytest.mark.parametrize(("low", "high", "limit"), [(-1.0, 1.0, None), (0.5, 2.0, None), (0.0, 2.0, 2.0)])
def test_only_functions_in_proportion_from_zero_on_are_passed(low: float, high: float, limit: float | None) -> None:
    edges = edges_of(Teacher.capture(Clamped(low, high).eval(), SPEC))
    assert {name: edge.limit for name, edge in edges.items()} == ({} if limit is None else {"conv": limit})


# --- what is scaled ---------------------------------------------------------------------------------------------------


def test_scales_fill_the_range_and_saturated_channels_keep_theirs(uneven: Teacher) -> None:
    values = (
        torch.rand(64, 16, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 0, 16)[:, None, None]
    )
    values[:, 0] *= 1e-3
    values[:, 15] = (600 * values[:, 15]).clamp(max=6)
    none, full = candidate_scales(edges_of(uneven)["depthwise"], values, 255)
    assert none.eq(1).all()
    reach = (values * full.view(-1, 1, 1)).amax((0, 2, 3))
    assert full[15] == 1
    assert full[0] == 8  # next to nothing stays so
    assert ((reach <= 6.05) | (full == 1)).all()
    assert (reach[full < 8] > 5.9).all()


def test_few_levels_are_not_spread_as_far_as_rare_values_reach(uneven: Teacher) -> None:
    """A channel reaches as far as a grid of its own best would: short of its largest values, where levels are few."""
    values = torch.randn(64, 16, 8, 8, generator=torch.Generator().manual_seed(0)).relu()
    depthwise = edges_of(uneven)["depthwise"]
    (_, at_4_bits), (_, at_8_bits) = (candidate_scales(depthwise, values, steps) for steps in (15, 255))
    largest = values.amax((0, 2, 3))
    assert (6 / at_4_bits < 0.95 * largest).all()
    assert (at_8_bits < 0.95 * at_4_bits).all()


def test_weights_are_quantized_once_their_columns_may_have_been_scaled(uneven: Teacher) -> None:
    student = Student(uneven, QuantizationSettings())
    nodes = list(student.module.graph.nodes)
    for layer in (node for node in nodes if node.target in WEIGHTED):
        entering, weight = layer.args[:2]
        assert nodes.index(entering) < nodes.index(weight) < nodes.index(layer)


def test_reference_gives_the_teachers_logits_whatever_was_scaled(uneven: Teacher) -> None:
    student = student_of(uneven)
    weight, before = (graph.get_parameter("depthwise.weight") for graph in (student.reference, uneven.module))
    assert float((weight / before - 1).abs().max()) > 0.5  # something was
    images = 3 * images_of(1)  # so that many values meet the clamp
    with torch.no_grad():
        torch.testing.assert_close(student.reference(images), uneven(images), rtol=1e-4, atol=1e-4)  # float32 sums


@pytest.mark.parametrize("bits", [4, 5])
def test_quiet_channels_survive_few_levels(uneven: Teacher, bits: int) -> None:
    images = images_of(1)

    def error(*, equalize: bool) -> float:
        with torch.no_grad():
            mine, theirs = student_of(uneven, bits, equalize=equalize)(images), uneven(images)
        return float((mine - theirs).square().mean())

    assert error(equalize=True) < 0.7 * error(equalize=False)


def test_the_integers_of_the_scaled_layer_stay_as_they_are(uneven: Teacher) -> None:
    """What a layer writes is the same in steps, larger or smaller: its weight moves with the step."""
    student = student_of(uneven)
    for weight, step in student.weight_steps():
        levels = (weight / step).detach()
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)


def test_a_student_is_rebuilt_from_its_teacher_and_its_file(uneven: Teacher, tmp_path: Path) -> None:
    student = student_of(uneven)
    student.save_state(tmp_path / "student.safetensors")
    loaded = Student.load_state(tmp_path / "student.safetensors", uneven, student.settings)
    with torch.no_grad():
        assert torch.equal(loaded(images_of(1)), student(images_of(1)))


def test_the_file_runs_in_integers_and_agrees(uneven: Teacher, tmp_path: Path) -> None:
    comparison = export_onnx(student_of(uneven), tmp_path / "model.onnx").comparisons[0]
    assert comparison.agreement == 100
    assert comparison.float_layers == ()


def test_the_same_generator_gives_the_same_scales(uneven: Teacher) -> None:
    first, second = (student_of(uneven).module.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- layer norms ------------------------------------------------------------------------------------------------------


class UnevenTokens(nn.Module):
    """A layer norm whose channels differ a hundredfold, as in many transformers, before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16)
        self.up, self.head = nn.Linear(16, 32), nn.Linear(32, NUM_CLASSES)
        with torch.no_grad():
            self.norm.weight.copy_(torch.logspace(-1, 1, 16))
            self.up.weight /= self.norm.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.up(self.norm(self.patches(x).flatten(2).transpose(1, 2)))).mean(1))


@pytest.fixture(scope="module")
def uneven_tokens() -> Teacher:
    torch.manual_seed(0)
    return Teacher.capture(UnevenTokens(), SPEC)


def test_channels_of_a_layer_norm_are_scaled_and_quiet_ones_survive(uneven_tokens: Teacher, tmp_path: Path) -> None:
    assert list(edges_of(uneven_tokens)) == ["up"]
    images = images_of(1)
    plain, scaled = (student_of(uneven_tokens, equalize=each) for each in (False, True))
    with torch.no_grad():
        expected = uneven_tokens(images)
        errors = [float((student(images) - expected).square().mean()) for student in (plain, scaled)]
        torch.testing.assert_close(scaled.reference(images), expected, rtol=1e-4, atol=1e-4)  # float32 sums
    (scales,) = scaled.channel_scales.values()
    assert float(scales[0]) > float(scales[-1]) == 1
    assert errors[1] < 0.7 * errors[0]
    scaled.save(tmp_path / "student.safetensors")
    assert torch.equal(Student.load(tmp_path / "student.safetensors")(images), scaled(images))


class Interleaved(nn.Module):
    """A branch that is read only after a layer of the other branch has run."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.early, self.late = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.other, self.head = nn.Conv2d(8, 8, 3, padding=1), Head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        branch = F.relu(self.early(x))
        other = self.other(x)
        return self.head(torch.cat([self.late(branch), other], 1))


def test_a_branch_that_others_have_overtaken_is_rounded_as_it_is() -> None:
    torch.manual_seed(0)
    teacher = Teacher.capture(Interleaved(), SPEC)
    assert edges_of(teacher)["late"].end.name == "relu_1"
    student = student_of(teacher, 8)
    images = images_of(1)
    with torch.no_grad():
        assert (student(images) - teacher(images)).abs().max() < 0.1 * teacher(images).abs().max()
