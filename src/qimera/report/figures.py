"""What a report shows -> SVG drawings that take on the colours of the page, and PNG pictures."""

import base64
import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from qimera.assessment.diagnostics import LARGEST_GAP
from qimera.report.content import Curve
from qimera.report.layers import LayerReport

_INK = "#010203"
"""Drawn in the page's own colour of text, light or dark."""

FIRST, SECOND, THIRD = "#3b7dd8", "#d9732b", "#2a9d6f"
_WIDTH = 7.0
_CELL = 64
"""Pixels of the side of one sample in a picture, at least."""


@contextmanager
def _drawing(height: float, rows: int = 1, columns: int = 1) -> Iterator[tuple[list[Axes], list[str]]]:
    """Yield axes, and a list that their SVG is put into when the block ends."""
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
    drawn.append(_inline(buffer.getvalue()))


def _inline(svg: str) -> str:
    """Return the drawing without its header and its fixed size, its ink in the colour of the page."""
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    for size in ("height", "width"):
        svg = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", svg, count=1)
    return svg


def draw_curves(curves: Sequence[Curve]) -> str:
    """Draw losses over steps, one plot for each stage."""
    stages = list(dict.fromkeys((curve.part, curve.stage) for curve in curves))
    rows, columns = math.ceil(len(stages) / 2), min(2, len(stages))
    with _drawing(2.6 * rows, rows, columns) as (axes, drawn):
        for axis, stage in zip(axes, stages, strict=False):
            for curve in curves:
                if (curve.part, curve.stage) == stage:
                    axis.plot(curve.steps, curve.values, linewidth=1, label=curve.name)
            axis.set(title=": ".join(stage), xlabel="step", ylabel="loss", yscale="log")
            axis.legend(frameon=False, fontsize=8)
        for axis in axes[len(stages) :]:
            axis.set_axis_off()
    return drawn[0]


def draw_layers(layers: Sequence[LayerReport]) -> str:
    """Draw error and cost of every layer."""
    with _drawing(0.9 + 0.19 * len(layers), columns=2) as (axes, drawn):
        places = np.arange(len(layers))
        axes[0].barh(places, [100 * layer.error for layer in layers], color=FIRST)
        axes[0].set(xlabel="error of the output (% of the teacher's variance)")
        axes[1].barh(places, [layer.cost for layer in layers], color=SECOND)
        axes[1].set(xlabel="divergence due to it (nats)")
        labels = [f"{layer.name}  w{layer.weight_bits}a{layer.activation_bits}" for layer in layers]
        for axis, names in zip(axes, (labels, [""] * len(layers)), strict=True):
            axis.set_yticks(places, names, fontsize=7)
            axis.set_ylim(len(layers) - 0.4, -0.6)
            axis.xaxis.set_major_locator(MaxNLocator(4))
    return drawn[0]


def draw_ranges(layers: Sequence[LayerReport]) -> str:
    """Draw the range of every layer's input beside the values that arrive, in units of the largest of them."""
    shown = [layer for layer in layers if layer.high is not None]
    with _drawing(1.0 + 0.19 * len(shown)) as ((axis,), drawn):
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
        axis.set_yticks(range(len(shown)), [f"{each.name}  {each.clipped:.2f} %" for each in shown], fontsize=7)
        axis.set_ylim(len(shown) - 0.4, -0.6)
        axis.set_xlabel("value, over the largest that arrives")
        _legend_below(axis)
    return drawn[0]


def draw_statistics(gaps: dict[str, float]) -> str:
    """Draw how far the statistics of samples are from those of the training data."""
    with _drawing(0.8 + 0.17 * len(gaps)) as ((axis,), drawn):
        axis.barh(range(len(gaps)), list(gaps.values()), color=FIRST)
        axis.axvline(LARGEST_GAP, color=SECOND, linewidth=1, linestyle="--")
        axis.set_yticks(range(len(gaps)), list(gaps), fontsize=7)
        axis.set_ylim(len(gaps) - 0.4, -0.6)
        axis.set_xlabel("gap (0: as the training data, 1: something else)")
    return drawn[0]


def draw_margins(single: Tensor, superposed: Tensor) -> str:
    """Draw how many samples of both kinds lie how near a boundary."""
    with _drawing(2.6) as ((axis,), drawn):
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
        axis.set(xlabel="margin: top-1 minus top-2 probability", ylabel="samples of the kind (%)")
        axis.legend(frameon=False)
    return drawn[0]


def draw_plane(
    points: Tensor, classes: Tensor, extent: tuple[float, float, float, float], kinds: Sequence[tuple[str, Tensor]]
) -> str:
    """Draw features in their plane, each kind with its own mark, on the regions of the teacher's classes."""
    marks = [("o", FIRST), ("x", SECOND), ("+", THIRD)]
    with _drawing(4.6) as ((axis,), drawn):
        found = classes.unique().tolist()
        area = np.searchsorted(found, classes.numpy())
        colours = matplotlib.colormaps["tab20"](np.arange(len(found)) % 20)
        colours[:, 3] = 0.22
        axis.imshow(colours[area], extent=extent, origin="lower", aspect="auto", interpolation="nearest")
        for (label, chosen), (mark, colour) in zip(kinds, marks, strict=False):
            x, y = points[chosen].T.numpy()
            axis.scatter(x, y, s=14, marker=mark, color=colour, linewidths=0.8, label=label)
        axis.set(xlabel="first principal component", ylabel="second principal component")
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
