"""Batch norms of a graph -> part of the layer before them, or a multiplication and an addition of their own."""

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from qimera.graph.nodes import (
    WEIGHTED,
    aten,
    batch_norms,
    copied,
    groups_of,
    has_bias,
    has_parameter,
    names_of_parameters,
    new_parameter,
    node_at,
    tensor_of,
)


def fold_batch_norms(module: GraphModule) -> GraphModule:
    """Return a copy in which every batch norm that alone reads a convolution or linear layer is part of it.

    The copy computes the same logits up to rounding. Other batch norms (pre-activation networks, for example) stay.
    """
    folded = copied(module)
    for norm in batch_norms(folded):
        layer = node_at(norm, 0)
        if can_take_in_norm(layer):
            _fold(folded, layer, norm)
    folded.graph.eliminate_dead_code()
    folded.delete_all_unused_submodules()
    folded.recompile()
    return folded


def can_take_in_norm(layer: Node) -> bool:
    """Whether the norm of what ``layer`` returns scales and shifts what each row of its weight makes, and nothing else.

    Behind a linear layer on tokens (batch, token, feature) a batch norm is one of tokens.
    """
    has_other_bias = len(layer.args) > 2 and layer.args[2] is not None and not has_bias(layer)
    if not has_parameter(layer) or len(layer.users) > 1 or has_other_bias:
        return False
    return layer.target is not aten.linear.default or layer.meta["val"].ndim == 2


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
    elif layer.target is aten.conv_transpose2d.input:
        # (in, out / groups, ...) -> (out, in / groups, ...), the layout of other convolutions, and back
        groups = groups_of(layer)
        rows = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        fused, shifted = fuse_conv_bn_weights(nn.Parameter(rows), bias, mean, var, eps, scale, shift)
        new = nn.Parameter(fused.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)), shifted
    else:
        new = fuse_conv_bn_weights(weight, bias, mean, var, eps, scale, shift)
    owner, *names = names_of_parameters(layer)
    with module.graph.inserting_before(layer):
        weight_node, bias_node = (new_parameter(module, layer, owner, *each) for each in zip(names, new, strict=True))
    layer.args = (layer.args[0], weight_node, bias_node, *layer.args[3:])
    norm.replace_all_uses_with(layer)
    module.graph.erase_node(norm)
    layer.name = norm.name  # so that block outputs bear the same name in the teacher and in every student


def _optional_tensor(module: GraphModule, node: Node, index: int) -> Tensor | None:
    argument = node.args[index] if len(node.args) > index else None
    return tensor_of(module, argument) if isinstance(argument, Node) else None


def unshare_biases_(module: GraphModule) -> None:
    """Give every call of a layer that is called again a bias of its own: each lies on the grid of its own sums."""
    for reader in module.graph.find_nodes(op="get_attr"):
        for layer in [user for user in reader.users if user.target in WEIGHTED and _is_bias(user, reader)][1:]:
            owner = str(reader.target).rpartition(".")[0]
            with module.graph.inserting_before(layer):
                new = new_parameter(module, layer, owner, "bias", tensor_of(module, reader))
            layer.update_arg(2, new)
    module.recompile()


def _is_bias(layer: Node, reader: Node) -> bool:
    return len(layer.args) > 2 and layer.args[2] is reader


def unfold_batch_norms(module: GraphModule) -> GraphModule:
    """Return a copy in which every batch norm is a multiplication and an addition per channel, both trainable.

    This is the batch norm in evaluation mode, written so that nothing folds it into the layer before.
    """
    unfolded = copied(module)
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
            factor_node = new_parameter(unfolded, norm, owner, "factor", factor.view(per_channel))
            offset_node = new_parameter(unfolded, norm, owner, "offset", offset.view(per_channel))
            scaled = unfolded.graph.call_function(aten.mul.Tensor, (node_at(norm, 0), factor_node))
            result = unfolded.graph.call_function(aten.add.Tensor, (scaled, offset_node))
        scaled.meta["val"] = result.meta["val"] = norm.meta["val"]
        norm.replace_all_uses_with(result)
        unfolded.graph.erase_node(norm)
        result.name = norm.name
    unfolded.graph.eliminate_dead_code()
    unfolded.recompile()
    return unfolded
