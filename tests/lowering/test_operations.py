"""Operations between layers: what has no counterpart in LiteRT is refused by name."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("ai_edge_litert", reason="pip install 'qimera[litert]'")

from qimera.config.settings import QuantizationSettings
from qimera.errors import UnsupportedModelError
from qimera.lowering.model import lower
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


REFUSED = {
    "edges": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), "avg_pool2d.*: an average over windows .*"),
    "windows": (nn.AdaptiveAvgPool2d(4), "adaptive_avg_pool2d.*: windows of an adaptive average that overlap .*"),
    "padding": (nn.ReflectionPad2d(1), "pad: only padding with zeros .*"),
    "slice": (Lambda(lambda x: x[:, :, ::2]), "slice_.*: a slice with a step .*"),
    "clip": (Lambda(lambda x: F.hardtanh(F.relu(x), 0.1, 0.5)), "^0: LiteRT's kernels clip to ranges that hold zero"),
    "clip of parts": (
        Lambda(lambda x: F.hardtanh(torch.cat([x[:, :2], 2 * x[:, :2]], 1), 0.1, 0.5)),
        "^cat: LiteRT's kernels clip to ranges that hold zero",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_counterpart_is_refused_by_name_and_sent_to_onnx(name: str) -> None:
    layer, message = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=rf"{message}.*export to ONNX instead"):
        lower(student_of(layer))
