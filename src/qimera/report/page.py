"""A report, its run's models and its bank -> one HTML file that needs nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import Environment, PackageLoader
from torch import Tensor

from qimera.assessment.diagnostics import features_of, margins_of
from qimera.graph.nodes import classifier_node, has_bias, node_at, tensor_of
from qimera.report import figures
from qimera.report.boundary import nearest_classes, walk_between
from qimera.report.content import Report, features_in_plane
from qimera.report.summary import readable_bytes
from qimera.synthesis.bank import SampleBank
from qimera.synthesis.superposition import shows_one_class
from qimera.teacher.teacher import Teacher

_MAX_CLASSES = 10
_SAMPLES_A_CLASS = 8
_MAX_POINTS = 400

environment = Environment(loader=PackageLoader("qimera.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
environment.filters["bytes"] = readable_bytes


@dataclass(frozen=True)
class Pictures:
    """What is drawn, as SVG or as the address of a PNG picture."""

    curves: str
    layers: str
    ranges: str
    statistics: str
    margins: str
    plane: str
    grid: str
    grid_classes: list[int]
    walk: str
    walk_steps: list[dict[str, Any]]
    walk_classes: tuple[int, int]


def write_page(report: Report, teacher: Teacher, bank: SampleBank, real: Tensor | None = None) -> str:
    """Return the page.

    Args:
        report: What it says.
        teacher: The full-precision model.
        bank: Samples that the student was trained on.
        real: Normalised real images, if the user has any, for the plot of features.
    """
    page = environment.get_template("page.html.j2")
    return page.render(report=report, summary=report.summary, pictures=_draw(report, teacher, bank, real))


def _draw(report: Report, teacher: Teacher, bank: SampleBank, real: Tensor | None) -> Pictures:
    margins = margins_of(bank.logits)
    single = shows_one_class(bank.soft_labels)
    grid, classes = _grid(bank, single)
    walk = walk_between(*nearest_classes(bank), teacher, bank)
    steps = [
        {"share": f"{float(share):.2f}", "first": f"{float(answer[0]):.2f}", "second": f"{float(answer[1]):.2f}"}
        for share, answer in zip(walk.shares, walk.probabilities, strict=True)
    ]
    return Pictures(
        curves=figures.draw_curves(report.curves) if report.curves else "",
        layers=figures.draw_layers(report.layers),
        ranges=figures.draw_ranges(report.layers),
        statistics=figures.draw_statistics(report.bank.statistics_gap) if report.bank.statistics_gap else "",
        margins=figures.draw_margins(margins[single], margins[~single]),
        plane=_plane(teacher, bank, single, real),
        grid=grid,
        grid_classes=classes,
        walk=figures.picture(walk.pixels[None]),
        walk_steps=steps,
        walk_classes=(walk.first, walk.second),
    )


def _grid(bank: SampleBank, single: Tensor) -> tuple[str, list[int]]:
    """Return samples of one class each, a row for each class, and the classes."""
    wanted = bank.soft_labels.argmax(1)
    places = [(single & (wanted == number)).nonzero().flatten() for number in range(bank.soft_labels.shape[1])]
    enough = [number for number, found in enumerate(places) if len(found)][:_MAX_CLASSES]
    if not enough:
        return "", []
    columns = min(_SAMPLES_A_CLASS, min(len(places[number]) for number in enough))
    return figures.picture(torch.stack([bank.pixels[places[number][:columns]] for number in enough])), enough


def _plane(teacher: Teacher, bank: SampleBank, single: Tensor, real: Tensor | None) -> str:
    chosen = torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))[:_MAX_POINTS]
    images: list[Tensor] = [bank.take(chosen).images]
    of_one = single[chosen]
    kinds: Sequence[tuple[str, Tensor]] = [("one class", of_one), ("superposed", ~of_one)]
    if real is not None:
        images.append(real[:_MAX_POINTS])
        added = torch.zeros(len(images[1]), dtype=torch.bool)
        kinds = [(name, torch.cat([found, added])) for name, found in kinds]
        kinds = [*kinds, ("real", torch.cat([torch.zeros_like(of_one), ~added]))]
    features = torch.cat([features_of(part, teacher) for part in images])
    layer = classifier_node(teacher.module, teacher.classifier.name)
    bias = tensor_of(teacher.module, node_at(layer, 2)) if has_bias(layer) else torch.zeros(teacher.num_classes)
    points, classes, extent = features_in_plane(features, teacher.classifier.weight, bias)
    return figures.draw_plane(points, classes, extent, kinds)
