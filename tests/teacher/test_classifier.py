"""teacher.py: which layer is the classifier, and its row for each class."""

import pytest
import torch
from torch import Tensor, nn

from qimera.teacher.teacher import Teacher
from tests.networks import NUM_CLASSES, SPEC, Lambda, TinyNet, random_network


def test_rows_of_the_classifier_stand_for_classes(tiny_model: TinyNet, teacher: Teacher) -> None:
    assert teacher.classifier.name == "fc"
    assert torch.equal(teacher.classifier.weight, tiny_model.fc.weight)
    assert teacher.num_classes == NUM_CLASSES


def test_a_1x1_convolution_can_be_the_classifier() -> None:
    model = random_network("many edges")
    teacher = Teacher.capture(model, SPEC)
    assert teacher.classifier.name == "classifier"
    assert torch.equal(teacher.classifier.weight, model.classifier.weight.flatten(1))


@pytest.mark.parametrize(("channels", "groups"), [(NUM_CLASSES, 1), (8, 1), (2 * NUM_CLASSES, NUM_CLASSES)])
def test_a_transposed_convolution_can_be_the_classifier(channels: int, groups: int) -> None:
    """Row k of its weight is what class k gets of each input channel, as a channel of ones alone shows."""
    layer = nn.ConvTranspose2d(channels, NUM_CLASSES, 1, groups=groups, bias=False)
    teacher = Teacher.capture(nn.Sequential(nn.Conv2d(3, channels, 1), layer, Lambda(lambda x: x.mean((2, 3)))), SPEC)
    assert teacher.classifier.name == "1"
    given = torch.eye(channels)[:, :, None, None]
    expected = layer(given).flatten(1).T  # (class, channel)
    of_class = torch.arange(channels).view(groups, -1).repeat_interleave(NUM_CLASSES // groups, 0)
    assert torch.equal(teacher.classifier.weight, expected.gather(1, of_class))


class Dueling(nn.Module):
    """Adds one value for all classes to one for each."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.advantage = nn.Linear(3, 1), nn.Linear(3, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = x.mean((2, 3))
        result: Tensor = self.value(features) + self.advantage(features)
        return result


def test_a_layer_without_a_row_for_each_class_is_not_the_classifier() -> None:
    teacher = Teacher.capture(Dueling(), SPEC)
    assert (teacher.classifier.name, teacher.num_classes) == ("advantage", NUM_CLASSES)
