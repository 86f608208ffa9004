"""What a report shows -> SVG drawings that take on the colours of the page, and PNG pictures."""

import base64
import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from qimera.assessment.diagnostics import LARGEST_GAP
from qimera.report.content import Curve
from qimera.report.layers import LayerReport

_INK = "#010203"
"""Drawn in the page's own colour of text, light or dark."""

_PAPER = "#fdfeff"
"""Drawn in the colour of the page."""

FIRST, SECOND, THIRD = "#3b7dd8", "#d9732b", "#2a9d6f"
_MARKS = {"one class": "o", "superposed": "x", "real": "+"}
"""Of the kinds of samples in the plane."""

_WIDTH = 7.0
_CELL = 64
"""Pixels of the side of one sample in a picture, at least."""


@contextmanager
def _drawing(
    name: str, says: str, height: float, rows: int = 1, columns: int = 1
) -> Iterator[tuple[list[Axes], list[str]]]:
    """Yield axes, and a list that their SVG is put into when the block ends.

    Args:
        name: What identifiers in the drawing begin with, for several share a page.
        says: What the drawing shows, for people who do not see it.
        height: In inches.
        rows: Of axes.
        columns: Of axes.
    """
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "qimera",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **{name: _INK for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")},
    }
    drawn: list[str] = []
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        yield list(figure.subplots(rows, columns, squeeze=False).flat), drawn
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn.append(_inline(buffer.getvalue(), name, says))


def _inline(svg: str, name: str, says: str) -> str:
    """Return the drawing without its header and its fixed size, its ink in the colour of the page."""
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor").replace(_PAPER, "var(--page)")
    for size in ("height", "width"):
        svg = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(says)}"', 1)


def _plain(name: str) -> str:
    """Return a name so that its dollars do not begin a formula."""
    return name.replace("$", r"\$")


def draw_curves(curves: Sequence[Curve]) -> str:
    """Draw losses over steps, one plot for each stage."""
    stages = list(dict.fromkeys((curve.part, curve.stage) for curve in curves))
    rows, columns = math.ceil(len(stages) / 2), min(2, len(stages))
    says = f"Losses over steps: {', '.join(': '.join(stage) for stage in stages)}"
    with _drawing("curves", says, 2.6 * rows, rows, columns) as (axes, drawn):
        for axis, stage in zip(axes, stages, strict=False):
            for curve in curves:
                if (curve.part, curve.stage) == stage:
                    axis.plot(curve.steps, curve.values, linewidth=1, label=_plain(curve.name))
            axis.set(title=_plain(": ".join(stage)), xlabel="step", ylabel="loss", yscale="log")
            axis.legend(frameon=False, fontsize=8)
        for axis in axes[len(stages) :]:
            axis.set_axis_off()
    return drawn[0]


def draw_layers(layers: Sequence[LayerReport]) -> str:
    """Draw error and cost of every layer; those that are NaN or infinite have no bar."""
    says = f"Error and cost of {len(layers)} layers"
    with _drawing("layers", says, 0.9 + 0.19 * len(layers), columns=2) as (axes, drawn):
        places = np.arange(len(layers))
        axes[0].barh(places, [100 * _finite(layer.error) for layer in layers], color=FIRST)
        axes[0].set(xlabel="error of the output (% of its variance)")
        axes[1].barh(places, [_finite(layer.cost) for layer in layers], color=SECOND)
        axes[1].set(xlabel="divergence caused alone (nats)")
        labels = [f"{_plain(layer.name)}  w{layer.weight_bits}a{layer.activation_bits}" for layer in layers]
        for axis, names in zip(axes, (labels, [""] * len(layers)), strict=True):
            axis.set_yticks(places, names, fontsize=8)
            axis.set_ylim(len(layers) - 0.4, -0.6)
            axis.xaxis.set_major_locator(MaxNLocator(4))
    return drawn[0]


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def draw_ranges(layers: Sequence[LayerReport]) -> str:
    """Draw the range of every layer's input beside the values that arrive, in units of the largest of them.

    Empty where no layer's input has a range of its own.
    """
    shown = [layer for layer in layers if layer.high is not None]
    if not shown:
        return ""
    says = f"Ranges of the inputs of {len(shown)} layers, beside the values that arrive"
    with _drawing("ranges", says, 1.0 + 0.19 * len(shown)) as ((axis,), drawn):
        for place, layer in enumerate(shown):
            values = (layer.low, layer.high, layer.smallest, layer.largest, layer.lower_tail, layer.upper_tail)
            numbers = np.array([0.0 if value is None else value for value in values])
            low, high, smallest, largest, lower, upper = numbers / max(np.abs(numbers[2:4]).max(), 1e-12)
            axis.barh(place, high - low, left=low, height=0.7, color=FIRST, alpha=0.45)
            axis.plot([smallest, largest], [place, place], color=_INK, linewidth=0.8)
            axis.plot([lower, upper], [place, place], color=SECOND, linewidth=3)
        for line, label in zip(
            [*axis.patches[:1], *axis.lines[:2]], ("range", "all values", "99.8 % of them"), strict=False
        ):
            line.set_label(label)
        axis.set_yticks(range(len(shown)), [f"{_plain(each.name)}  {each.clipped:.2f} %" for each in shown], fontsize=8)
        axis.set_ylim(len(shown) - 0.4, -0.6)
        axis.set_xlabel("value, divided by the largest that arrives")
        _legend_below(axis)
    return drawn[0]


def draw_statistics(gaps: dict[str, float]) -> str:
    """Draw how far the statistics of samples are from those of the training data."""
    says = f"Gap at {len(gaps)} batch norms, {max(gaps.values()):.3f} at most; the limit is {LARGEST_GAP}"
    with _drawing("statistics", says, 0.8 + 0.19 * len(gaps)) as ((axis,), drawn):
        axis.barh(range(len(gaps)), list(gaps.values()), color=FIRST)
        axis.axvline(LARGEST_GAP, color=SECOND, linewidth=1, linestyle="--")
        axis.set_yticks(range(len(gaps)), [_plain(name) for name in gaps], fontsize=8)
        axis.set_ylim(len(gaps) - 0.4, -0.6)
        axis.set_xlabel("gap (0: like the training data, 1: unrelated)")
    return drawn[0]


def draw_margins(single: Tensor, superposed: Tensor) -> str:
    """Draw how many samples of both kinds lie how near a boundary."""
    says = (
        f"How far the first class leads the second on {len(single)} samples of one class and {len(superposed)} others"
    )
    with _drawing("margins", says, 2.8) as ((axis,), drawn):
        kinds = [(single, f"one class ({len(single)})", FIRST), (superposed, f"superposed ({len(superposed)})", SECOND)]
        for margins, label, colour in kinds:
            if len(margins):
                weights = np.full(len(margins), 100 / len(margins))
                axis.hist(
                    margins.numpy(),
                    np.linspace(0, 1, 21).tolist(),
                    weights=weights,
                    color=colour,
                    alpha=0.6,
                    label=label,
                )
        axis.set(xlabel="margin: top-1 minus top-2 probability", ylabel="share of each kind (%)")
        axis.legend(frameon=False)
    return drawn[0]


@dataclass(frozen=True)
class Plane:
    """Features of samples where the classifier tells a few classes apart."""

    points: Float[Tensor, "sample two"]
    areas: Int64[Tensor, "row column"]
    """Places in ``classes``."""
    extent: tuple[float, float, float, float]
    classes: list[int]
    answers: Int64[Tensor, " sample"]
    """Places in ``classes`` of what the teacher takes each sample for."""
    kinds: Sequence[tuple[str, Bool[Tensor, " sample"]]]
    """What the marks stand for, and which samples they are of."""


def draw_plane(plane: Plane) -> str:
    """Draw each sample in the colour of its class, with the mark of its kind, on the areas of the classes."""
    colours = np.array([to_rgba(colour) for colour in (FIRST, SECOND, THIRD)])
    says = f"Features of {len(plane.points)} samples in the areas of classes {', '.join(map(str, plane.classes))}"
    with _drawing("plane", says, 4.6) as ((axis,), drawn):
        pale = colours * [1, 1, 1, 0.2]
        axis.imshow(pale[plane.areas.numpy()], extent=plane.extent, origin="lower", aspect="auto")
        for label, chosen in plane.kinds:
            mark = _MARKS[label]
            x, y = plane.points[chosen].T.numpy()
            axis.scatter(x, y, s=18, marker=mark, c=colours[plane.answers[chosen].numpy()], linewidths=1)
            axis.plot([], [], mark, color=_INK, markersize=5, label=f"{label} ({int(chosen.sum())})")
        for place, number in enumerate(plane.classes):
            if bool((plane.answers == place).any()):
                x, y = plane.points[plane.answers == place].mean(0).tolist()
                behind = {"boxstyle": "round", "color": _PAPER, "alpha": 0.8, "linewidth": 0}
                axis.text(x, y, f"class {number}", weight="bold", size=10, ha="center", va="center", bbox=behind)
        axis.set(xticks=[], yticks=[])
        _legend_below(axis)
    return drawn[0]


def _legend_below(axis: Axes) -> None:
    figure = axis.get_figure()
    assert isinstance(figure, Figure)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)


def picture(rows: UInt8[Tensor, "row column channel height width"]) -> str:
    """Return samples side by side as a data address of a PNG picture."""
    row, column, channel, height, width = rows.shape
    scale = max(1, math.ceil(_CELL / max(height, width)))
    tiles = rows[:, :, :3] if channel >= 3 else rows[:, :, :1].expand(-1, -1, 3, -1, -1)
    gap = 2
    canvas = np.full((row * (height + gap) - gap, column * (width + gap) - gap, 4), 0, np.uint8)
    for i in range(row):
        for j in range(column):
            top, left = i * (height + gap), j * (width + gap)
            canvas[top : top + height, left : left + width, :3] = tiles[i, j].permute(1, 2, 0).numpy()
            canvas[top : top + height, left : left + width, 3] = 255
    image = Image.fromarray(canvas, "RGBA")
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
