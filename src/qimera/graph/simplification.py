"""An exported graph -> the same network without detours: constants computed, one spelling, nothing written in place."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node

from qimera.errors import UnsupportedModelError
from qimera.graph.nodes import (
    WEIGHTED,
    aten,
    has_parameter,
    logits_node,
    names_of_parameters,
    new_parameter,
    node_at,
    tensor_of,
)
from qimera.graph.spellings import rewrite_spellings_

_RESHAPES = {aten.flatten.using_ints, aten.view.default, aten.reshape.default, aten.squeeze.dims, aten.squeeze.dim}
_MAX_CONSTANT_BYTES = 1 << 30
_ALIASES = {aten.dropout.default, aten.feature_dropout.default}
"""Operations that return their first argument itself when they do nothing, though their schemas do not say so."""


def simplify_(module: GraphModule) -> None:
    """Bring a graph into the form that everything else here reads.

    What the output does not depend on is dropped. Every operation gets its usual spelling (``spellings.py``). What
    depends on parameters and buffers alone, such as masked or standardised weights, is computed once and for all, for
    its value is what can be quantized. A weight that is a buffer becomes a parameter. A 1x1 convolution at one
    position that returns the logits becomes a linear layer, whose integer kernel can return floats.

    The graph must not write into tensors that are read again (``writes_what_is_read_again``).
    """
    _drop_unreachable_(module)
    _write_nowhere_(module)
    rewrite_spellings_(module)
    _compute_constants_(module)
    _make_weights_parameters_(module)
    _make_linear_(module, logits_node(module))
    _drop_unreachable_(module)
    module.recompile()


# --- regions ----------------------------------------------------------------------------------------------------------

_REGIONS = {
    torch.ops.higher_order.wrap_with_set_grad_enabled: 1,
    torch.ops.higher_order.wrap_with_autocast: 4,
}
"""Parts that are computed without gradients, or at another precision, and how many settings come first."""


def inline_regions_(module: GraphModule) -> bool:
    """Replace the parts that a graph keeps as graphs of their own by their nodes; everything is computed in float32.

    Returns whether one of them asked for a lower precision on the CPU.
    """
    is_narrow = False
    for node in [each for each in module.graph.nodes if each.target in _REGIONS]:
        count = _REGIONS[node.target]
        settings, part, arguments = node.args[:count], node.args[count], node.args[count + 1 :]
        region = module.get_submodule(str(part.target))
        assert isinstance(region, GraphModule)
        is_narrow |= inline_regions_(region) or (count == 4 and settings[0] == "cpu" and bool(settings[2]))
        inner = {read: given for read, given in zip(region.graph.find_nodes(op="placeholder"), arguments, strict=True)}
        with module.graph.inserting_before(node):
            returned = module.graph.graph_copy(region.graph, inner)
        for user in list(node.users):
            assert isinstance(returned, tuple | list)
            user.replace_all_uses_with(returned[user.args[1]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)
    module.recompile()
    return is_narrow


# --- writes -----------------------------------------------------------------------------------------------------------


def writes_what_is_read_again(module: GraphModule) -> bool:
    """Whether an operation writes into memory that others read after it, other than by what it returns."""
    memory: dict[Node, Node] = {}
    """Node -> the first node whose memory it may share."""
    results: dict[Node, Node] = {}
    """First node of some memory -> the last operation that wrote into it."""
    for node in module.graph.nodes:
        for argument in node.all_input_nodes:
            last = results.get(memory.get(argument, argument))
            if last is not None and not _comes_from(argument, last):
                return True
        if _writes(node):
            written = node_at(node, 0)
            memory[node] = memory.get(written, written)
            results[memory[node]] = node
        elif _may_alias(node):
            memory[node] = memory.get(node_at(node, 0), node_at(node, 0))
    return False


def _comes_from(node: Node, writer: Node) -> bool:
    """Whether ``node`` is what ``writer`` returned, or a view of it."""
    while node is not writer and (_may_alias(node) or _writes(node)):
        node = node_at(node, 0)
    return node is writer


def _may_alias(node: Node) -> bool:
    if node.target in _ALIASES or getattr(node.target, "__name__", "") == "getitem":
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(each.alias_info is not None for each in schema.returns)


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _write_nowhere_(module: GraphModule) -> None:
    """Let operations that write into their argument return a new tensor; their readers read that already."""
    for node in module.graph.nodes:
        if _writes(node) and isinstance(node.target, torch._ops.OpOverload):
            namespace, _, name = node.target.name().partition("::")
            packet = getattr(getattr(torch.ops, namespace), name.partition(".")[0].removesuffix("_"), None)
            if packet is not None and node.target._overloadname in packet.overloads():
                node.target = getattr(packet, node.target._overloadname)


# --- what nobody reads ------------------------------------------------------------------------------------------------


def _drop_unreachable_(module: GraphModule) -> None:
    (output,) = module.graph.find_nodes(op="output")
    reachable = {output, *_ancestors(output)}
    read = {node.target for node in reachable if node.op == "get_attr"}
    for node in reversed(list(module.graph.nodes)):
        if node not in reachable and node.op != "placeholder":
            if node.op == "get_attr" and node.target not in read:
                owner, _, name = str(node.target).rpartition(".")
                delattr(module.get_submodule(owner), name)
                read.add(node.target)
            module.graph.erase_node(node)
    module.recompile()


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


# --- constants --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _compute_constants_(module: GraphModule) -> None:
    """Replace each computed tensor that depends on no image by its value."""
    values: dict[Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            values[node] = tensor_of(module, node).detach()
        elif node.op == "call_function" and all(each in values for each in node.all_input_nodes):
            _refuse_huge_constant(node)
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda argument: values[argument])
            values[node] = node.target(*args, **kwargs)
    for node, value in values.items():
        if node.op == "call_function" and isinstance(value, Tensor):
            _store_constant_(module, node, [user for user in node.users if user not in values], value)


def _refuse_huge_constant(node: Node) -> None:
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.numel() * value.element_size() > _MAX_CONSTANT_BYTES:
        raise UnsupportedModelError(
            f"{node.name} is a constant of {value.numel():,} numbers, more than any network needs; compute it in parts"
        )


def _store_constant_(module: GraphModule, node: Node, readers: list[Node], value: Tensor) -> None:
    """Let ``readers`` read a stored ``value`` instead of ``node``: one for all but layers, whose weight each has."""
    source, is_parameter = _source_of(module, node)
    owner = source.rpartition(".")[0]
    stored: Node | None = None
    for reader in readers:
        is_weight = reader.target in WEIGHTED and node in reader.args[1:3]
        if is_weight or stored is None:
            name = ("weight", "bias")[reader.args.index(node) - 1] if is_weight else f"constant_{node.name}"
            name = name if owner or not is_weight else f"{source}_{name}"
            with module.graph.inserting_before(reader):
                wanted = is_weight or (is_parameter and value.is_floating_point())
                new = new_parameter(module, reader, owner, name, value, is_parameter=wanted)
            new.meta["val"] = node.meta.get("val")
            reader.replace_input_with(node, new)
            stored = stored if is_weight else new
        else:
            reader.replace_input_with(node, stored)


def _source_of(module: GraphModule, constant: Node) -> tuple[str, bool]:
    """Return the name of a tensor that ``constant`` is computed from, and whether it is a parameter: one if any is."""
    readers = [node for node in _ancestors(constant) if node.op == "get_attr"]
    readers.sort(key=lambda node: not isinstance(tensor_of(module, node), nn.Parameter))
    if not readers:
        return "", False
    return str(readers[0].target), isinstance(tensor_of(module, readers[0]), nn.Parameter)


def _make_weights_parameters_(module: GraphModule) -> None:
    """Let weights and biases that are buffers, such as those of fixed filters, be parameters."""
    for layer in [node for node in module.graph.nodes if node.target in WEIGHTED]:
        for reader in [each for each in layer.args[1:3] if isinstance(each, Node) and each.op == "get_attr"]:
            owner, _, name = str(reader.target).rpartition(".")
            value = tensor_of(module, reader)
            if not isinstance(value, nn.Parameter):
                delattr(module.get_submodule(owner), name)
                module.get_submodule(owner).register_parameter(name, nn.Parameter(value, requires_grad=False))


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
        owner, name, _ = names_of_parameters(logits)
        matrix = new_parameter(module, logits, owner, name, weight.flatten(1))
        linear = module.graph.call_function(aten.linear.default, (flat, matrix, *logits.args[2:3]))
        result = module.graph.call_function(aten.view.default, (linear, [-1, len(weight), 1, 1]))
    flat.meta["val"], linear.meta["val"] = images.meta["val"].flatten(1), value.flatten(1)
    result.meta["val"] = value
    logits.replace_all_uses_with(result)
    module.graph.erase_node(logits)
