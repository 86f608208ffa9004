"""Weights and statistics that training should not leave, but does: each works, or is refused with its name."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qimera.config.settings import DirectSettings, DistillationSettings, QuantizationSettings, SynthesisSettings
from qimera.errors import QimeraError, UnsupportedModelError
from qimera.pipeline import quantize, synthesize
from qimera.student.student import Student
from qimera.teacher.teacher import Teacher
from tests.networks import SPEC, TinyNet, toy_pixels

SYNTHESIS = SynthesisSettings(num_optimized=16, direct=DirectSettings(num_steps=4, batch_size=16))
STARTS = {
    "nearest": DistillationSettings(num_steps=3, batch_size=8),
    "compensated": DistillationSettings(num_steps=0, start="compensated"),
}


def nan_in(name: str, value: float) -> Callable[[TinyNet], None]:
    def change(model: TinyNet) -> None:
        model.state_dict()[name].flatten()[0] = value

    return change


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("conv2.weight", float("nan"), "conv2.weight: 1 of 576 values are NaN or infinite"),
        ("fc.bias", float("inf"), "fc.bias: 1 of 5 values are NaN or infinite"),
        ("bn3.running_mean", float("nan"), "bn3.running_mean: 1 of 8 values"),
        ("bn3.running_var", -0.1, "bn3.running_var: 1 of 8 variances are negative"),
    ],
)
def test_broken_numbers_are_refused_with_the_tensors_name(name: str, value: float, message: str) -> None:
    model = TinyNet()
    nan_in(name, value)(model)
    with pytest.raises(UnsupportedModelError, match=message):
        Teacher.capture(model, SPEC)


class MaskedTokens(nn.Module):
    """Attention in which a stored mask of minus infinities hides later tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.fc = nn.Linear(48, 24), nn.Linear(8, 5)
        self.register_buffer("mask", torch.full((16, 16), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x.permute(0, 2, 1, 3).flatten(2)).chunk(3, -1)
        weights = (query @ key.transpose(1, 2) + self.mask).softmax(-1)
        return self.fc((weights @ value).mean(1))


def test_a_stored_mask_may_hold_minus_infinity() -> None:
    torch.manual_seed(0)
    model, images = MaskedTokens().eval(), torch.randn(8, *SPEC.shape)
    teacher = Teacher.capture(model, SPEC)
    student = Student(teacher, QuantizationSettings(weight_bits=8, activation_bits=8))
    student.initialize_ranges_([images])
    logits = model(images).detach()
    assert float((student(images) - logits).abs().max()) < 0.1 * float(logits.abs().max())
    model.mask[0, 0] = torch.nan
    with pytest.raises(UnsupportedModelError, match="mask: 1 of 256 values are NaN or infinite"):
        Teacher.capture(model, SPEC)


def constant_channel(model: TinyNet) -> None:
    model.conv2.weight.data[0] = 0
    model.bn2.running_mean[0], model.bn2.running_var[0] = 0, 0


def no_variance_at_all(model: TinyNet) -> None:
    model.bn4.running_var.zero_()
    model.bn4.weight.data.fill_(1e-3)


def dead_class(model: TinyNet) -> None:
    model.fc.weight.data[2] = 0
    model.fc.bias.data[2] = -100


def large_logits(model: TinyNet) -> None:
    model.fc.weight.data *= 1e4


def no_momentum(model: TinyNet) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None


def tiny_weights(model: TinyNet) -> None:
    model.conv3.weight.data *= 1e-30


def zero_layer(model: TinyNet) -> None:
    model.pointwise.weight.data.zero_()


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    "change", [constant_channel, no_variance_at_all, dead_class, large_logits, no_momentum, tiny_weights, zero_layer]
)
def test_unusual_networks_give_finite_students(
    tiny_model: TinyNet, change: Callable[[TinyNet], None], start: str
) -> None:
    model = copy.deepcopy(tiny_model)
    change(model)
    teacher = Teacher.capture(model, SPEC)
    bank = synthesize(teacher, settings=SYNTHESIS)
    student = quantize(teacher, bank, "w4a4", settings=STARTS[start])
    images = SPEC.normalize(toy_pixels(32, seed=5)[0])
    with torch.no_grad():
        assert bool(student(images).isfinite().all())
    for name, value in student.module.state_dict().items():
        assert bool(value.isfinite().all()), name


@pytest.mark.parametrize("num_classes", [1, 2])
def test_heads_of_one_and_two_classes(tiny_model: TinyNet, num_classes: int) -> None:
    model = copy.deepcopy(tiny_model)
    model.fc = nn.Linear(24, num_classes)
    if num_classes == 1:
        with pytest.raises(QimeraError, match="at least 2 classes"):
            Teacher.capture(model, SPEC)
        return
    bank = synthesize(model, SPEC, SYNTHESIS)
    student = quantize(model, bank, "w4a4", settings=STARTS["nearest"])
    assert student.num_classes == 2
