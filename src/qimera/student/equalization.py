"""Scales of channels between two layers, so that quiet channels use as much of their tensor's one grid as loud ones."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import GraphModule, Node

from qimera.graph.nodes import aten, groups_of, node_at, node_called, tensor_of
from qimera.quantization.fake_quantize import LearnedStepFakeQuantize
from qimera.quantization.ranges import search_affine_parameters, thinned
from qimera.quantization.scheme import PADDINGS, RELUS, is_move

_NUM_POSITIONS = 2048
"""Values of a channel by which its reach is searched."""

_MAX_SCALE = 8.0
"""Largest scale; channels that are next to nothing stay so."""

_POWERS = (0.25, 0.5)
"""Shares of the way to equal reaches, in logarithms, that are tried where channels share a grid of weights."""

_LIMIT = "limit_of_"
"""Prefix of buffers that hold the limits of clamps, before the name of the node that clamps."""

_POOLINGS = {aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default}
_COPIES = {aten.dropout.default, aten.clone.default, aten.contiguous.default}


@dataclass(frozen=True)
class Edge:
    """A tensor between two layers of which each channel can be scaled by the one and scaled back by the other."""

    producer: Node
    """The layer whose weight's rows, and bias, are scaled; or the layer norm whose scales and shifts are."""

    end: Node
    """The activation function behind it, or the layer itself where there is none."""

    reader: Node
    """The layer whose weight's columns are scaled back; nothing else reads the tensor."""

    limit: float
    """What the activation function clamps to; infinite where it does not."""


def edge_into(module: GraphModule, reader: Node) -> Edge | None:
    """Return the edge that ends at ``reader``, a layer of the prepared graph ``module``, if its channels can be scaled.

    What lies between may be ReLU, ReLU6 and what treats every channel alike and in proportion. Channels of a layer norm
    that one linear layer reads differ tenfold in many transformers, and are scaled in its affine part (as in RepQ-ViT,
    Li et al. 2023).
    """
    if reader.target is aten.linear.default and (edge := _edge_behind_layer_norm(module, reader)) is not None:
        return edge
    end, between = node_at(reader, 0), []
    while len(end.users) == 1 and (end.op == "call_module" or _keeps_channels(end)):
        between.append(end)
        end = node_at(end, 0)
    producer, limit = (node_at(end, 0), _limit(end)) if end.target in RELUS else (end, math.inf)
    if producer.target is not aten.conv2d.default or len(end.users) != 1 or len(producer.users) != 1 or limit <= 0:
        return None
    is_linear = reader.target is aten.linear.default and any(_flattens(node) for node in between)
    if not is_linear and reader.target is not aten.conv2d.default:
        return None
    if any(shares_weight(module, layer) for layer in (producer, reader)):
        return None
    return Edge(producer, end, reader, limit)


def _edge_behind_layer_norm(module: GraphModule, reader: Node) -> Edge | None:
    end = node_at(reader, 0)
    while len(end.users) == 1 and (end.op == "call_module" or end.target in _COPIES):
        end = node_at(end, 0)
    if end.target is not aten.layer_norm.default or len(end.users) != 1:
        return None
    shape, *affine = (*end.args[1:4], None, None)[:3]
    is_of_channels = isinstance(shape, list) and len(shape) == 1
    if not is_of_channels or any(_is_shared(module, each) for each in affine) or shares_weight(module, reader):
        return None
    return Edge(end, end, reader, math.inf)


def _keeps_channels(node: Node) -> bool:
    """Whether the second axis of what ``node`` returns is that of its input, or each channel many times over.

    Where the input (batch, channel, height, width) is scaled per channel, the result is then scaled in the same way.
    """
    arguments = node.args[1:]
    if node.target in PADDINGS:
        return is_move(node) and isinstance(arguments[0], list) and len(arguments[0]) <= 4
    if node.target is aten.mean.dim:
        return isinstance(arguments[0], list) and sorted(int(str(axis)) % 4 for axis in arguments[0]) == [2, 3]
    return _flattens(node) or node.target in _POOLINGS or node.target in _COPIES


def _flattens(node: Node) -> bool:
    """Whether ``node`` brings (batch, channel, height, width) to (batch, channel * height * width), or to means."""
    arguments = node.args[1:]
    if node.target is aten.flatten.using_ints:
        return bool(arguments in ((1,), (1, -1)))
    if node.target in (aten.view.default, aten.reshape.default) and isinstance(arguments[0], list):
        batch, *rest = arguments[0]
        return rest == [-1] and isinstance(batch, Node) and bool(batch.target is aten.sym_size.int)
    return node.target is aten.mean.dim and arguments[1:] in ((), (False,))


def _limit(activation: Node) -> float:
    """Return what an activation function clamps to; 0 for one that also clamps numbers below zero elsewhere."""
    if activation.target is aten.relu.default:
        return math.inf
    if activation.target is aten.relu6.default:
        return 6.0
    low, high = (float(str(each)) for each in (*activation.args[1:3], *(-1.0, 1.0)[len(activation.args) - 1 :]))
    return high if low == 0 else 0.0


def shares_weight(module: GraphModule, layer: Node) -> bool:
    """Return whether the layer's weight is no parameter, or one that others read too."""
    weight = layer.args[1]
    if isinstance(weight, Node) and weight.op == "call_module":
        if len(weight.users) > 1:
            return True
        weight = node_at(weight, 0)
    return _is_shared(module, weight)


def _is_shared(module: GraphModule, parameter: object) -> bool:
    """Whether ``parameter`` is none, or one that others read too."""
    if not isinstance(parameter, Node) or parameter.op != "get_attr":
        return True
    readers = [each for each in module.graph.find_nodes(op="get_attr") if each.target == parameter.target]
    return sum(len(each.users) for each in readers) > 1


def parameter_of(layer: Node, index: int) -> Node:
    """Return the ``get_attr`` node of the weight (1) or bias (2) of ``layer``, before any quantizer."""
    node = node_at(layer, index)
    return node_at(node, 0) if node.op == "call_module" else node


def candidate_scales(
    edge: Edge, values: Float[Tensor, "batch ..."], num_steps: int
) -> Iterator[Float[Tensor, " channel"]]:
    """Yield scales worth trying, first of all ones.

    A channel's reach is where a grid of its own would best be clamped. Scales that go all the way bring each reach to
    the largest one, or up to the clamp. A depthwise convolution has a grid of weights for each channel, so that this
    costs nothing there. Elsewhere the weights of one output share a grid, which small scales disturb less.

    Args:
        edge: Where the scales would be put.
        values: What ``edge.end`` returns.
        num_steps: Steps of the tensor's grid, from its lowest to its highest level.
    """
    rows = thinned(values.movedim(_channel_axis(edge), 0).flatten(1), _NUM_POSITIONS)
    num_steps = num_steps // 2 if (rows < 0).any() else num_steps  # to either side of zero
    reach = search_affine_parameters(rows.abs(), 0, num_steps, symmetric=False, axis=0)[0] * num_steps
    top = reach.amax() if edge.limit == math.inf else torch.tensor(edge.limit, device=reach.device)
    full = (top / reach.clamp(min=torch.finfo(reach.dtype).tiny)).clamp(1.0, _MAX_SCALE)
    yield torch.ones_like(full)
    for power in (1.0,) if groups_of(edge.reader) == len(full) else _POWERS:
        yield full**power


def scaled(edge: Edge, values: Float[Tensor, "batch ..."], scale: Float[Tensor, " channel"]) -> Tensor:
    """Return what ``edge.end`` returns once its channels are scaled; it still clamps all of them to ``edge.limit``."""
    axes_behind = (1,) * (-1 - _channel_axis(edge))
    return (values * scale.view(-1, *axes_behind)).clamp(max=edge.limit)


def _channel_axis(edge: Edge) -> int:
    """Return where channels are, counted from the end; those of a layer norm come last."""
    return -1 if edge.end.target is aten.layer_norm.default else -3


def scale_rows_(module: GraphModule, edge: Edge, scale: Float[Tensor, " channel"]) -> None:
    """Scale what the producer of ``edge`` returns; where it is on grids, its integers stay as they are."""
    producer = node_called(module, edge.producer.name)
    if producer.target is aten.layer_norm.default:
        for index in (2, 3):
            affine = tensor_of(module, node_at(producer, index))
            affine *= scale
        return
    weight = tensor_of(module, parameter_of(producer, 1))
    weight *= scale.view(-1, 1, 1, 1)
    if len(producer.args) > 2 and producer.args[2] is not None:
        bias = tensor_of(module, parameter_of(producer, 2))
        bias *= scale
    if node_at(producer, 1).op == "call_module":
        quantizer = module.get_submodule(str(node_at(producer, 1).target))
        assert isinstance(quantizer, LearnedStepFakeQuantize)
        quantizer.set_(quantizer.scale * scale.view(quantizer.broadcast), quantizer.zero_point)


def scale_back_columns_(module: GraphModule, edge: Edge, scale: Float[Tensor, " channel"]) -> None:
    """Divide the reader's weights by the scales of what they multiply."""
    reader = node_called(module, edge.reader.name)
    weight, groups = tensor_of(module, parameter_of(reader, 1)), groups_of(reader)
    positions = weight.shape[1] * groups // len(scale)  # more than one where a linear layer reads a flattened map
    columns = scale.repeat_interleave(positions).view(groups, 1, -1, *(1 for _ in weight.shape[2:]))
    weight.copy_((weight.unflatten(0, (groups, -1)) / columns).flatten(0, 1))


def scale_channels_(module: GraphModule, edge: Edge, scale: Float[Tensor, " channel"]) -> None:
    """Scale the channels of ``edge`` in a graph in full precision; what it returns stays the same, up to rounding."""
    scale_rows_(module, edge, scale)
    scale_back_columns_(module, edge, scale)
    _clamp_(module, edge, scale)


def _clamp_(module: GraphModule, edge: Edge, scale: Float[Tensor, " channel"]) -> None:
    """Let the activation function of ``edge`` clamp each channel at the scaled limit, so that nothing else changes."""
    if edge.limit != math.inf:
        _put_limit_(module, edge.end.name, (edge.limit * scale).view(-1, 1, 1))


def restore_limits_(module: GraphModule, state: Mapping[str, Tensor]) -> None:
    """Clamp where the graph did whose ``state`` this is, so that ``module`` can load it."""
    device = next(module.parameters()).device
    for name in sorted(state.keys() - module.state_dict().keys()):  # in one order in all processes
        _put_limit_(module, name.removeprefix(_LIMIT), state[name].to(device))


def _put_limit_(module: GraphModule, activation: str, limit: Float[Tensor, "channel 1 1"]) -> None:
    end = node_called(module, activation)
    module.register_buffer(_LIMIT + activation, limit)
    with module.graph.inserting_before(end):
        positive = module.graph.call_function(aten.relu.default, (end.args[0],))
        end.args, end.kwargs = (positive, module.graph.get_attr(_LIMIT + activation)), {}
    end.target = aten.minimum.default
    module.recompile()
