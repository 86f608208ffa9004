"""A student and its reference -> the blocks at its beginning, as graphs of their own that also run on crops."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx
from torch.fx import GraphModule, Node

from qimera.graph.nodes import CONVOLUTIONS, aten, groups_of, node_called, tensor_of
from qimera.quantization.losses import block_outputs
from qimera.quantization.scheme import JOINS, PADDINGS, RELUS, before_moves
from qimera.student.equalization import shares_weight
from qimera.student.rounding import weight_quantizer

_LOCAL = {
    *RELUS,
    *JOINS,
    *PADDINGS,
    aten.conv2d.default,
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.minimum.default,
    aten.dropout.default,
    aten.clone.default,
    aten.contiguous.default,
}
"""Operations that compute a position from those around it, so that a crop of a map says what happens everywhere."""


@dataclass(frozen=True)
class Block:
    """Layers between two tensors through which everything flows; student and reference call these alike."""

    start: str
    """The node whose tensor the block reads."""

    end: str
    """The node whose tensor it returns, before that is quantized."""

    layers: tuple[Node, ...]
    """The student's layers inside, in order."""


def first_blocks(student: GraphModule, reference: GraphModule, count: int) -> list[Block]:
    """Return the first ``count`` blocks; fewer where there are no more that crops can stand for.

    A block has two layers or more, and a depthwise convolution is not its last one: the layer behind makes something of
    each channel, and can make up for its error.

    Args:
        student: Prepared graph.
        reference: The graph in full precision with folded batch norms, whose layers bear the same names.
        count: Most blocks that are wanted.
    """
    (images,) = student.graph.find_nodes(op="placeholder")
    own, theirs = ({node.name for node in graph.graph.nodes} for graph in (student, reference))
    start = images.name
    found: list[Block] = []
    for name in block_outputs(reference):
        end = before_moves(node_called(reference, name)).name  # what is padded next is quantized before that
        if len(found) == count or end == start or end not in own:
            continue
        inside = _between(student, start, end)
        layers = tuple(node for node in inside if node.target in CONVOLUTIONS)
        if not all(_is_local(student, node) for node in inside):
            break
        if not all(_is_local(reference, node) for node in _between(reference, start, end)):
            break
        if not all(layer.name in theirs and _has_own_weight(student, layer) for layer in layers):
            break
        if len(layers) > 1 and groups_of(layers[-1]) == 1:
            found.append(Block(start, end, layers))
            start = end
    return found


def part_of(module: GraphModule, block: Block, given: Sequence[Node] = ()) -> GraphModule:
    """Return a graph that computes the block from what it reads; parameters are shared.

    The tensors of ``given``, nodes of ``module``, are further arguments, in this order.
    """
    graph = fx.Graph()
    mapping = {node: graph.placeholder(node.name) for node in (node_called(module, block.start), *given)}
    for node in _between(module, block.start, block.end, given):
        mapping[node] = graph.node_copy(node, mapping.__getitem__)
    graph.output(mapping[node_called(module, block.end)])
    return GraphModule(module, graph)


def _between(module: GraphModule, start: str, end: str, given: Sequence[Node] = ()) -> list[Node]:
    """Return what must be computed for ``end`` once ``start`` and the ``given`` nodes are known, in order."""
    known, needed = {node_called(module, start), *given}, set()
    ahead = [node_called(module, end)]
    while ahead:
        node = ahead.pop()
        if node not in known and node not in needed:
            needed.add(node)
            ahead.extend(node.all_input_nodes)
    return [node for node in module.graph.nodes if node in needed]


def _has_own_weight(student: GraphModule, layer: Node) -> bool:
    return weight_quantizer(student, layer) is not None and not shares_weight(student, layer)


def _is_local(module: GraphModule, node: Node) -> bool:
    if node.op == "get_attr":
        joined = any(user.target in JOINS for user in node.users)
        return not joined or tensor_of(module, node).shape[-2:].numel() == 1  # the same at every position
    return node.op == "call_module" or node.target in _LOCAL
