"""losses.py: the tensors through which everything flows, in teachers and in their students."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qimera.graph.folding import fold_batch_norms
from qimera.graph.nodes import aten, with_outputs
from qimera.quantization.losses import block_outputs
from qimera.teacher.teacher import Teacher
from tests import shared
from tests.networks import NETWORKS, NUM_CLASSES, SPEC, Lambda

SCHEMES = ["hardware", "paper"]


def test_block_outputs_are_the_activations_that_everything_flows_through(teacher: Teacher) -> None:
    folded = fold_batch_norms(teacher.module)
    nodes = {node.name: node for node in folded.graph.nodes}
    found = [nodes[name].target for name in block_outputs(folded)]
    assert found[:4] == [aten.relu.default, aten.relu.default, aten.hardtanh.default, aten.relu.default]
    inside = [node.name for node in folded.graph.nodes if node.target is aten.relu.default][1]
    assert inside not in block_outputs(folded)  # the shortcut flows past it


def test_a_flattening_that_reads_the_size_of_the_batch_hides_no_block() -> None:
    def blocks_with(flattening: nn.Module) -> list[str]:
        layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2)
        module = Teacher.capture(nn.Sequential(*layers, flattening, nn.Linear(144, NUM_CLASSES)), SPEC).module
        return block_outputs(module)[:-1]

    found = blocks_with(Lambda(lambda x: x.view(x.size(0), -1)))
    assert found == blocks_with(nn.Flatten()) == ["relu", "relu_1"]


def test_no_block_output_is_infinite() -> None:
    """Maxima are taken of maps whose borders hold minus infinity, as in timm's networks for TensorFlow's weights."""
    bordered = Lambda(lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-math.inf), 3, 2))
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), bordered, nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)
    network = nn.Sequential(*layers)
    network(torch.zeros(1, *SPEC.shape))
    module = Teacher.capture(network, SPEC).module
    names = block_outputs(module)
    assert names[:2] == ["relu", "max_pool2d"]
    with torch.no_grad():
        assert all(bool(x.isfinite().all()) for x in with_outputs(module, names)(shared.noise(2))[1])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_block_output_of_the_teacher_is_found_in_the_student(name: str, scheme: str) -> None:
    teacher = shared.teacher_of(name)
    names = block_outputs(fold_batch_norms(teacher.module))
    assert names
    student, images = shared.student_of(name, "w8a8", scheme), shared.noise(8)
    with torch.no_grad():
        _, expected = with_outputs(fold_batch_norms(teacher.module), names)(images)
        logits, found = student.with_features(names)(images)
        assert torch.equal(logits, student.module(images))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        # 8 bits: a few percent of the spread
        assert float((mine - theirs).square().mean()) < 0.01 * float(theirs.var())
