"""blocks.py: where a network can be cut, and what lies between two cuts."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qimera import InputSpec, QuantizationSettings, Student, Teacher
from qimera.graph.nodes import with_outputs
from qimera.student.blocks import first_blocks, part_of

SPEC = InputSpec(shape=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3)


class Separable(nn.Module):
    """Pairs of a depthwise and a pointwise convolution, as MobileNetV1, then a residual addition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.depthwise1 = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise1 = nn.Conv2d(8, 16, 1)
        self.depthwise2 = nn.Conv2d(16, 16, 3, stride=2, groups=16)
        self.pointwise2 = nn.Conv2d(16, 16, 1)
        self.inner1 = nn.Conv2d(16, 16, 3, padding=1)
        self.inner2 = nn.Conv2d(16, 16, 1)
        self.gate = nn.Conv2d(16, 16, 1)
        self.last = nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.conv(F.pad(x, (0, 1, 0, 1))))
        x = F.relu6(self.pointwise1(F.relu6(self.depthwise1(x))))
        x = F.relu6(self.pointwise2(F.relu6(self.depthwise2(F.pad(x, (0, 1, 0, 1))))))
        x = F.relu(x + self.inner2(F.relu(self.inner1(x))))
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        x = F.relu(self.last(F.relu(x)))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


@pytest.fixture(scope="module")
def student() -> Student:
    torch.manual_seed(0)
    return Student(Teacher.capture(Separable(), SPEC), QuantizationSettings())


@pytest.fixture(scope="module")
def fitted(student: Student) -> Student:
    student.initialize_layers_(torch.randn(8, *SPEC.shape), torch.Generator().manual_seed(0))
    return student


def test_a_block_has_two_layers_or_more_and_ends_with_one_that_mixes_channels(student: Student) -> None:
    names = student.layer_names()
    found = [[names[layer.name] for layer in b.layers] for b in first_blocks(student.module, student.reference, 9)]
    assert found[:2] == [["conv", "depthwise1", "pointwise1"], ["depthwise2", "pointwise2"]]
    assert found[2] == ["inner1", "inner2"]  # the addition's other branch lies in the same block


def test_no_block_reaches_beyond_what_reads_a_whole_map(student: Student) -> None:
    assert len(first_blocks(student.module, student.reference, 9)) == 3
    assert len(first_blocks(student.module, student.reference, 1)) == 1


def test_blocks_run_by_themselves_compute_what_the_graph_does(fitted: Student) -> None:
    images = torch.randn(2, *SPEC.shape, generator=torch.Generator().manual_seed(1))
    for graph in (fitted.module, fitted.reference):
        for block in first_blocks(fitted.module, fitted.reference, 9):
            (images_node,) = graph.graph.find_nodes(op="placeholder")
            wanted = [name for name in (block.start, block.end) if name != images_node.name]
            with torch.no_grad():
                *start, end = with_outputs(graph, wanted)(images)[1]
                assert torch.equal(part_of(graph, block)(*start or [images]), end)


def test_a_network_whose_layers_share_a_weight_keeps_it() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.again, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.again(F.relu(self.again(F.relu(self.conv(x))))))
            out: Tensor = self.fc(x.mean((2, 3)))
            return out

    torch.manual_seed(0)
    student = Student(Teacher.capture(Twice(), SPEC), QuantizationSettings())
    assert first_blocks(student.module, student.reference, 9) == []


def test_no_block_adds_another_number_at_each_position() -> None:
    """Crops of the map say nothing of what is added elsewhere."""

    class Positions(nn.Module):
        def __init__(self, height: int) -> None:
            super().__init__()
            self.first, self.second, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 10)
            self.added = nn.Parameter(torch.randn(8, height, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.second(F.relu(self.first(x)) + self.added))
            out: Tensor = self.fc(x.mean((2, 3)))
            return out

    def num_blocks(height: int) -> int:
        student = Student(Teacher.capture(Positions(height), SPEC), QuantizationSettings())
        return len(first_blocks(student.module, student.reference, 9))

    assert num_blocks(1) == 1
    assert num_blocks(32) == 0
