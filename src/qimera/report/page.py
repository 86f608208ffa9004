"""A report, its run's models and its bank -> one HTML file that needs nothing else."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import Environment, PackageLoader
from torch import Tensor

from qimera.assessment.diagnostics import LARGEST_GAP, margins_of
from qimera.report import figures
from qimera.report.boundary import nearest_classes, walk_between
from qimera.report.content import LEAST_COST, MOST_ROWS, Report
from qimera.report.plane import View, draw_view
from qimera.report.summary import readable_bytes
from qimera.synthesis.bank import SampleBank
from qimera.synthesis.superposition import shows_one_class
from qimera.teacher.teacher import Teacher

_MAX_CLASSES = 10
_SAMPLES_A_CLASS = 8

environment = Environment(loader=PackageLoader("qimera.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
environment.globals.update(most_rows=MOST_ROWS, least_cost=LEAST_COST, infinity=math.inf, largest_gap=LARGEST_GAP)
environment.filters["bytes"] = readable_bytes
environment.filters["fixed"] = lambda value, digits=1: f"{round(value, digits) + 0.0:.{digits}f}"  # no -0.0
environment.filters["times"] = lambda ratio: f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"


@dataclass(frozen=True)
class Pictures:
    """What is drawn, as SVG or as the address of a PNG picture."""

    curves: str
    layers: str
    ranges: str
    statistics: str
    margins: str
    plane: str
    plane_classes: list[int]
    grid: str
    grid_classes: list[int]
    walk_steps: list[dict[str, Any]]
    walk_classes: tuple[int, int]


def write_page(report: Report, teacher: Teacher, bank: SampleBank, view: View | None) -> str:
    """Return the page.

    Args:
        report: What it says.
        teacher: The full-precision model.
        bank: Samples that the student was trained on.
        view: Of the teacher and these samples, if there is one.
    """
    page, bank = environment.get_template("page.html.j2"), bank.synthetic  # never shows images of the user's
    return page.render(report=report, summary=report.summary, pictures=_draw(report, teacher, bank, view))


def _draw(report: Report, teacher: Teacher, bank: SampleBank, view: View | None) -> Pictures:
    margins = margins_of(bank.logits)
    single = shows_one_class(bank.soft_labels)
    grid, classes = _grid(bank, single)
    walk = walk_between(*nearest_classes(bank), teacher, bank)
    steps = [
        {"picture": figures.picture(pixels[None, None]), "share": share, "first": answer[0], "second": answer[1]}
        for pixels, share, answer in zip(walk.pixels, walk.shares.tolist(), walk.probabilities.tolist(), strict=True)
    ]
    real = report.measured.places if report.measured else ()
    gaps = sorted(report.bank.statistics_gap.items(), key=lambda item: -item[1])[:MOST_ROWS]
    in_order = {name: gap for name, gap in report.bank.statistics_gap.items() if name in dict(gaps)}
    return Pictures(
        curves=figures.draw_curves(report.curves) if report.curves else "",
        layers=figures.draw_layers(report.costly_layers) if report.costly_layers else "",
        ranges=figures.draw_ranges(report.costly_layers),
        statistics=figures.draw_statistics(in_order) if in_order else "",
        margins=figures.draw_margins(margins[single], margins[~single]) if len(margins) else "",
        plane=draw_view(view, real, teacher) if view else "",
        plane_classes=view.classes if view else [],
        grid=grid,
        grid_classes=classes,
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
