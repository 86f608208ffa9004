import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qimera.config.input_spec import InputSpec
from qimera.config.settings import QuantizationSettings
from qimera.export.onnx_model import onnx_model
from qimera.quantization.sizes import packed_bytes, stored_layers, unquantized_bytes
from qimera.student.student import Student
from qimera.teacher.teacher import Teacher
from tests import shared
from tests.networks import SPEC, Head

GRAY = InputSpec(shape=(1, 8, 8), mean=(0.5,), std=(0.25,))


def said(model: nn.Module, bits: int, spec: InputSpec = SPEC) -> int:
    teacher = Teacher.capture(model, spec)
    return packed_bytes(teacher, QuantizationSettings(weight_bits=bits))


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_a_file_holds_weights_at_their_bits_and_for_each_channel_a_scale_and_a_bias_on_a_grid_of_its_own() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 6 * 6, 3))
    assert said(model, 4, GRAY) == (8 * 9 + 3 * 288) // 2 + (8 + 3) * (4 + 4 + 4)


def test_a_layer_without_a_bias_holds_none() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.Flatten(), nn.Linear(288, 3, bias=False))
    assert said(model, 8, GRAY) == 8 * 9 + 3 * 288 + (8 + 3) * 4


class CalledTwice(nn.Module):
    """A layer that is called twice in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.again(self.stem(x).relu()).relu()).relu())


def test_a_layer_that_is_called_twice_is_stored_once_with_a_bias_for_each_call() -> None:
    stem, again, head = 8 * 27 + 8 * 12, 8 * 72 + 8 * 4 + 2 * 8 * 8, 8 * 5 + 5 * 12
    assert said(CalledTwice(), 8) == stem + again + head


def test_a_layer_is_stored_for_each_batch_norm_that_is_folded_into_it() -> None:
    teacher = shared.teacher_of("shared convolution")
    stored = stored_layers(teacher.module)["conv"]
    assert stored.num_weights == (6 * 6 * 9,) * 3
    assert (stored.num_scales, stored.num_biases) == (18, 18)


def test_batch_norms_that_stay_hold_a_factor_and_an_offset_per_channel() -> None:
    teacher = shared.teacher_of("norms before convolutions")
    assert unquantized_bytes(teacher.module) == 3 * 6 * 2 * 4


def test_a_batch_norm_of_tokens_is_no_part_of_the_layer_before_it() -> None:
    """It holds a factor and an offset for each of 3 tokens, and the layer a scale and a bias for each of 4 features."""
    model = nn.Sequential(nn.Flatten(2), nn.Linear(64, 4), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(12, 2))
    teacher = Teacher.capture(model, InputSpec(shape=(3, 8, 8), mean=(0.5,) * 3, std=(0.25,) * 3))
    assert stored_layers(teacher.module)["1"].num_biases == 4
    assert unquantized_bytes(teacher.module) == 3 * 2 * 4


def test_scales_of_a_transposed_convolution_are_for_its_output_channels() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2, groups=1), nn.ReLU(), Head(4))
    assert said(model, 8) == 3 * 4 * 4 + 4 * 12 + 4 * 5 + 5 * 12


# --- beside real files ------------------------------------------------------------------------------------------------


class EveryKind(nn.Module):
    """Convolutions, groups, a transposed and a shared one, tokens with positions, a layer norm and a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 48, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(48)
        self.grouped, self.shared = nn.Conv2d(48, 48, 3, groups=2), nn.Conv2d(48, 48, 3, padding=1)
        self.before, self.up = nn.BatchNorm2d(48), nn.ConvTranspose2d(48, 64, 2, stride=2)
        self.positions = nn.Parameter(torch.randn(1, 144, 64))
        self.tokens, self.wide = nn.LayerNorm(64), nn.Linear(64, 256)
        self.narrow, self.scale = nn.Linear(256, 64), nn.Parameter(torch.randn(64))
        self.head = nn.Linear(64, 10)
        self.register_buffer("mask", torch.rand(144, 64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(F.relu(self.norm(self.stem(x))))
        x = F.relu(self.before(F.relu(x)))
        x = self.up(F.relu(self.shared(F.relu(self.shared(x)))))
        x = x.flatten(2).transpose(1, 2) + self.positions
        x = x + self.scale * self.narrow(F.relu(self.wide(self.tokens(x)))) * self.mask
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def every_kind() -> Teacher:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = EveryKind()
        for norm in (model.norm, model.before):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return Teacher.capture(model, SPEC)


@pytest.mark.parametrize("bits", [3, 4, 8, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (2, 6))])
def test_bytes_told_are_those_that_the_file_holds(every_kind: Teacher, bits: int) -> None:
    settings = QuantizationSettings(weight_bits=bits, activation_bits=8)
    student = Student(every_kind, settings)
    student.initialize_ranges_([torch.randn(8, *SPEC.shape, generator=torch.Generator().manual_seed(0))])
    file = ir.to_proto(onnx_model(student))
    assert isinstance(file, onnx.ModelProto)
    expected = packed_bytes(every_kind, settings)
    held = sum(len(tensor.raw_data) for tensor in file.graph.initializer)
    assert held == pytest.approx(expected, rel=0.03)  # zero points, steps of activations, and what unpacks weights
    assert len(file.SerializeToString()) - held < 15_000  # the description of operations, whatever the bits
