"""Operations that can be written in several ways -> the one spelling that the rest of the package reads."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qimera.errors import UnsupportedModelError
from qimera.graph.costs import axes_of_sum
from qimera.graph.nodes import BATCH_NORM, aten, node_at


def rewrite_spellings_(module: GraphModule) -> None:
    """Give every operation its usual spelling; what the graph computes stays the same.

    Raises:
        UnsupportedModelError: an argument is set that no integer kernel and no usual spelling has.
    """
    for node in list(module.graph.nodes):
        rewrite = _REWRITES.get(node.target) if node.op == "call_function" else None
        if rewrite is not None:
            with module.graph.inserting_before(node):
                rewrite(module, node)
    module.graph.eliminate_dead_code()
    module.recompile()


def argument(node: Node, name: str) -> Any:
    """Return the argument of an operation by the name that its schema has for it, given or not."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    for index, each in enumerate(target._schema.arguments):
        if each.name == name:
            if index < len(node.args):
                return node.args[index]
            return node.kwargs.get(name, each.default_value)
    raise KeyError(name)


def _arguments(node: Node) -> list[Any]:
    """Return all arguments of an operation in the order of its schema."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return [argument(node, each.name) for each in node.target._schema.arguments]


def _replace(node: Node, target: Callable[..., object], *args: Any) -> Node:
    """Put a call of ``target`` in the place of ``node``."""
    new = node.graph.call_function(target, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return new


def _replace_first(target: Callable[..., object]) -> Callable[[Node, tuple[Any, ...]], None]:
    """Return what puts a call that returns one tensor in the place of one that returns it first of several."""

    def put(node: Node, args: tuple[Any, ...]) -> None:
        if any(user.args[1] != 0 for user in node.users if user.users):
            return  # the others are read, too
        new = node.graph.call_function(target, args)
        for user in list(node.users):
            new.meta = dict(user.meta)
            user.replace_all_uses_with(new)
            node.graph.erase_node(user)
        node.graph.erase_node(node)

    return put


# --- batch norms and layer norms --------------------------------------------------------------------------------------


def _batch_norm(module: GraphModule, node: Node) -> None:
    x, weight, bias, mean, var, momentum, eps = _arguments(node)
    _replace_first(BATCH_NORM)(node, (x, weight, bias, mean, var, False, momentum, eps, False))


def _layer_norm(module: GraphModule, node: Node) -> None:
    _replace_first(aten.layer_norm.default)(node, (*_arguments(node), False))


def _group_norm(module: GraphModule, node: Node) -> None:
    x, weight, bias, _, _, _, groups, eps = _arguments(node)
    _replace_first(aten.group_norm.default)(node, (x, groups, weight, bias, eps, False))


# --- convolutions -----------------------------------------------------------------------------------------------------

_CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_TRANSPOSED = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}


def _convolution(module: GraphModule, node: Node) -> None:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = _arguments(node)
    rank = len(stride)
    if transposed:
        _replace(node, _TRANSPOSED[rank], x, weight, bias, stride, padding, output_padding, groups, dilation)
    else:
        _replace(node, _CONVOLUTIONS[rank], x, weight, bias, stride, padding, dilation, groups)


def _padding_in_words(module: GraphModule, node: Node) -> None:
    """``same`` and ``valid``: as many zeros on both sides, or one more behind, where the kernel is even."""
    x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
    stride, dilation, groups = (argument(node, name) for name in ("stride", "dilation", "groups"))
    kernel = weight.meta["val"].shape[2:]
    rank = len(kernel)
    dilation, stride = _each(dilation, rank), _each(stride, rank)
    same = argument(node, "padding") == "same"
    total = [(size - 1) * step if same else 0 for size, step in zip(kernel, dilation, strict=True)]
    before = [each // 2 for each in total]
    if any(each % 2 for each in total):
        sides = [side for each in reversed(total) for side in (each // 2, each - each // 2)]
        x = node.graph.call_function(aten.constant_pad_nd.default, (x, sides))
        x.meta["val"] = aten.constant_pad_nd.default(node_at(x, 0).meta["val"], sides)
        before = [0] * rank
    _replace(node, _CONVOLUTIONS[rank], x, weight, bias, stride, before, dilation, groups)


def _each(values: Sequence[int], rank: int) -> list[int]:
    """Return one value for each axis; a single one serves all."""
    return list(values) * rank if len(values) == 1 else list(values)


# --- matrix products with a weight ------------------------------------------------------------------------------------


def _matrix_product(module: GraphModule, node: Node) -> None:
    """A product with a matrix that depends on no image is a linear layer."""
    left, right = node_at(node, 0), node_at(node, 1)
    if _is_weight(right) and left.meta["val"].ndim >= 2 and not _is_constant(left):
        _replace(node, aten.linear.default, left, _transposed(right))


def _sum_and_product(module: GraphModule, node: Node) -> None:
    bias, left, right = (node_at(node, index) for index in range(3))
    plain = argument(node, "beta") == 1 and argument(node, "alpha") == 1
    if plain and _is_weight(right) and _is_constant(bias) and bias.meta["val"].ndim == 1:
        _replace(node, aten.linear.default, left, _transposed(right), bias)


def _einsum(module: GraphModule, node: Node) -> None:
    """A sum over products of two tensors is a product of matrices, before and after which axes change places.

    Letters of both factors and the result count matrices; those of the first and the result are rows, those of the
    second and the result columns, and what the result lacks is summed over.
    """
    factors = argument(node, "tensors")
    shapes = [each.meta["val"].shape for each in factors]
    terms, result = axes_of_sum(argument(node, "equation").replace(" ", ""), [len(shape) for shape in shapes])
    if len(terms) != 2 or any(len(set(axes)) < len(axes) for axes in (*terms, result)):
        return
    first, second = terms
    count = [axis for axis in result if axis in first and axis in second]
    rows = [axis for axis in result if axis not in second]
    columns = [axis for axis in result if axis not in first]
    inner = [axis for axis in first if axis in second and axis not in result]
    is_all = {*first, *second} == {*count, *rows, *columns, *inner}
    sizes, others = (dict(zip(term, shape, strict=True)) for term, shape in zip(terms, shapes, strict=True))
    if not (rows and columns and inner and is_all) or any(sizes[axis] != others[axis] for axis in count + inner):
        return
    left = _merged(node, factors[0], first, count, rows, inner)
    right = _merged(node, factors[1], second, count, inner, columns)
    if _is_weight(right) and not _is_constant(left):
        product = _called(node, aten.linear.default, left, _transposed(right))
    else:
        product = _called(node, aten.matmul.default, left, right)
    sizes |= others
    for place, axes in ((len(count) + 1, columns), (len(count), rows)):
        if len(axes) > 1:
            wanted = [size if isinstance(size := sizes[axis], int) else -1 for axis in axes]
            product = _called(node, aten.unflatten.int, product, place, wanted)
    computed = count + rows + columns
    _replace(node, aten.permute.default, product, [computed.index(axis) for axis in result])


def _merged(place: Node, factor: Node, term: str, count: list[str], *parts: list[str]) -> Node:
    """Return ``factor`` with its axes in the order of ``count`` and ``parts``, each of which becomes one axis."""
    order = [term.index(axis) for axis in sum(parts, count)]
    merged = _called(place, aten.permute.default, factor, order)
    for start, part in enumerate(parts, len(count)):
        if len(part) > 1:
            merged = _called(place, aten.flatten.using_ints, merged, start, start + len(part) - 1)
    return merged


def _transposed(matrix: Node) -> Node:
    result: Node = matrix.graph.call_function(aten.t.default, (matrix,))
    result.meta["val"] = aten.t.default(matrix.meta["val"])
    return result


def _is_weight(node: Node) -> bool:
    return _is_constant(node) and node.meta["val"].ndim == 2


def _is_constant(node: Node) -> bool:
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if each.op == "placeholder":
            return False
        waiting += each.all_input_nodes
    return True


# --- attention --------------------------------------------------------------------------------------------------------


def _attention(module: GraphModule, node: Node) -> None:
    """Two products of matrices and a softmax between them: softmax(queries keys^T * scale + mask) values."""
    if argument(node, "enable_gqa"):
        return
    queries, keys, values = (node_at(node, index) for index in range(3))
    width = queries.meta["val"].shape[-1]
    scale = argument(node, "scale")
    scores = _called(node, aten.matmul.default, queries, _called(node, aten.transpose.int, keys, -2, -1))
    scores = _called(node, aten.mul.Tensor, scores, width**-0.5 if scale is None else float(scale))
    mask = _causal(node) if argument(node, "is_causal") else argument(node, "attn_mask")
    if mask is not None:
        scores = _called(node, aten.add.Tensor, scores, _added_mask(node, mask))
    _replace(node, aten.matmul.default, _called(node, aten.softmax.int, scores, -1), values)


def _causal(node: Node) -> Node:
    """Which keys each query sees: those up to its own place."""
    sizes = [node_at(node, index).meta["val"].shape[-2] for index in (0, 1)]
    return _called(node, aten.tril.default, _called(node, aten.full.default, sizes, True, dtype=torch.bool))


def _added_mask(node: Node, mask: Node) -> Node:
    """Zero where a query sees a key and minus infinity where not; a mask of numbers is added as it is."""
    if mask.meta["val"].dtype != torch.bool:
        return mask
    zeros = _called(node, aten.zeros_like.default, mask, dtype=torch.float32)
    hidden = _called(node, aten.logical_not.default, mask)
    return _called(node, aten.masked_fill.Scalar, zeros, hidden, -math.inf)


def _called(place: Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """Return a new call of ``target`` before ``place``."""
    new: Node = place.graph.call_function(target, args, kwargs)
    of_values = [each.meta["val"] if isinstance(each, Node) else each for each in args]
    new.meta["val"] = target(*of_values, **kwargs)
    return new


# --- poolings and clamps ----------------------------------------------------------------------------------------------


def _max_pool2d(module: GraphModule, node: Node) -> None:
    _replace_first(aten.max_pool2d.default)(node, tuple(_arguments(node)))


def _adaptive_max_pool2d(module: GraphModule, node: Node) -> None:
    """The largest value of each channel, or of windows that cover the image evenly."""
    size = node_at(node, 0).meta["val"].shape[-2:]
    wanted = _each(argument(node, "output_size"), 2)
    window = [whole // parts for whole, parts in zip(size, wanted, strict=True)]
    if wanted == [1, 1]:
        _replace_first(aten.amax.default)(node, (node.args[0], [-2, -1], True))
    elif all(whole % parts == 0 for whole, parts in zip(size, wanted, strict=True)):
        _replace_first(aten.max_pool2d.default)(node, (node.args[0], window, window))


def _avg_pool2d(module: GraphModule, node: Node) -> None:
    """Average over whole windows, or over what of them lies within the image and its padding.

    Runtimes disagree on zeros that are counted in beside windows that reach beyond them, so there the image is padded
    first. A divisor of its own is the usual average, zeros counted in, times a number.
    """
    x, kernel, stride, padding, ceil_mode, counts_zeros, divisor = _arguments(node)
    kernel, padding = _each(kernel, 2), _each(padding, 2)
    stride = _each(stride, 2) if stride else kernel
    if divisor is not None and ceil_mode:
        raise UnsupportedModelError(
            f"{node.name}: average pooling with ceil_mode and divisor_override has no integer kernel; leave one out"
        )
    if divisor is not None:
        mean = node.graph.call_function(aten.avg_pool2d.default, (x, kernel, stride, padding, False, True))
        mean.meta = dict(node.meta)
        _replace(node, aten.mul.Tensor, mean, kernel[0] * kernel[1] / divisor)
    elif ceil_mode and counts_zeros:
        if any(padding):
            sides = [padding[1], padding[1], padding[0], padding[0]]
            padded = node.graph.call_function(aten.constant_pad_nd.default, (x, sides))
            padded.meta["val"] = aten.constant_pad_nd.default(x.meta["val"], sides)
            x = padded
        _replace(node, aten.avg_pool2d.default, x, kernel, stride, [0, 0], True, False)


def _copy(module: GraphModule, node: Node) -> None:
    """A copy into a tensor that nothing else reads is what is copied, spread to its shape."""
    into, source = node_at(node, 0), node_at(node, 1)
    if into.meta["val"].dtype == source.meta["val"].dtype:
        _replace(node, aten.expand_as.default, source, into)


def _clamp(module: GraphModule, node: Node) -> None:
    """Clamps at zero are ReLUs, with or without a largest value."""
    _, low, high = (*_arguments(node), None)[:3]
    if isinstance(low, int | float) and low == 0:
        if high is None:
            _replace(node, aten.relu.default, node.args[0])
        elif isinstance(high, int | float):
            _replace(node, aten.hardtanh.default, node.args[0], 0.0, float(high))


def _same_as(target: Callable[..., object], count: int) -> Callable[[GraphModule, Node], None]:
    """Return what replaces a node by ``target`` with its first ``count`` arguments."""

    def put(module: GraphModule, node: Node) -> None:
        _replace(node, target, *_arguments(node)[:count])

    return put


_REWRITES: dict[object, Callable[[GraphModule, Node], None]] = {
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
    aten.convolution.default: _convolution,
    aten.conv1d.padding: _padding_in_words,
    aten.conv2d.padding: _padding_in_words,
    aten.conv3d.padding: _padding_in_words,
    aten.mm.default: _matrix_product,
    aten.matmul.default: _matrix_product,
    aten.addmm.default: _sum_and_product,
    aten.einsum.default: _einsum,
    aten.scaled_dot_product_attention.default: _attention,
    aten.max_pool2d_with_indices.default: _max_pool2d,
    aten.adaptive_max_pool2d.default: _adaptive_max_pool2d,
    aten.avg_pool2d.default: _avg_pool2d,
    aten._adaptive_avg_pool2d.default: _same_as(aten.adaptive_avg_pool2d.default, 2),
    aten._softmax.default: _same_as(aten.softmax.int, 2),
    aten._log_softmax.default: _same_as(aten.log_softmax.int, 2),
    # The graph's own layout of memory is channels last, in which not every view is one.
    aten.view.default: _same_as(aten.reshape.default, 2),
    aten._unsafe_view.default: _same_as(aten.reshape.default, 2),
    aten.copy.default: _copy,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
}
