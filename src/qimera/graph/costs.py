"""An exported ATen graph -> what its layers and matrix products cost: multiply-adds for one image."""

import math
from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from qimera.graph.nodes import aten, node_at, tensor_of


def multiply_adds(node: Node) -> int:
    """Return the multiply-adds of ``node`` for one image; 0 for what is no layer and no product of matrices.

    Padding counts as pixels do, as everywhere; biases and the ends of a product (scaling, softmax) do not count.
    """
    if not is_multiplying(node):
        return 0
    count = _COUNTS[node.target](node)
    images = next(each for each in node.graph.nodes if each.op == "placeholder").meta["val"]
    batch = images.shape[0]
    return count // batch if isinstance(batch, int) else count


def total_multiply_adds(module: GraphModule) -> int:
    """Return those of the whole network, a layer that is called twice counting twice."""
    return sum(multiply_adds(node) for node in module.graph.nodes)


def is_multiplying(node: Node) -> bool:
    """Whether ``node`` is a layer or a product of matrices, with or without a weight."""
    return node.target in _COUNTS


def _shape(node: Node) -> tuple[int, ...]:
    """Return the shape of what ``node`` returns for a single image."""
    if node.op == "get_attr":
        module = node.graph.owning_module
        assert isinstance(module, GraphModule)
        return tuple(tensor_of(module, node).shape)
    return tuple(_of_one_image(size) for size in node.meta["val"].shape)


def _of_one_image(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr  # such as 64 * s0, where windows of all images are in one axis
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))


def _convolution(node: Node) -> int:
    """(output, input / groups, *kernel): all but the first axis for each number that comes out."""
    return math.prod(_shape(node)) * math.prod(_shape(node_at(node, 1))[1:])


def _transposed(node: Node) -> int:
    """(input, output / groups, *kernel): all but the first axis for each number that goes in."""
    return math.prod(_shape(node_at(node, 0))) * math.prod(_shape(node_at(node, 1))[1:])


def _any_convolution(node: Node) -> int:
    return _transposed(node) if node.args[6] else _convolution(node)


def _product(node: Node) -> int:
    """A row of the first factor for each number that comes out; so it is in a linear layer, too."""
    return math.prod(_shape(node)) * _shape(node_at(node, 0))[-1]


def _added_product(node: Node) -> int:
    """(addend, first factor, second factor), which may be a vector."""
    first, second = (_shape(node_at(node, index)) for index in (1, 2))
    return math.prod(first) * math.prod(second[len(first) - 1 :])


def _attention(node: Node) -> int:
    """(queries, keys, values): two products, also where a mask hides a part."""
    *batch, num_queries, width = _shape(node_at(node, 0))
    num_keys, value_width = _shape(node_at(node, 1))[-2], _shape(node_at(node, 2))[-1]
    return math.prod(batch) * num_queries * num_keys * (width + value_width)


def _bilinear(node: Node) -> int:
    return math.prod(_shape(node)) * math.prod(_shape(node_at(node, 2))[1:])


def _recurrent(node: Node) -> int:
    """(sequence, states, parameters): every matrix once in each step."""
    parameters = node.args[2]
    assert isinstance(parameters, list | tuple)
    shapes = [_shape(each) for each in parameters if isinstance(each, Node)]
    return math.prod(_shape(node_at(node, 0))[:-1]) * sum(math.prod(shape) for shape in shapes if len(shape) == 2)


def _einsum(node: Node) -> int:
    """The factors are multiplied from the left, each product summed over what neither the rest nor the result has."""
    equation, factors = node.args[:2]
    assert isinstance(equation, str)
    assert isinstance(factors, list | tuple)
    shapes = [_shape(each) for each in factors if isinstance(each, Node)]
    terms, result = axes_of_sum(equation.replace(" ", ""), [len(shape) for shape in shapes])
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for axis, size in zip(term, shape, strict=True):
            sizes[axis] = max(size, sizes.get(axis, 1))
    count, left = 0, set(terms[0])
    for number, term in enumerate(terms[1:], 2):
        count += math.prod(sizes[axis] for axis in left | set(term))
        left = (left | set(term)) & set(result).union(*terms[number:])
    return count


def axes_of_sum(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """Return the axes of each factor of an Einstein sum, as many as ``ranks`` says, and of the result.

    Those that dots stand for are digits, counted from the end.
    """
    left, arrow, result = equation.partition("->")
    terms, dots = [], ""
    for term, rank in zip(left.split(","), ranks, strict=True):
        hidden = "".join(map(str, reversed(range(rank - len(term.replace("...", "")))))) if "..." in term else ""
        dots = max(dots, hidden, key=len)
        terms.append(term.replace("...", hidden))
    if not arrow:
        letters = left.replace(",", "").replace("...", "")
        result = "..." + "".join(sorted(axis for axis in set(letters) if letters.count(axis) == 1))
    return terms, result.replace("...", dots)


_COUNTS: dict[object, Callable[[Node], int]] = {
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), _convolution),
    **dict.fromkeys((aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding), _convolution),
    **dict.fromkeys(
        (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input), _transposed
    ),
    aten.convolution.default: _any_convolution,
    **dict.fromkeys((aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default), _product),
    **dict.fromkeys((aten.mv.default, aten.dot.default), _product),
    **dict.fromkeys(
        (aten.addmm.default, aten.addmv.default, aten.baddbmm.default, aten.addbmm.default), _added_product
    ),
    aten.scaled_dot_product_attention.default: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten.einsum.default: _einsum,
    aten.bilinear.default: _bilinear,
    **dict.fromkeys((aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input), _recurrent),
}
"""Everything that multiplies, and how its multiply-adds follow from shapes."""
