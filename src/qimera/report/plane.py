"""A teacher and its bank -> a drawing of features where the classifier tells the nearest classes apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from qimera.assessment.diagnostics import features_of
from qimera.graph.nodes import classifier_node, has_bias, node_at, tensor_of
from qimera.report import figures
from qimera.report.boundary import nearest_three
from qimera.synthesis.bank import SampleBank
from qimera.synthesis.superposition import shows_one_class
from qimera.teacher.teacher import Teacher

_MAX_POINTS = 400

Place = tuple[float, float, int]
"""Where an image lies in the plane, and the class that the teacher takes it for."""


@dataclass(frozen=True)
class View:
    """A plane, and the samples that are seen in it. It depends on nothing but the teacher and the bank."""

    classes: list[int]
    origin: Float[Tensor, " feature"]
    axes: Float[Tensor, "two feature"]
    points: Float[Tensor, "sample two"]
    answers: Int64[Tensor, " sample"]
    """What the teacher takes each sample for."""
    is_single: Bool[Tensor, " sample"]
    """Whether a sample shows one class alone."""


def view_of(teacher: Teacher, bank: SampleBank) -> View | None:
    """Return the plane of the classes that the teacher confuses most.

    None with fewer than two samples or features, or where the classifier has a weight for more than one pixel or for
    some of the features alone: no plane of features then shows what it answers.
    """
    classes, single = nearest_three(bank), shows_one_class(bank.soft_labels)
    others = [number for number in range(teacher.num_classes) if number not in classes]
    # A superposed sample of another class lies anywhere in this plane.
    fitting = (bank.soft_labels[:, others] == 0).all(1) & torch.isin(bank.logits.argmax(1), torch.tensor(classes))
    order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))
    chosen = order[fitting[order]][:_MAX_POINTS]
    features = features_of(bank.take(chosen).images, teacher) if len(chosen) > 1 else torch.empty(0, 0)
    if features.shape[1] < 2 or features.shape[1] != teacher.classifier.weight.shape[1]:
        return None
    features, answers, kept = _of_classes(features, teacher, classes)
    origin, axes = axes_between(features, teacher.classifier.weight[classes])
    return View(classes, origin, axes, (features - origin) @ axes.T, answers, single[chosen][kept])


def places_of(images: Tensor, view: View, teacher: Teacher) -> tuple[Place, ...]:
    """Return where normalised images lie that the teacher takes for one of the classes."""
    features, answers, _ = _of_classes(features_of(images, teacher), teacher, view.classes)
    points = (features - view.origin) @ view.axes.T
    return tuple((x, y, answer) for (x, y), answer in zip(points.tolist(), answers.tolist(), strict=True))


def draw_view(view: View, real: Sequence[Place], teacher: Teacher) -> str:
    """Draw samples, and real images if there are any, on the areas of the classes."""
    places = torch.tensor([place[:2] for place in real]).reshape(-1, 2)
    points = torch.cat([view.points, places])
    answers = torch.cat([view.answers, torch.tensor([place[2] for place in real], dtype=torch.int64)])
    kind = torch.cat([torch.where(view.is_single, 0, 1), torch.full((len(real),), 2)])
    weight, bias = teacher.classifier.weight[view.classes], _bias(teacher)[view.classes]
    areas, extent = areas_around(points, view.origin, view.axes, weight, bias)
    kinds = [(name, kind == i) for i, name in enumerate(("one class", "superposed", "real"))]
    shown = [(name, found) for name, found in kinds if bool(found.any())]
    answered = torch.searchsorted(torch.tensor(view.classes), answers)
    return figures.draw_plane(figures.Plane(points, areas, extent, view.classes, answered, shown))


def axes_between(
    features: Float[Tensor, "sample feature"], weight: Float[Tensor, "row feature"]
) -> tuple[Float[Tensor, " feature"], Float[Tensor, "two feature"]]:
    """Return the origin and the axes of the plane where the classifier tells two or three classes apart.

    The plane holds the differences of the classes' weights. What is left out of it changes none of the differences
    between their logits, so a point lies in the area of the class that the classifier prefers among them. With two
    classes the second axis is the direction in which the features differ most besides.

    Args:
        features: What the classifier reads; at least two samples and features.
        weight: Of two or three classes.
    """
    origin = features.mean(0)
    axes = torch.linalg.qr((weight[1:] - weight[0]).T).Q.T  # (1 or 2, feature)
    if len(axes) < 2:
        rest = features - origin
        rest = rest - rest @ axes.T @ axes
        axes = torch.cat([axes, torch.linalg.svd(rest, full_matrices=False)[2][:1]])
    # Another machine may find the opposite direction, and points that were kept would be mirrored there.
    longest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return origin, axes * longest.sign()


def areas_around(
    points: Float[Tensor, "sample two"],
    origin: Float[Tensor, " feature"],
    axes: Float[Tensor, "two feature"],
    weight: Float[Tensor, "row feature"],
    bias: Float[Tensor, " row"],
    size: int = 160,
) -> tuple[Int64[Tensor, "size size"], tuple[float, float, float, float]]:
    """Return places of classes in ``weight`` around points of the plane, and its left, right, bottom and top."""
    low, high = points.amin(0), points.amax(0)
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
    x, y = (torch.linspace(float(low[i]), float(high[i]), size) for i in range(2))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # (size, size, 2)
    areas = ((origin + grid @ axes) @ weight.T + bias).argmax(-1)
    return areas, (float(low[0]), float(high[0]), float(low[1]), float(high[1]))


def _of_classes(features: Tensor, teacher: Teacher, classes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return features and answers of the images that the teacher takes for one of the classes, and which these are."""
    answers = (features @ teacher.classifier.weight.T + _bias(teacher)).argmax(1)
    kept = torch.isin(answers, torch.tensor(classes))
    return features[kept], answers[kept], kept


def _bias(teacher: Teacher) -> Tensor:
    layer = classifier_node(teacher.module, teacher.classifier.name)
    return tensor_of(teacher.module, node_at(layer, 2)) if has_bias(layer) else torch.zeros(teacher.num_classes)
