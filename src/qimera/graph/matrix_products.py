"""Products of matrices in every spelling -> linear layers, where one matrix depends on no image, or plain products."""

import math

import torch
from torch.fx import GraphModule, Node

from qimera.graph.costs import axes_of_sum
from qimera.graph.nodes import aten, node_at
from qimera.graph.rewriting import argument, called, replace


def rewrite_product(module: GraphModule, node: Node) -> None:
    """A product with a matrix that depends on no image is a linear layer."""
    left, right = node_at(node, 0), node_at(node, 1)
    if left.meta["val"].ndim >= 2 and _is_layer(left, right):
        replace(node, aten.linear.default, left, _transposed(right))


def rewrite_sum_and_product(module: GraphModule, node: Node) -> None:
    """A constant vector plus such a product is a linear layer with a bias."""
    bias, left, right = (node_at(node, index) for index in range(3))
    plain = argument(node, "beta") == 1 and argument(node, "alpha") == 1
    if plain and _is_weight(right) and _is_constant(bias) and bias.meta["val"].ndim == 1:
        replace(node, aten.linear.default, left, _transposed(right), bias)


def rewrite_einsum(module: GraphModule, node: Node) -> None:
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
    if _is_layer(left, right):
        product = called(node, aten.linear.default, left, _transposed(right))
    else:
        product = called(node, aten.matmul.default, left, right)
    sizes |= others
    for place, axes in ((len(count) + 1, columns), (len(count), rows)):
        if len(axes) > 1:
            wanted = [size if isinstance(size := sizes[axis], int) else -1 for axis in axes]
            product = called(node, aten.unflatten.int, product, place, wanted)
    computed = count + rows + columns
    replace(node, aten.permute.default, product, [computed.index(axis) for axis in result])


def _merged(place: Node, factor: Node, term: str, count: list[str], *parts: list[str]) -> Node:
    """Return ``factor`` with its axes in the order of ``count`` and ``parts``, each of which becomes one axis."""
    order = [term.index(axis) for axis in sum(parts, count)]
    merged = called(place, aten.permute.default, factor, order)
    for start, part in enumerate(parts, len(count)):
        if len(part) > 1:
            merged = called(place, aten.flatten.using_ints, merged, start, start + len(part) - 1)
    return merged


def _transposed(matrix: Node) -> Node:
    result: Node = matrix.graph.call_function(aten.t.default, (matrix,))
    result.meta["val"] = aten.t.default(matrix.meta["val"])
    return result


def _is_layer(left: Node, right: Node) -> bool:
    return _is_weight(right) and not _is_constant(left)


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


def rewrite_attention(module: GraphModule, node: Node) -> None:
    """Two products of matrices and a softmax between them: softmax(queries keys^T * scale + mask) values."""
    if argument(node, "enable_gqa"):
        return
    queries, keys, values = (node_at(node, index) for index in range(3))
    width = queries.meta["val"].shape[-1]
    scale = argument(node, "scale")
    scores = called(node, aten.matmul.default, queries, called(node, aten.transpose.int, keys, -2, -1))
    scores = called(node, aten.mul.Tensor, scores, width**-0.5 if scale is None else float(scale))
    mask = _causal(node) if argument(node, "is_causal") else argument(node, "attn_mask")
    if mask is not None:
        scores = called(node, aten.add.Tensor, scores, _added_mask(node, mask))
    replace(node, aten.matmul.default, called(node, aten.softmax.int, scores, -1), values)


def _causal(node: Node) -> Node:
    """Which keys each query sees: those up to its own place."""
    sizes = [node_at(node, index).meta["val"].shape[-2] for index in (0, 1)]
    return called(node, aten.tril.default, called(node, aten.full.default, sizes, True, dtype=torch.bool))


def _added_mask(node: Node, mask: Node) -> Node:
    """Zero where a query sees a key and minus infinity where not; a mask of numbers is added as it is."""
    if mask.meta["val"].dtype != torch.bool:
        return mask
    zeros = called(node, aten.zeros_like.default, mask, dtype=torch.float32)
    hidden = called(node, aten.logical_not.default, mask)
    return called(node, aten.masked_fill.Scalar, zeros, hidden, -math.inf)
