"""An exported graph -> where it attends: the products of softmaxes with values."""

from torch.fx import GraphModule, Node

from qimera.graph.nodes import MATRIX_PRODUCTS, aten

_BETWEEN = {
    *(aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.add_.Tensor, aten.masked_fill.Scalar, aten.where.self),
    *(aten.softmax.int, aten.dropout.default, aten.reshape.default, aten.view.default, aten.unsqueeze.default),
    *(aten.squeeze.dim, aten.clone.default, aten.contiguous.default, aten.expand.default),
}
"""What may lie between the product of queries and keys, the softmax and the product with values."""


def attention_outputs(module: GraphModule) -> list[Node]:
    """Return the products of a softmax with values whose softmax is of another product, in order."""
    return [
        node
        for node in module.graph.nodes
        if node.target in MATRIX_PRODUCTS and isinstance(node.args[0], Node) and _is_of_scores(node.args[0])
    ]


def _is_of_scores(weights: Node) -> bool:
    """Whether ``weights`` are shares that a softmax computes of a product of two activations."""
    has_softmax = False
    while weights.target in _BETWEEN:
        has_softmax |= weights.target is aten.softmax.int
        before = [each for each in weights.all_input_nodes if each.op == "call_function"]
        if not before:
            return False
        weights = before[0]
    return has_softmax and weights.target in MATRIX_PRODUCTS
