"""Transformations of an exported ATen graph: folded constants, extra outputs, folded and exact batch norms."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from qimera.errors import UnsupportedModelError

aten = torch.ops.aten

CONVOLUTIONS = {
    aten.conv1d.default: "conv1d",
    aten.conv2d.default: "conv2d",
    aten.conv3d.default: "conv3d",
    aten.conv_transpose2d.input: "conv_transpose2d",
}
WEIGHTED = {**CONVOLUTIONS, aten.linear.default: "linear"}
"""Operations with a weight at argument 1 and a bias at argument 2, and what we call them."""

_RESHAPES = {aten.flatten.using_ints, aten.view.default, aten.reshape.default, aten.squeeze.dims, aten.squeeze.dim}

BATCH_NORM = aten.batch_norm.default


def node_at(node: Node, index: int) -> Node:
    """Return the argument of ``node`` at this place, which is a node."""
    argument = node.args[index]
    assert isinstance(argument, Node)
    return argument


def tensor_of(module: GraphModule, reader: Node) -> Tensor:
    """Return the parameter or buffer that a ``get_attr`` node reads."""
    owner, _, name = str(reader.target).rpartition(".")
    value = getattr(module.get_submodule(owner), name)
    assert isinstance(value, Tensor)
    return value


def has_parameter(layer: Node) -> bool:
    """Whether ``layer`` is a convolution or linear layer whose weight is a parameter, not another activation."""
    return layer.target in WEIGHTED and node_at(layer, 1).op == "get_attr"


def has_bias(layer: Node) -> bool:
    """Whether ``layer`` adds a bias that is a parameter."""
    bias = layer.args[2] if len(layer.args) > 2 else None
    return isinstance(bias, Node) and bias.op == "get_attr"


def layer_name(node: Node) -> str:
    """Return the dotted name of the module whose weight ``node`` uses, such as ``layer1.0.conv1``."""
    for argument in node.args[1:]:
        if isinstance(argument, Node) and argument.op == "get_attr":
            return str(argument.target).rpartition(".")[0] or str(argument.target)
    return node.name


def classifier_node(module: GraphModule, name: str) -> Node:
    """Return the node of the layer called ``name``, its last call where there are several."""
    found: list[Node] = [node for node in module.graph.nodes if has_parameter(node) and layer_name(node) == name]
    return found[-1]


def batch_norms(module: GraphModule) -> list[Node]:
    """Return the batch norms that use the statistics of training, in order; those that use the batch's are left out."""
    nodes = module.graph.find_nodes(op="call_function", target=BATCH_NORM)
    return [node for node in nodes if not node.args[5] and isinstance(node.args[3], Node)]


def logits_node(module: GraphModule) -> Node:
    """Return the node whose tensor the graph returns."""
    (output,) = module.graph.find_nodes(op="output")
    value = output.args[0]
    while isinstance(value, tuple | list):
        value = value[0]
    assert isinstance(value, Node)
    return value


def simplify_(module: GraphModule) -> None:
    """Drop what the output does not depend on, and compute weights and biases that depend on parameters alone.

    Such weights are masked, standardised or expanded in every call; what they come to is what can be quantized. A 1x1
    convolution at one position that returns the logits becomes a linear layer, whose integer kernel can return floats.

    Raises:
        UnsupportedModelError: something is written into a part of a tensor, which the graph's edges do not show.
    """
    _drop_unreachable_(module)
    _write_nowhere_(module)
    for layer in [node for node in module.graph.nodes if node.target in WEIGHTED]:
        for index, name in ((1, "weight"), (2, "bias")):
            argument = layer.args[index] if len(layer.args) > index else None
            if isinstance(argument, Node) and argument.op != "get_attr" and _is_constant(argument):
                owner = _owner_of(module, argument)
                with module.graph.inserting_before(layer):
                    new = _new_parameter(module, layer, owner, name, _compute(module, argument))
                layer.update_arg(index, new)
    _make_linear_(module, logits_node(module))
    _drop_unreachable_(module)
    module.recompile()


def _make_linear_(module: GraphModule, logits: Node) -> None:
    while logits.target in _RESHAPES:
        logits = node_at(logits, 0)
    if logits.target is not aten.conv2d.default or not has_parameter(logits):
        return
    weight = tensor_of(module, node_at(logits, 1))
    images, value = node_at(logits, 0), logits.meta["val"]
    one_group = weight.shape[1] == images.meta["val"].shape[1]
    if weight.shape[2:].numel() > 1 or images.meta["val"].shape[2:].numel() > 1 or not one_group:
        return
    with module.graph.inserting_before(logits):
        flat = module.graph.call_function(aten.flatten.using_ints, (images, 1))
        matrix = _new_parameter(module, logits, layer_name(logits), "weight", weight.flatten(1))
        linear = module.graph.call_function(aten.linear.default, (flat, matrix, *logits.args[2:3]))
        result = module.graph.call_function(aten.view.default, (linear, [-1, len(weight), 1, 1]))
    flat.meta["val"], linear.meta["val"] = images.meta["val"].flatten(1), value.flatten(1)
    result.meta["val"] = value
    logits.replace_all_uses_with(result)
    module.graph.erase_node(logits)


def to_channels_last_(module: nn.Module) -> None:
    """Bring convolution weights into the layout in which convolutions of images are fastest on CPUs."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def _drop_unreachable_(module: GraphModule) -> None:
    (output,) = module.graph.find_nodes(op="output")
    reachable = {output, *_ancestors(output)}
    for node in module.graph.nodes:
        if node not in reachable and _writes(node) and _base(node_at(node, 0)) in reachable:
            raise UnsupportedModelError(
                f"{node.name} ({node.target}) writes into a part of a tensor, which cannot be followed; "
                "let the model make a new tensor, with torch.cat or torch.where for example"
            )
    read = {node.target for node in reachable if node.op == "get_attr"}
    for node in reversed(list(module.graph.nodes)):
        if node not in reachable and node.op != "placeholder":
            if node.op == "get_attr" and node.target not in read:
                owner, _, name = str(node.target).rpartition(".")
                delattr(module.get_submodule(owner), name)
                read.add(node.target)
            module.graph.erase_node(node)
    module.recompile()


def _write_nowhere_(module: GraphModule) -> None:
    """Let operations that write into their argument return a new tensor; their readers read that already."""
    for node in module.graph.nodes:
        if _writes(node) and isinstance(node.target, torch._ops.OpOverload):
            namespace, _, name = node.target.name().partition("::")
            packet = getattr(getattr(torch.ops, namespace), name.partition(".")[0].removesuffix("_"), None)
            if packet is not None and node.target._overloadname in packet.overloads():
                node.target = getattr(packet, node.target._overloadname)


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _base(tensor: Node) -> Node:
    """Return the tensor that ``tensor`` is a view of."""
    while isinstance(tensor.target, torch._ops.OpOverload) and tensor.target.is_view:
        tensor = node_at(tensor, 0)
    return tensor


def _ancestors(node: Node) -> dict[Node, None]:
    """Return everything that ``node`` depends on."""
    found: dict[Node, None] = {}
    waiting = list(node.all_input_nodes)
    while waiting:
        each = waiting.pop()
        if each not in found:
            found[each] = None
            waiting += each.all_input_nodes
    return found


def _owner_of(module: GraphModule, constant: Node) -> str:
    """Return the module whose parameter ``constant`` is computed from, rather than one whose mask or mean it is."""
    readers = [node for node in _ancestors(constant) if node.op == "get_attr"]
    readers.sort(key=lambda node: not isinstance(tensor_of(module, node), nn.Parameter))
    return str(readers[0].target).rpartition(".")[0] if readers else ""


def _is_constant(node: Node) -> bool:
    return not any(each.op == "placeholder" for each in (node, *_ancestors(node)))


@torch.no_grad()
def _compute(module: GraphModule, node: Node) -> Tensor:
    """Return what a constant ``node`` evaluates to."""
    values: dict[Node, Any] = {}
    needed = {node, *_ancestors(node)}
    for each in module.graph.nodes:
        if each in needed and each.op == "get_attr":
            values[each] = tensor_of(module, each).detach().clone()
        elif each in needed:
            arguments = fx.map_arg((each.args, each.kwargs), lambda argument: values[argument])
            values[each] = each.target(*arguments[0], **arguments[1])
    value = values[node]
    assert isinstance(value, Tensor)
    return value


def with_outputs(module: GraphModule, names: Sequence[str]) -> GraphModule:
    """Return a graph that computes (logits, [the tensors of the nodes called ``names``]), sharing all parameters."""
    graph = fx.Graph()
    mapping: dict[Node, Node] = {}
    graph.graph_copy(module.graph, mapping)
    by_name = {node.name: copied for node, copied in mapping.items()}
    graph.output((mapping[logits_node(module)], [by_name[name] for name in names]))
    result = GraphModule(module, graph)
    result.graph.eliminate_dead_code()
    result.recompile()
    return result


def _copy(module: GraphModule) -> GraphModule:
    """Return a deep copy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # from torch, whose graphs hold what it deprecates
        return copy.deepcopy(module)


def fold_batch_norms(module: GraphModule) -> GraphModule:
    """Return a copy in which every batch norm that alone reads a convolution or linear layer is part of it.

    The copy computes the same logits up to rounding. Other batch norms (pre-activation networks, for example) stay.
    """
    folded = _copy(module)
    for norm in batch_norms(folded):
        layer = node_at(norm, 0)
        if has_parameter(layer) and len(layer.users) == 1:
            _fold(folded, layer, norm)
    folded.graph.eliminate_dead_code()
    folded.delete_all_unused_submodules()
    folded.recompile()
    return folded


def _fold(module: GraphModule, layer: Node, norm: Node) -> None:
    weight, bias = (_optional_tensor(module, layer, index) for index in (1, 2))
    scale, shift, mean, var = (_optional_tensor(module, norm, index) for index in (1, 2, 3, 4))
    eps = norm.args[7]
    assert weight is not None
    assert mean is not None
    assert var is not None
    assert isinstance(eps, float)
    weight = nn.Parameter(weight.detach().clone())
    scale = torch.ones_like(mean) if scale is None else scale
    shift = torch.zeros_like(mean) if shift is None else shift
    if layer.target is aten.linear.default:
        new = fuse_linear_bn_weights(weight, bias, mean, var, eps, scale, shift)
    else:
        transposed = layer.target is aten.conv_transpose2d.input
        new = fuse_conv_bn_weights(weight, bias, mean, var, eps, scale, shift, transposed)
    owner = layer_name(layer)
    with module.graph.inserting_before(layer):
        weight_node, bias_node = (
            _new_parameter(module, layer, owner, *each) for each in zip(("weight", "bias"), new, strict=True)
        )
    layer.args = (layer.args[0], weight_node, bias_node, *layer.args[3:])
    norm.replace_all_uses_with(layer)
    module.graph.erase_node(norm)
    layer._rename(norm.name)  # so that block outputs bear the same name in the teacher and in every student


def _optional_tensor(module: GraphModule, node: Node, index: int) -> Tensor | None:
    argument = node.args[index] if len(node.args) > index else None
    return tensor_of(module, argument) if isinstance(argument, Node) else None


def _new_parameter(module: GraphModule, layer: Node, owner: str, name: str, value: Tensor) -> Node:
    """Store value in the module called owner and return a node that reads it.

    A parameter that others than ``layer`` read keeps its value for them; the new one then gets a name of its own.
    """
    prefix = f"{owner}." if owner else ""
    target = prefix + name
    readers = [node for node in module.graph.nodes if node.op == "get_attr" and node.target == target]
    if any(user is not layer for reader in readers for user in reader.users):
        own = [key for key, _ in module.get_submodule(owner).named_parameters(recurse=False)]
        name = f"{name}_{sum(key.startswith(name) for key in own)}"
    setattr(module.get_submodule(owner), name, nn.Parameter(value.detach().clone()))
    return module.graph.get_attr(prefix + name)


def unshare_biases_(module: GraphModule) -> None:
    """Give every call of a layer that is called again a bias of its own: each lies on the grid of its own sums."""
    for reader in module.graph.find_nodes(op="get_attr"):
        for layer in [user for user in reader.users if user.target in WEIGHTED and _is_bias(user, reader)][1:]:
            owner = str(reader.target).rpartition(".")[0]
            with module.graph.inserting_before(layer):
                new = _new_parameter(module, layer, owner, "bias", tensor_of(module, reader))
            layer.update_arg(2, new)
    module.recompile()


def _is_bias(layer: Node, reader: Node) -> bool:
    return len(layer.args) > 2 and layer.args[2] is reader


def unfold_batch_norms(module: GraphModule) -> GraphModule:
    """Return a copy in which every batch norm is a multiplication and an addition per channel, both trainable.

    This is the batch norm in evaluation mode, written so that nothing folds it into the layer before.
    """
    unfolded = _copy(module)
    for norm in batch_norms(unfolded):
        scale, shift, mean, var = (_optional_tensor(unfolded, norm, index) for index in (1, 2, 3, 4))
        eps = norm.args[7]
        assert mean is not None
        assert var is not None
        assert isinstance(eps, float)
        factor = torch.rsqrt(var + eps) * (1 if scale is None else scale)
        offset = (0 if shift is None else shift) - mean * factor
        per_channel = (-1, *(1 for _ in norm.meta["val"].shape[2:]))
        owner = str(node_at(norm, 3).target).rpartition(".")[0]
        with unfolded.graph.inserting_before(norm):
            factor_node = _new_parameter(unfolded, norm, owner, "factor", factor.view(per_channel))
            offset_node = _new_parameter(unfolded, norm, owner, "offset", offset.view(per_channel))
            scaled = unfolded.graph.call_function(aten.mul.Tensor, (node_at(norm, 0), factor_node))
            result = unfolded.graph.call_function(aten.add.Tensor, (scaled, offset_node))
        scaled.meta["val"] = result.meta["val"] = norm.meta["val"]
        norm.replace_all_uses_with(result)
        unfolded.graph.erase_node(norm)
        result._rename(norm.name)
    unfolded.graph.eliminate_dead_code()
    unfolded.recompile()
    return unfolded
