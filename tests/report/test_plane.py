"""plane.py: the areas of classes among features."""

import pytest
import torch
from torch import nn

from qimera.config.settings import SynthesisSettings
from qimera.report.plane import areas_around, axes_between, view_of
from qimera.synthesis.bank import SampleBank
from qimera.teacher.teacher import Teacher
from tests.networks import NUM_CLASSES, SPEC, Lambda


@pytest.mark.parametrize("num_classes", [2, 3])
def test_every_sample_lies_in_the_area_of_its_class(num_classes: int) -> None:
    """Written out: the class of the highest logit, against the colour of the area at the point."""
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(60, 16, generator=rng)
    weight, bias = torch.randn(num_classes, 16, generator=rng), torch.randn(num_classes, generator=rng)
    origin, axes = axes_between(features, weight)
    points = (features - origin) @ axes.T
    areas, (left, right, bottom, top) = areas_around(points, origin, axes, weight, bias, size=1001)
    logits = features @ weight.T + bias
    for point, row in zip(points, logits, strict=True):
        first, second = row.topk(2).values.tolist()
        column = round(float((point[0] - left) / (right - left)) * 1000)
        line = round(float((point[1] - bottom) / (top - bottom)) * 1000)
        if first - second > 0.1:  # not within one of the thousand steps of the boundary
            assert int(areas[line, column]) == int(row.argmax())


@pytest.mark.parametrize(
    "classifier", [nn.Conv2d(8, NUM_CLASSES, 3, padding=1), nn.Conv2d(10, NUM_CLASSES, 1, groups=5)], ids=str
)
def test_features_have_no_plane_where_the_classifier_sees_more_pixels_or_less_channels(classifier: nn.Conv2d) -> None:
    first = nn.Conv2d(3, classifier.in_channels, 3)
    teacher = Teacher.capture(nn.Sequential(first, classifier, Lambda(lambda x: x.mean((2, 3)))), SPEC)
    images = torch.randn(16, *SPEC.shape, generator=torch.Generator().manual_seed(0))
    labels = torch.eye(NUM_CLASSES)[torch.arange(16) % NUM_CLASSES]
    assert view_of(teacher, SampleBank.from_images(images, labels, teacher, SynthesisSettings(), 0)) is None
