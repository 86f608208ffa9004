"""A student and some samples -> the error and the cost of each layer, and the range of its inputs."""

import copy

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import GraphModule, Node

from qimera.config.base import Settings
from qimera.graph.nodes import node_at, tensor_of, with_outputs
from qimera.quantization.fake_quantize import LearnedStepFakeQuantize
from qimera.quantization.losses import divergence
from qimera.quantization.scheme import before_moves, quantizer_of
from qimera.student.student import Student

_TAIL = 0.001
"""Share of values beyond each quantile."""


class LayerReport(Settings):
    """One layer of a student."""

    name: str
    weight_bits: int
    activation_bits: int
    error: float
    """Squared error of the layer's output in the student, divided by the variance of that output in the teacher."""

    cost: float
    """Divergence of class probabilities, in nats, if only this layer and its input are quantized in the teacher.
    Infinite where the teacher's answers then become NaN or infinite.

    The layer's weights are rounded to nearest for this. The student's own weights also compensate for errors of other
    layers, so they do not show what one layer costs."""

    low: float | None = None
    """Lowest value that the quantizer of the layer's input can hold; None where it has none of its own."""
    high: float | None = None
    smallest: float | None = None
    """Smallest value that arrives at it."""
    largest: float | None = None
    lower_tail: float | None = None
    """Value that one in a thousand is below."""
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
    ends = [_end(student, nodes[name]) for name in layers]
    _, found = student.with_features([*ends, *(node_at(node, 0).name for node in inputs.values())])(images)
    target, wanted = with_outputs(student.reference, ends)(images)
    returned, entering = found[: len(layers)], dict(zip(inputs, found[len(layers) :], strict=True))
    reports = []
    for (node_name, name), value, reference in zip(layers.items(), returned, wanted, strict=True):
        weight_bits, activation_bits = student.settings.bits_of(name.partition("@")[0])
        error = (value - reference).square().mean() / reference.var().clamp(min=1e-12)
        ranges: dict[str, float] = {}
        if node_name in inputs:
            quantizer = student.module.get_submodule(str(inputs[node_name].target))
            assert isinstance(quantizer, LearnedStepFakeQuantize)
            ranges = _ranges(quantizer, entering[node_name])
        reports.append(
            LayerReport(
                name=name,
                weight_bits=weight_bits,
                activation_bits=activation_bits,
                error=float(error),
                cost=divergence(_quantized_alone(student, nodes[node_name])(images)[0], target),
                **ranges,
            )
        )
    return reports


def _end(student: Student, layer: Node) -> str:
    """Return the node that holds what the layer returns in both graphs: behind its batch norm if it has one."""
    names = {node.name for node in student.reference.graph.nodes}
    while layer.name not in names:
        layer = next(iter(layer.users))
    return layer.name


def _quantizer_node(module: GraphModule, layer: Node) -> Node | None:
    """Return the node that quantizes the layer's input, where a learned step does."""
    node = before_moves(node_at(layer, 0))  # flattened or padded on the way
    is_learned = node.op == "call_module" and isinstance(
        module.get_submodule(str(node.target)), LearnedStepFakeQuantize
    )
    return node if is_learned else None


def _ranges(quantizer: LearnedStepFakeQuantize, values: Tensor) -> dict[str, float]:
    scale = float(quantizer.scale)
    low, high = float(quantizer.low) * scale, float(quantizer.high) * scale
    tail = int(_TAIL * values.numel())
    smallest, lower, upper, largest = _in_order(values, [0, tail, -1 - tail, -1])
    beyond = (values < low - scale / 2) | (values > high + scale / 2)
    return {
        "low": low,
        "high": high,
        "smallest": smallest,
        "largest": largest,
        "lower_tail": lower,
        "upper_tail": upper,
        "clipped": 100 * float(beyond.float().mean()),
    }


def _in_order(values: Tensor, places: list[int]) -> list[float]:
    """Return the values that would stand at these places if all were sorted, which takes six times as long."""
    ordered = np.partition(values.flatten().numpy(force=True), [place % values.numel() for place in places])
    return [float(ordered[place]) for place in places]


def _quantized_alone(student: Student, layer: Node) -> GraphModule:
    """Return the reference as a graph of (logits, []) in which only this layer and its input are quantized."""
    graph, end = with_outputs(student.reference, []), _end(student, layer)
    node = next(each for each in graph.graph.nodes if each.name == end)
    # Copies, for the range of some quantizers follows what they are called with.
    entering, weight = (copy.deepcopy(quantizer_of(student.module, argument)) for argument in layer.args[:2])
    assert weight is not None
    graph.register_buffer("rounded_weight", weight(tensor_of(graph, node_at(node, 1))))
    with graph.graph.inserting_before(node):
        node.update_arg(1, graph.graph.get_attr("rounded_weight"))
        if entering is not None:
            graph.add_submodule("rounding_of_input", entering)
            node.update_arg(0, graph.graph.call_module("rounding_of_input", (node_at(node, 0),)))
    graph.recompile()
    return graph
