"""Operations that can be written in several ways -> the one spelling that the rest of the package reads."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule, Node

from qimera.errors import UnsupportedModelError
from qimera.graph.matrix_products import rewrite_attention, rewrite_einsum, rewrite_product, rewrite_sum_and_product
from qimera.graph.nodes import BATCH_NORM, aten, node_at
from qimera.graph.rewriting import argument, arguments, replace


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
    x, weight, bias, mean, var, momentum, eps = arguments(node)
    _replace_first(BATCH_NORM)(node, (x, weight, bias, mean, var, False, momentum, eps, False))


def _layer_norm(module: GraphModule, node: Node) -> None:
    _replace_first(aten.layer_norm.default)(node, (*arguments(node), False))


def _group_norm(module: GraphModule, node: Node) -> None:
    x, weight, bias, _, _, _, groups, eps = arguments(node)
    _replace_first(aten.group_norm.default)(node, (x, groups, weight, bias, eps, False))


# --- convolutions -----------------------------------------------------------------------------------------------------

_CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_TRANSPOSED = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}


def _convolution(module: GraphModule, node: Node) -> None:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = arguments(node)
    rank = len(stride)
    if transposed:
        replace(node, _TRANSPOSED[rank], x, weight, bias, stride, padding, output_padding, groups, dilation)
    else:
        replace(node, _CONVOLUTIONS[rank], x, weight, bias, stride, padding, dilation, groups)


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
    replace(node, _CONVOLUTIONS[rank], x, weight, bias, stride, before, dilation, groups)


def _sizes_of_both_axes(module: GraphModule, node: Node) -> None:
    """One number in a list stands for height and width, which other runtimes do not know."""
    node.args = tuple(
        list(each) * 2 if isinstance(each, list | tuple) and len(each) == 1 else each for each in node.args
    )


def _each(values: Sequence[int], rank: int) -> list[int]:
    """Return one value for each axis; a single one serves all."""
    return list(values) * rank if len(values) == 1 else list(values)


# --- poolings and clamps ----------------------------------------------------------------------------------------------


def _max_pool2d(module: GraphModule, node: Node) -> None:
    _replace_first(aten.max_pool2d.default)(node, tuple(arguments(node)))


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
    x, kernel, stride, padding, ceil_mode, counts_zeros, divisor = arguments(node)
    kernel, padding = _each(kernel, 2), _each(padding, 2)
    stride = _each(stride, 2) if stride else kernel
    if divisor is not None and ceil_mode:
        raise UnsupportedModelError(
            f"{node.name}: average pooling with ceil_mode and divisor_override has no integer kernel; leave one out"
        )
    if divisor is not None:
        mean = node.graph.call_function(aten.avg_pool2d.default, (x, kernel, stride, padding, False, True))
        mean.meta = dict(node.meta)
        replace(node, aten.mul.Tensor, mean, kernel[0] * kernel[1] / divisor)
    elif ceil_mode and counts_zeros:
        if any(padding):
            # Behind the image only as far as windows reach: none of them begins in the padding there.
            sizes, counts = x.meta["val"].shape[2:], node.meta["val"].shape[2:]
            ends = [
                min(before, (count - 1) * step + length - size - before)
                for size, count, length, step, before in zip(sizes, counts, kernel, stride, padding, strict=True)
            ]
            sides = [padding[1], ends[1], padding[0], ends[0]]
            padded = node.graph.call_function(aten.constant_pad_nd.default, (x, sides))
            padded.meta["val"] = aten.constant_pad_nd.default(x.meta["val"], sides)
            x = padded
        replace(node, aten.avg_pool2d.default, x, kernel, stride, [0, 0], True, False)


def _copy(module: GraphModule, node: Node) -> None:
    """A copy into a tensor that nothing else reads is what is copied, spread to its shape."""
    into, source = node_at(node, 0), node_at(node, 1)
    if into.meta["val"].dtype == source.meta["val"].dtype:
        replace(node, aten.expand_as.default, source, into)


def _clamp(module: GraphModule, node: Node) -> None:
    """Clamps at zero are ReLUs, with or without a largest value."""
    _, low, high = (*arguments(node), None)[:3]
    if isinstance(low, int | float) and low == 0:
        if high is None:
            replace(node, aten.relu.default, node.args[0])
        elif isinstance(high, int | float):
            replace(node, aten.hardtanh.default, node.args[0], 0.0, float(high))


def _same_as(target: Callable[..., object], count: int) -> Callable[[GraphModule, Node], None]:
    """Return what replaces a node by ``target`` with its first ``count`` arguments."""

    def put(module: GraphModule, node: Node) -> None:
        replace(node, target, *arguments(node)[:count])

    return put


_REWRITES: dict[object, Callable[[GraphModule, Node], None]] = {
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
    aten.convolution.default: _convolution,
    aten.conv2d.default: _sizes_of_both_axes,
    aten.conv_transpose2d.input: _sizes_of_both_axes,
    aten.conv1d.padding: _padding_in_words,
    aten.conv2d.padding: _padding_in_words,
    aten.conv3d.padding: _padding_in_words,
    aten.mm.default: rewrite_product,
    aten.matmul.default: rewrite_product,
    aten.addmm.default: rewrite_sum_and_product,
    aten.einsum.default: rewrite_einsum,
    aten.scaled_dot_product_attention.default: rewrite_attention,
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
