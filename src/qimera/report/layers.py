"""A student and some samples -> what each of its layers loses, and how the ranges of its inputs lie."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import GraphModule, Node

from qimera.distillation import kl_loss
from qimera.graph import node_at, with_outputs
from qimera.quantization.fake_quantize import LearnedStepFakeQuantize
from qimera.quantization.scheme import quantizer_of
from qimera.quantization.student import Student
from qimera.validated import Settings

_TAIL = 0.001
"""Share of values beyond each quantile."""


class LayerReport(Settings):
    """One layer of a student."""

    name: str
    weight_bits: int
    activation_bits: int
    error: float
    """Squared error of what the layer returns, behind all quantized layers before it, over the teacher's variance."""

    cost: float
    """Divergence from the teacher of a teacher in which this layer alone has its weight and its input on the student's
    grids, in nats."""

    low: float | None = None
    """Lowest value that the quantizer of the layer's input can hold; None where it has none of its own."""
    high: float | None = None
    smallest: float | None = None
    """Smallest value that arrives at it."""
    largest: float | None = None
    lower_tail: float | None = None
    """One value in a thousand is smaller."""
    upper_tail: float | None = None
    clipped: float | None = None
    """Values beyond the range, in percent."""


@torch.no_grad()
def layer_reports(student: Student, images: Float[Tensor, "batch channel height width"]) -> list[LayerReport]:
    """Return one report for each layer of the graph, in its order.

    Args:
        student: As it was trained.
        images: Normalised; a few dozen are enough.
    """
    layers = student.layer_names()
    nodes = {node.name: node for node in student.module.graph.nodes}
    inputs = {name: node for name in layers if (node := _quantizer_node(student.module, nodes[name])) is not None}
    entering = {name: node_at(node, 0).name for name, node in inputs.items()}
    _, found = student.with_features([*layers, *entering.values()])(images)
    target, wanted = with_outputs(student.reference, list(layers))(images)
    values = dict(zip([*layers, *(f"input of {name}" for name in entering)], found, strict=True))
    reports = []
    for (node_name, name), reference in zip(layers.items(), wanted, strict=True):
        weight_bits, activation_bits = student.settings.bits_of(name.partition("@")[0])
        error = (values[node_name] - reference).square().mean() / reference.var().clamp(min=1e-12)
        ranges: dict[str, float] = {}
        if node_name in inputs:
            quantizer = student.module.get_submodule(str(inputs[node_name].target))
            assert isinstance(quantizer, LearnedStepFakeQuantize)
            ranges = _ranges(quantizer, values[f"input of {node_name}"])
        reports.append(
            LayerReport(
                name=name,
                weight_bits=weight_bits,
                activation_bits=activation_bits,
                error=float(error),
                cost=float(kl_loss(_quantized_alone(student, nodes[node_name])(images)[0], target, 1.0)),
                **ranges,
            )
        )
    return reports


def _quantizer_node(module: GraphModule, layer: Node) -> Node | None:
    """Return the node that quantizes the layer's input, where a learned step does."""
    node = node_at(layer, 0)
    while node.op == "call_function" and len(node.all_input_nodes) == 1:  # flattened or padded on the way
        node = node.all_input_nodes[0]
    is_learned = node.op == "call_module" and isinstance(
        module.get_submodule(str(node.target)), LearnedStepFakeQuantize
    )
    return node if is_learned else None


def _ranges(quantizer: LearnedStepFakeQuantize, values: Tensor) -> dict[str, float]:
    scale = float(quantizer.scale)
    low, high = float(quantizer.low) * scale, float(quantizer.high) * scale
    ordered = values.flatten().sort().values
    tail = int(_TAIL * len(ordered))
    beyond = (values < low - scale / 2) | (values > high + scale / 2)
    return {
        "low": low,
        "high": high,
        "smallest": float(ordered[0]),
        "largest": float(ordered[-1]),
        "lower_tail": float(ordered[tail]),
        "upper_tail": float(ordered[-1 - tail]),
        "clipped": 100 * float(beyond.float().mean()),
    }


def _quantized_alone(student: Student, layer: Node) -> GraphModule:
    """Return the teacher, in a graph that computes (logits, []), with this layer's weight and input on its grids.

    The student itself without the layer's quantizers would tell little: its weights may be rounded for good, and other
    layers have taken up what this one loses. The teacher's channels are scaled as the student's are.
    """
    other = with_outputs(student.reference, [])  # has a table of submodules of its own
    alone = next(node for node in other.graph.nodes if node.name == layer.name)
    for index, name in ((0, "input"), (1, "weight")):
        quantizer = quantizer_of(student.module, layer.args[index])
        if quantizer is not None:
            other.add_submodule(f"quantized_{name}", quantizer)
            with other.graph.inserting_before(alone):
                alone.update_arg(index, other.graph.call_module(f"quantized_{name}", (alone.args[index],)))
    other.recompile()
    return other
