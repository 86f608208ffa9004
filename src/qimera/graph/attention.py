"""An exported graph -> where it attends: the products of softmaxes with values."""

from torch.fx import GraphModule, Node

from qimera.graph.nodes import MATRIX_PRODUCTS, aten

_BETWEEN = {
    *(aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.add_.Tensor),
    *(aten.masked_fill.Scalar, aten.masked_fill.Tensor),
    *(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf),
    *(aten.softmax.int, aten.dropout.default, aten.reshape.default, aten.view.default, aten.unsqueeze.default),
    *(aten.squeeze.dim, aten.clone.default, aten.contiguous.default, aten.expand.default),
}
"""What may lie between the product of queries and keys, the softmax and the product with values."""


def attentions(module: GraphModule) -> list[tuple[Node, Node]]:
    """Return the product of queries and keys and that of its softmax with values, of each attention in order."""
    products = [node for node in module.graph.nodes if node.target in MATRIX_PRODUCTS]
    scores = [_scores(node.args[0]) if isinstance(node.args[0], Node) else None for node in products]
    return [(found, product) for found, product in zip(scores, products, strict=True) if found is not None]


def _scores(weights: Node) -> Node | None:
    """Return the product of two activations that ``weights`` are the softmax of, if they are one.

    Masks and biases of positions may stand before or behind it in a sum or a choice.
    """
    waiting, seen = [(weights, False)], set()
    while waiting:
        node, has_softmax = state = waiting.pop()
        if has_softmax and node.target in MATRIX_PRODUCTS:
            return node
        if node.target in _BETWEEN and state not in seen:
            seen.add(state)
            has_softmax |= node.target is aten.softmax.int
            waiting += [(each, has_softmax) for each in reversed(node.all_input_nodes)]
    return None
