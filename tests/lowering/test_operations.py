"""Operations between layers: a file computes them as the student does, in integers where those only move."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("ai_edge_litert", reason="pip install 'qimera[litert]'")

from qimera.config.settings import QuantizationSettings
from qimera.errors import UnsupportedModelError
from qimera.litert.runtime import Runtime, operations_in
from qimera.lowering.model import lower, lower_full_precision
from qimera.student.student import Student
from qimera.teacher.teacher import Teacher
from tests import shared
from tests.networks import SPEC, Head, Lambda


def student_of(layer: nn.Module) -> Student:
    """Return a student of ``layer`` between two convolutions of four channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.Conv2d(4, 4, 3), Head(4))
    return shared.fitted(Teacher.capture(model.eval(), SPEC), shared.noise(), QuantizationSettings())


def kept_statistics() -> nn.InstanceNorm2d:
    norm = nn.InstanceNorm2d(4, track_running_stats=True)
    norm.running_mean, norm.running_var = torch.arange(4.0) / 10, 1 + torch.arange(4.0)
    return norm


def sines(x: torch.Tensor) -> torch.Tensor:
    """Encodings of positions, for as many images as there are."""
    places = torch.zeros(x.shape[0], *x.shape[2:]).bool().logical_not().cumsum(1, dtype=torch.float32)
    return torch.stack([places.sin(), places.cos()] * 2, 1) + torch.zeros_like(x)


OPERATIONS = {
    "prelu": (nn.PReLU(4), {"PRELU"}),
    "one slope": (nn.PReLU(), {"PRELU"}),
    "group norm": (nn.GroupNorm(2, 4), {"RSQRT"}),
    "group norm of tokens": (
        Lambda(lambda x: F.group_norm(x.flatten(2), 2).unflatten(2, (-1, x.shape[-1]))),
        {"RSQRT"},
    ),
    "softplus": (nn.Softplus(2), {"LOG"}),
    "mish": (nn.Mish(), {"LOG", "TANH"}),
    "glu": (Lambda(lambda x: F.glu(torch.cat([x, 2 * x], 1), 1)), {"LOGISTIC"}),
    "difference": (Lambda(lambda x: 1 - x), {"SUB"}),
    "difference of integers": (Lambda(lambda x: torch.rsub(x, x.relu())), {"SUB"}),
    "nearest": (nn.Upsample(scale_factor=2), {"RESIZE_NEAREST_NEIGHBOR"}),
    "nearest exact": (nn.Upsample(scale_factor=(1, 2), mode="nearest-exact"), {"RESIZE_NEAREST_NEIGHBOR"}),
    "nearest by fractions": (
        nn.Sequential(nn.Upsample(scale_factor=1.3), nn.Upsample((9, 21), mode="nearest-exact")),
        {"GATHER"},
    ),
    "bilinear": (
        nn.Sequential(
            nn.Upsample((9, 20), mode="bilinear"),
            nn.Upsample(scale_factor=(2, 1), mode="bilinear", align_corners=True),
        ),
        {"RESIZE_BILINEAR"},
    ),
    "weighted sums": (
        nn.Sequential(
            nn.Upsample(scale_factor=1.3, mode="bilinear"),  # 14 pixels become 18, not 18.2
            nn.Upsample((12, 18), mode="bicubic"),
            Lambda(lambda x: F.interpolate(x, (9, 8), mode="bilinear", antialias=True)),
        ),
        {"FULLY_CONNECTED"},
    ),
    "averages inside": (
        nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.AvgPool2d(3, 3, ceil_mode=True)),
        {"AVERAGE_POOL_2D"},
    ),
    "averages over windows of several sizes": (
        nn.Sequential(nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AdaptiveAvgPool2d((4, 9))),
        {"FULLY_CONNECTED"},
    ),
    "repeat": (Lambda(lambda x: x[:, :2].repeat(1, 2, 1, 2)), {"TILE"}),
    "every second row": (Lambda(lambda x: x[:, :, 1::2, -9:-1]), {"STRIDED_SLICE"}),
    "normalized": (Lambda(lambda x: F.normalize(x).clamp_max(0.9).clamp(min=0.1).log().sin()), {"SQRT", "LOG", "SIN"}),
    "largest of channels": (Lambda(lambda x: x - x.max(1, keepdim=True)[0]), {"REDUCE_MAX"}),
    "shapes of others": (Lambda(lambda x: x.flatten(2).mT.swapaxes(1, 2).reshape_as(x)), {"CONV_2D"}),
    "sum and product": (
        Lambda(lambda x: torch.addcmul(x.mean(1, keepdim=True), x.tanh(), x[:, :, :1])),
        {"MUL", "ADD"},
    ),
    "positions": (Lambda(lambda x: x + sines(x)), {"ADD"}),
    "interleaved": (
        Lambda(lambda x: x[:, :1].repeat_interleave(4, 1).repeat_interleave(2).view(x.shape[0], 4, 28, -1)),
        {"TILE"},
    ),
    "instance norms": (nn.Sequential(nn.InstanceNorm2d(4, affine=True), kept_statistics()), {"RSQRT"}),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_file_computes_the_operations_of_the_student(name: str) -> None:
    layer, kinds = OPERATIONS[name]
    student, images = student_of(layer), shared.noise(24)[16:]
    content = lower(student).content()
    assert kinds <= set(operations_in(content))
    if name.startswith(("nearest", "repeat", "interleaved", "every")):
        assert "DEQUANTIZE" not in operations_in(content)  # integers are moved as they are
    pixels = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
    with torch.no_grad():
        expected, in_full = student(images).numpy(), student.reference(images).numpy()
    np.testing.assert_allclose(Runtime(content)(pixels), expected, atol=1e-4 * expected.std())
    # built-in kernels round sums twice
    np.testing.assert_allclose(Runtime(content, xnnpack=False)(pixels), expected, atol=0.2 * expected.std())
    actual = Runtime(lower_full_precision(student).content())(pixels)
    np.testing.assert_allclose(actual, in_full, atol=1e-4 * in_full.std())


@pytest.mark.parametrize("number", [-100.0, -20.0, -1.0, 0.0, 1.0, 19.0, 21.0, 100.0])
def test_softplus_neither_overflows_nor_vanishes(number: float) -> None:
    student = student_of(Lambda(lambda x: F.softplus(0 * x + number)))
    pixels = np.zeros((1, *SPEC.shape[1:], 3), np.float32)
    with torch.no_grad():
        expected = student.reference(torch.zeros(1, *SPEC.shape)).numpy()
    actual = Runtime(lower_full_precision(student).content())(pixels)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


REFUSED = {
    "threshold": (nn.Softplus(1, 3), "softplus: a softplus with threshold 3 jumps"),
    "alpha": (Lambda(lambda x: torch.rsub(x, x.sigmoid(), alpha=2)), "rsub: a factor 2 .*"),
    "windows": (nn.AdaptiveMaxPool2d(4), "adaptive_max_pool2d.*: .* has no counterpart in LiteRT"),
    "norm": (
        Lambda(lambda x: x / torch.linalg.vector_norm(x, 3, 1, keepdim=True)),
        "linalg_vector_norm: a norm of order 3",
    ),
    "places": (
        Lambda(lambda x: x * x.max(1, keepdim=True)[1].float()),
        "getitem.*: result 1 of aten.max.dim has no counterpart",
    ),
    "padding": (nn.ReflectionPad2d(1), "pad: only padding with zeros .* \\(pad comes behind 0\\)"),
    "clip": (Lambda(lambda x: F.hardtanh(F.relu(x), 0.1, 0.5)), "^0: LiteRT's kernels clip to ranges that hold zero"),
    "clip of parts": (
        Lambda(lambda x: F.hardtanh(torch.cat([x[:, :2], 2 * x[:, :2]], 1), 0.1, 0.5)),
        "^cat: LiteRT's kernels clip to ranges that hold zero",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_counterpart_is_refused_by_name_and_sent_to_onnx(name: str) -> None:
    layer, message = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=rf"(?=.*export to ONNX instead){message}"):
        lower(student_of(layer))
