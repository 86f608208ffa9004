"""Students made for LiteRT's kernels, against these: the same logits, whatever the network."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qimera.config.bits import parse_bits
from qimera.config.settings import QuantizationSettings
from qimera.student.student import Student
from qimera.teacher.teacher import Teacher
from tests import shared
from tests.networks import NETWORKS, NUM_CLASSES, SPEC

pytest.importorskip("ai_edge_litert", reason="pip install 'qimera[litert]'")

from qimera.litert.micro import MicroRuntime
from qimera.litert.runtime import Runtime
from qimera.lowering.model import lower


def student_of(teacher: Teacher, bits: str, target: str) -> Student:
    weight_bits, activation_bits = parse_bits(bits)
    settings = QuantizationSettings(weight_bits=weight_bits, activation_bits=activation_bits, target=target)
    return shared.fitted(teacher, shared.noise(), settings)


def images() -> Tensor:
    return torch.randn(24, *SPEC.shape, generator=torch.Generator().manual_seed(3))


def identical(expected: np.ndarray, actual: np.ndarray) -> float:
    """Return the share of images whose logits are the same but for the order of the last layer's sums."""
    return float((np.abs(expected - actual).max(1) <= 1e-5 * expected.std()).mean())


def logits_of(student: Student, target: str) -> np.ndarray:
    """Return what the kernels of a target make of the student's file."""
    inputs = np.ascontiguousarray(images().permute(0, 2, 3, 1).numpy())
    if target != "tflm":
        return Runtime(lower(student).content(), xnnpack=target == "litert")(inputs)
    pytest.importorskip("tflite_micro", reason="pip install 'qimera[tflm]'")
    return MicroRuntime(lower(student, is_micro=True).content())(inputs)


SLOW_BITS = [pytest.param(bits, marks=pytest.mark.slow) for bits in ("w8a8", "w4a8", "w3a3")]
TARGETS = ["litert", "litert-builtin", "tflm"]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("bits", ["w4a4", *SLOW_BITS])
@pytest.mark.parametrize("target", TARGETS)
def test_every_network_gets_the_logits_of_its_target_bit_for_bit(name: str, bits: str, target: str) -> None:
    if (name, target) == ("transformer", "tflm"):
        pytest.skip("tflite-micro has no GELU")
    student = student_of(shared.teacher_of(name), bits, target)
    expected = student(images()).numpy()
    # functions of numbers, such as softmax and GELU, differ in their last bits
    assert identical(expected, logits_of(student, target)) >= (0.95 if name in ("many edges", "transformer") else 1)


class ManyKernels(nn.Module):
    """What the networks of tests/networks.py have not: clips to both ends, joins, averages of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.signed = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.clipped, self.strided = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 8, 3, stride=2, padding=1)
        self.gate, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        x = x - F.hardtanh(self.clipped(self.signed(x)), -0.3, 0.2)
        x = torch.cat([x, F.avg_pool2d(x, 3, 1, 1)], 1)
        x = F.hardswish(self.strided(x))
        x = x * F.hardsigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        x = F.max_pool2d(F.avg_pool2d(x, 2), 2)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bits", ["w4a4", *SLOW_BITS[:1]])
def test_kernels_of_all_kinds_are_repeated(target: str, bits: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ManyKernels().eval()
    student = student_of(Teacher.capture(model, SPEC), bits, target)
    expected = student(images()).numpy()
    assert identical(expected, logits_of(student, target)) >= 0.95  # hard-swish and hard-sigmoid


class LargeMean(nn.Module):
    """An average over 1,024 positions, for which kernels have an operation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.stem(x)] * 2, 2)
        return self.head(torch.cat([x] * 2, 3).mean((2, 3)))


@pytest.mark.parametrize("target", TARGETS)
def test_averages_over_many_positions_are_repeated(target: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LargeMean().eval()
    student = student_of(Teacher.capture(model, SPEC), "w8a8", target)
    expected = student(images()).numpy()
    assert identical(expected, logits_of(student, target)) == 1


class UnevenAverages(nn.Module):
    """Averages over windows that overlap, and over what of a window lies inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 25, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.relu(self.stem(x)), 3, 1, 1, count_include_pad=False)
        return self.head(F.adaptive_avg_pool2d(x, 5).flatten(1))


@pytest.mark.parametrize("target", TARGETS)
def test_averages_over_uneven_windows_are_repeated(target: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = UnevenAverages().eval()
    student = student_of(Teacher.capture(model, SPEC), "w8a8", target)
    expected, in_full = (each(images()).detach().numpy() for each in (student, student.reference))
    assert np.abs(expected - in_full).max() < 0.1 * in_full.std()
    assert identical(expected, logits_of(student, target)) >= 0.9  # sums of floats in another order


def test_targets_round_otherwise_and_train_alike() -> None:
    """What a student learns does not depend on how kernels round; what it evaluates to does."""
    students = [student_of(shared.teacher_of("residual"), "w3a3", target) for target in ("onnxruntime", "tflm")]
    evaluated = [student(images()) for student in students]
    assert not torch.equal(*evaluated)
    trained = [student.train()(images()) for student in students]
    assert torch.equal(*trained)


def test_what_is_learned_later_reaches_the_kernels() -> None:
    student = student_of(shared.teacher_of("residual"), "w4a4", "tflm")
    before = student(images())
    with torch.no_grad():
        for step in student.steps:
            step.add_(0.1)
    assert not torch.equal(student(images()), before)
    assert identical(student(images()).numpy(), logits_of(student, "tflm")) == 1
