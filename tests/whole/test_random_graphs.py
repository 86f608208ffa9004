"""Random small networks at random bits: the exported file computes what the student computes."""

import random
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qimera.config.input_spec import InputSpec
from qimera.config.settings import LayerBits, QuantizationSettings
from qimera.export.onnx import export_onnx
from qimera.student.student import Student
from qimera.teacher.teacher import Teacher

SPEC = InputSpec(shape=(3, 13, 12), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
NUM_CLASSES = 4
ACTIVATIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "leaky": lambda x: F.hardtanh(x, -0.3, 2),
    "none": lambda x: x,
}
BLOCKS = ("conv", "depthwise", "grouped", "pointwise", "add", "shared", "concat", "maximum", "average", "gate")


class Unit(nn.Module):
    """Convolution, batch norm, activation function."""

    def __init__(self, draw: random.Random, inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=draw.random() < 0.3)
        self.bn = nn.BatchNorm2d(outputs)
        self.activation = ACTIVATIONS[draw.choice(list(ACTIVATIONS))]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.bn(self.conv(x)))


class Block(nn.Module):
    """One of ``BLOCKS``, from ``inputs`` channels to ``outputs``."""

    def __init__(self, draw: random.Random, inputs: int) -> None:
        super().__init__()
        self.kind = draw.choice(BLOCKS)
        self.outputs = inputs
        if self.kind in ("conv", "pointwise"):
            self.outputs = draw.choice((4, 6, 8))
            self.unit = Unit(draw, inputs, self.outputs, 3 if self.kind == "conv" else 1)
        elif self.kind in ("depthwise", "grouped"):
            self.unit = Unit(draw, inputs, inputs, groups=inputs if self.kind == "depthwise" else 2)
        elif self.kind in ("add", "shared", "concat"):
            self.unit, self.other = Unit(draw, inputs, inputs), Unit(draw, inputs, inputs, 1)
            self.outputs = 2 * inputs if self.kind == "concat" else inputs
        elif self.kind == "gate":
            self.squeeze = nn.Linear(inputs, inputs)

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "add":
                return F.relu(self.unit(x) + x)
            case "shared":
                return self.unit(x) + self.other(x)
            case "concat":
                return torch.cat([self.unit(x), self.other(x)], 1)
            case "maximum":
                return F.max_pool2d(x, 3, stride=1, padding=1)
            case "average":
                return F.avg_pool2d(x, 2, stride=1)
            case "gate":
                return x * torch.sigmoid(self.squeeze(x.mean((2, 3))))[:, :, None, None]
        return self.unit(x)


class RandomNet(nn.Module):
    """A stem, one to five random blocks, pooling, a hidden layer now and then, and a classifier."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.stem = Unit(draw, 3, 4)
        self.blocks, channels = nn.ModuleList(), 4
        for _ in range(draw.randint(1, 5)):
            if channels > 16:
                break
            self.blocks.append(Block(draw, channels))
            channels = self.blocks[-1].outputs
        self.pooling = draw.choice(("adaptive", "mean", "maximum"))
        self.hidden = nn.Linear(channels, channels) if draw.random() < 0.3 else None
        self.fc = nn.Linear(channels, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        if self.pooling == "adaptive":
            x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        else:
            x = x.mean((2, 3)) if self.pooling == "mean" else F.max_pool2d(x, x.shape[2:]).flatten(1)
        if self.hidden is not None:
            x = F.relu(self.hidden(x))
        return self.fc(x)


def random_student(seed: int) -> Student:
    """Return the student of a random network with random bits, its ranges fitted to noise."""
    draw = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RandomNet(draw).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.1, 1)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
    layer_bits = (LayerBits(pattern="*conv", weight_bits=draw.randint(2, 8), activation_bits=draw.randint(2, 8)),)
    settings = QuantizationSettings(
        weight_bits=draw.randint(2, 8),
        activation_bits=draw.randint(2, 8),
        layer_bits=layer_bits if draw.random() < 0.3 else (),
    )
    student = Student(Teacher.capture(model, SPEC), settings)
    student.initialize_ranges_([torch.randn(16, *SPEC.shape, generator=torch.Generator().manual_seed(seed))])
    return student


def check(seed: int, folder: Path) -> None:
    """Export a random student and hold the file to it."""
    student = random_student(seed)
    verification = export_onnx(student, folder / "model.onnx", min_agreement=0.0)
    assert verification.comparisons[0].float_layers == ()
    images = torch.randn(32, *SPEC.shape, generator=torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        expected = student(images).numpy()
    (actual,) = onnxruntime.InferenceSession(folder / "model.onnx").run(None, {"input": images.numpy()})
    assert_near(actual, expected)


def check_for_phones(seed: int) -> None:
    """Hold the LiteRT file of a random student to it, on XNNPACK."""
    pytest.importorskip("ai_edge_litert", reason="pip install 'qimera[litert]'")
    from qimera.litert.runtime import Runtime
    from qimera.lowering.model import lower

    student = random_student(seed)
    lowered = lower(student)
    assert lowered.writer.float_layers == []
    images = torch.randn(32, *SPEC.shape, generator=torch.Generator().manual_seed(seed + 1))
    actual = Runtime(lowered.content(), xnnpack=True)(np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy()))
    with torch.no_grad():
        assert_near(actual, student(images).numpy())


def assert_near(actual: np.ndarray, expected: np.ndarray) -> None:
    """The edge of a level, crossed by the last bit of a product of steps, may move a sample: seldom, and not far."""
    difference = np.abs(actual - expected).max(1)
    assert (difference < 1e-4 * expected.std()).mean() >= 0.8
    assert difference.max() < 0.5 * expected.std()
    margin = np.diff(np.sort(expected, axis=1)[:, -2:], axis=1)[:, 0]
    assert ((actual.argmax(1) == expected.argmax(1)) | (margin < 2 * difference)).all()


@pytest.mark.parametrize("seed", range(6))
def test_a_random_network_is_exported_as_it_is(seed: int, tmp_path: Path) -> None:
    check(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 206))
def test_two_hundred_random_networks_are_exported_as_they_are(seed: int, tmp_path: Path) -> None:
    check(seed, tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_a_random_network_runs_on_phones_as_it_is(seed: int) -> None:
    check_for_phones(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 204))
def test_two_hundred_random_networks_run_on_phones_as_they_are(seed: int) -> None:
    check_for_phones(seed)
