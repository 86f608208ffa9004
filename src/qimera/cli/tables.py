"""Teachers, evaluations and recipes -> the text and tables that the command line prints."""

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from qimera.assessment.evaluation import Evaluation
from qimera.config.input_spec import InputSpec
from qimera.config.recipes import RECIPE_NAMES, recipe
from qimera.config.settings import QuantizationSettings
from qimera.graph.costs import total_multiply_adds
from qimera.graph.folding import fold_batch_norms
from qimera.graph.nodes import batch_norms
from qimera.quantization.scheme import float_operations, is_integer_product
from qimera.quantization.sizes import float_bytes, packed_bytes
from qimera.report.summary import readable_bytes
from qimera.synthesis.bank import SampleBank
from qimera.teacher.teacher import Layer, Teacher

_LISTED_AT_START = 4
_LISTED_AT_END = 4
_LISTED_WHOLE = 16
"""Layers up to which none is left out."""


def teacher_facts(model: str, teacher: Teacher) -> str:
    """Return what there is to quantize and to synthesise from, one fact per line."""
    spec, classifier = teacher.input_spec, teacher.classifier
    num_parameters = sum(parameter.numel() for parameter in teacher.module.parameters())
    num_products = sum(is_integer_product(node) for node in teacher.module.graph.nodes)
    products = f"; both factors of {num_products} products of activations" if num_products else ""
    taps = teacher.batch_norms
    num_exact = len(batch_norms(fold_batch_norms(teacher.module)))
    in_float = ", ".join(f"{count} {name}" for name, count in float_operations(teacher.module).most_common())
    facts = {
        "model": f"{model} (teacher {teacher.hash[:12]})",
        "input": f"{_times(spec.shape)}, pixels {spec.pixel_range[0]:g} to {spec.pixel_range[1]:g}, "
        f"mean {_listed(spec.mean)}, std {_listed(spec.std)}",
        "classes": f"{teacher.num_classes}, from {classifier.name} with {classifier.weight.shape[1]} features",
        "compute": f"{num_parameters:,} parameters, {_millions_of_multiply_adds(teacher)} per image",
        "batch norms": f"{len(taps)} tapped ({sum(len(tap.mean) for tap in taps):,} channels); "
        f"{len(taps) - num_exact} folded into layers, {num_exact} kept exact",
        "quantized": f"{len(teacher.layers)} layers, all their weights and inputs{products}; first input, additions, "
        "concatenations and average pooling at 8 bits",
        "in float": in_float or "nothing",
        "size": f"{readable_bytes(float_bytes(teacher))} in float32; {_sizes(teacher)}",
    }
    return "".join(f"{name:<13}{fact}\n" for name, fact in facts.items())


def _millions_of_multiply_adds(teacher: Teacher) -> str:
    total, of_layers = total_multiply_adds(teacher.module), sum(layer.macs for layer in teacher.layers)
    products = f" ({(total - of_layers) / 1e6:,.1f} in products of activations)" if total > of_layers else ""
    return f"{total / 1e6:,.1f} million multiply-adds{products}"


def bank_facts(path: Path, model: str, bank: SampleBank, teacher: Teacher) -> str:
    """Return what a bank is."""
    num_held_out = bank.settings.num_held_out
    held_out = f" and {num_held_out} held out" if num_held_out else ""
    return f"{path}: {bank.num_training} synthetic samples{held_out} of {model} (teacher {teacher.hash[:12]})"


def _sizes(teacher: Teacher) -> str:
    """Return the size of the weights at common bits; those of activations make no difference to it."""
    sizes = {"w8a8": 8, "w4a8 and w4a4": 4}
    settings = {name: QuantizationSettings(weight_bits=bits) for name, bits in sizes.items()}
    return ", ".join(f"{readable_bytes(packed_bytes(teacher, each))} at {name}" for name, each in settings.items())


def layer_table(teacher: Teacher, every_layer: bool) -> Table:
    """Return the layers with a weight; the middle of a long network is left out unless ``every_layer``."""
    table = _table("layer", "kind", right=("weight", "multiply-adds"))
    layers = teacher.layers
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


def evaluation_values(run: Path, data: Path, result: Evaluation) -> dict[str, object]:
    """Return an evaluation with a teacher for machines; shares in percent."""
    assert result.teacher_top1 is not None
    return {
        "run": str(run),
        "data": str(data),
        "num_images": result.num_images,
        "student_top1": result.top1,
        "student_top5": result.top5,
        "teacher_top1": result.teacher_top1,
        "teacher_top5": result.teacher_top5,
        "drop": round(result.teacher_top1 - result.top1, 6),
        "drop_low": result.drop_low,
        "drop_high": result.drop_high,
        "agreement": result.agreement,
        "warnings": result.warnings,
    }


def recipe_table(shape: tuple[int, int, int], num_classes: int) -> Table:
    """Return every recipe as it would be for such images and so many classes."""
    any_pixels = InputSpec(shape=shape, mean=(0.0,) * shape[0], std=(1.0,) * shape[0])
    table = _table("recipe", right=("generated", "optimized", "steps"))
    table.add_column("what", ratio=1)
    for name in RECIPE_NAMES:
        row = recipe(name, any_pixels, num_classes)
        counts = (row.synthesis.num_generated, row.synthesis.num_optimized, row.distillation.num_steps)
        table.add_row(name, *(f"{count:,}" for count in counts), row.description)
    table.caption = f"for {num_classes} classes and images of {_times(shape)}"
    return table


def _table(left: str, *more: str, right: tuple[str, ...]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    for name in (left, *more):
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _layer_cells(layer: Layer) -> tuple[str, str, str, str]:
    return layer.name, layer.kind, _times(layer.weight_shape), f"{layer.macs:,}"


def _accuracy_cells(name: str, student: float, teacher: float) -> tuple[str, str, str, str]:
    return name, f"{student:.2f}", f"{teacher:.2f}", f"{teacher - student:.2f}"


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
