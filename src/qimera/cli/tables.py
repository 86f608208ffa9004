"""Results of commands -> the text and tables that the command line prints."""

import textwrap
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from qimera.assessment.evaluation import Evaluation
from qimera.cli.console import terminal_width
from qimera.cli.results import Inspection, LayerFacts, Recipes, Synthesis
from qimera.report.summary import readable_bytes

_LISTED_AT_START = 4
_LISTED_AT_END = 4
_LISTED_WHOLE = 16
"""Layers up to which none is left out."""


def teacher_facts(found: Inspection) -> str:
    """Return what there is to quantize and to synthesise from, one fact per line."""
    spec = found.input
    products = f"; both factors of {found.num_products} products of activations" if found.num_products else ""
    facts = {
        "model": f"{found.model} (teacher {found.teacher[:12]})",
        "input": f"{_times(spec.shape)}, pixels {spec.pixel_range[0]:g} to {spec.pixel_range[1]:g}, "
        f"mean {_listed(spec.mean)}, std {_listed(spec.std)}",
        "classes": f"{found.num_classes}, from {found.classifier} with {found.num_features} features",
        "compute": f"{found.num_parameters:,} parameters, {_millions_of_multiply_adds(found)} per image",
        "batch norms": _batch_norms(found),
        "quantized": f"{len(found.layers)} layers, all their weights and inputs{products}; first input, additions, "
        "concatenations and average pooling at 8 bits",
        "in float": ", ".join(f"{count} {name}" for name, count in found.float_operations.items()) or "nothing",
        "size": f"{readable_bytes(found.float_bytes)} in float32; {_sizes(found)}",
    }
    return "".join(f"{name:<13}{_indented(fact)}\n" for name, fact in facts.items())


def _batch_norms(found: Inspection) -> str:
    if not found.num_batch_norms:
        return (
            "none: nothing records what training images were like, so runs give no estimate; if batch norms were "
            "folded into layers, give the network from before that"
        )
    num_folded = found.num_batch_norms - found.num_exact_batch_norms
    return (
        f"{found.num_batch_norms} tapped ({found.num_batch_norm_channels:,} channels); "
        f"{num_folded} folded into layers, {found.num_exact_batch_norms} kept exact"
    )


def _indented(fact: str) -> str:
    """Return a fact whose further lines stand under its first."""
    return f"\n{' ' * 13}".join(textwrap.wrap(fact, max(terminal_width() - 13, 20), break_on_hyphens=False))


def _millions_of_multiply_adds(found: Inspection) -> str:
    total, of_layers = found.multiply_adds, sum(layer.multiply_adds for layer in found.layers)
    products = f" ({(total - of_layers) / 1e6:,.1f} in products of activations)" if total > of_layers else ""
    return f"{total / 1e6:,.1f} million multiply-adds{products}"


def _sizes(found: Inspection) -> str:
    """Return the size of the weights at common bits, those of equal size together."""
    names: dict[int, list[str]] = {}
    for name, size in found.packed_bytes.items():
        names.setdefault(size, []).append(name)
    return ", ".join(f"{readable_bytes(size)} at {' and '.join(each)}" for size, each in names.items())


def bank_facts(found: Synthesis) -> str:
    """Return what a bank is."""
    held_out = f" and {found.num_held_out} held out" if found.num_held_out else ""
    images = "1 image" if found.num_images == 1 else f"{found.num_images:,} images"
    where = "which it holds" if found.holds_images else "of which it holds only the hash"
    of_yours = f"with {images} of yours, {where}\n" if found.num_images else ""
    return (
        f"{found.bank}: {found.num_samples} synthetic samples{held_out} of {found.model} "
        f"(teacher {found.teacher[:12]})\n{of_yours}"
    )


def layer_table(layers: Sequence[LayerFacts], every_layer: bool) -> Table:
    """Return the layers with a weight; the middle of a long network is left out unless ``every_layer``."""
    table = _table("layer", "kind", right=("weight", "multiply-adds"))
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    is_whole = every_layer or len(layers) <= _LISTED_WHOLE
    num_hidden = 0 if is_whole else len(layers) - _LISTED_AT_START - _LISTED_AT_END
    for layer in layers[:_LISTED_AT_START] if num_hidden else layers:
        table.add_row(*_layer_cells(layer))
    if num_hidden:
        table.add_row(f"... {num_hidden} more (--all)")
        for layer in layers[-_LISTED_AT_END:]:
            table.add_row(*_layer_cells(layer))
    return table


def evaluation_table(result: Evaluation) -> Table:
    """Return student beside teacher; only for an evaluation with a teacher."""
    assert result.teacher_top1 is not None
    assert result.drop_low is not None
    assert result.drop_high is not None
    table = _table("", right=("student", "teacher", "drop"))
    table.add_row(*_accuracy_cells("top-1 (%)", result.top1, result.teacher_top1))
    if result.top5 is not None and result.teacher_top5 is not None:
        table.add_row(*_accuracy_cells("top-5 (%)", result.top5, result.teacher_top5))
    table.add_row("agreement (%)", f"{result.agreement:.2f}")
    table.add_row("images", f"{result.num_images:,}")
    table.caption = f"drop in top-1, 90 % interval: {result.drop_low:.2f} to {result.drop_high:.2f} points"
    return table


def recipe_table(found: Recipes) -> Table:
    """Return every recipe and what it costs."""
    table = _table("recipe", right=("generated", "optimized", "steps"))
    for each in found.recipes:
        table.add_row(each.name, *(f"{count:,}" for count in (each.num_generated, each.num_optimized, each.num_steps)))
    table.caption = f"for {found.num_classes} classes and images of {_times(found.input_shape)}"
    return table


def recipe_facts(found: Recipes) -> str:
    """Return what every recipe does."""
    return "".join(f"{each.name:<13}{_indented(each.description)}\n" for each in found.recipes)


def _table(left: str, *more: str, right: tuple[str, ...]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption_justify="left", caption_style="")
    for name in (left, *more):
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _layer_cells(layer: LayerFacts) -> tuple[str, str, str, str]:
    return layer.name, layer.kind, _times(layer.weight_shape), f"{layer.multiply_adds:,}"


def _accuracy_cells(name: str, student: float, teacher: float) -> tuple[str, str, str, str]:
    return name, f"{student:.2f}", f"{teacher:.2f}", f"{teacher - student:.2f}"


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
