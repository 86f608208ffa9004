"""What a student is judged by: the divergence from the teacher, and the errors of block outputs."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from qimera.graph.nodes import WEIGHTED, aten, is_size, node_at
from qimera.machine.acceleration import at_least_float32
from qimera.quantization.scheme import JOINS, PADDINGS, POOLINGS

_READING_ON = {*WEIGHTED, *JOINS, *POOLINGS, aten.max_pool2d.default}


def kl_loss(
    logits: Float[Tensor, "batch num_classes"], target: Float[Tensor, "batch num_classes"], temperature: float
) -> Float[Tensor, ""]:
    """Return KL(teacher || student) at this temperature, per sample, times its square (Hinton et al. 2015)."""
    divergence = F.kl_div(
        F.log_softmax(logits / temperature, 1),
        F.log_softmax(target / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2


def divergence(logits: Float[Tensor, "batch num_classes"], target: Float[Tensor, "batch num_classes"]) -> float:
    """Return KL(teacher || student) per sample, in nats; infinite where an answer is NaN or infinite."""
    # float64: at 8 bits it is smaller than the rounding errors of its terms in float32.
    found = float(kl_loss(logits.double(), target.double(), 1.0))
    return max(0.0, found) if math.isfinite(found) else math.inf


def feature_loss(
    features: list[Tensor], targets: list[Tensor], variances: list[Tensor] | None = None
) -> Float[Tensor, ""]:
    """Return the squared error of block outputs over the teacher's variance, averaged over blocks; 0 for none.

    The variances are those of ``targets``, unless these are but parts of the batch and those of the whole are given.
    Neither the paper nor its code has such a term (deviation D16).
    """
    if not features:
        return torch.zeros(())
    pairs = [(at_least_float32(mine), at_least_float32(theirs)) for mine, theirs in zip(features, targets, strict=True)]
    scales = variances or [_variance(theirs) for _, theirs in pairs]
    errors = [F.mse_loss(mine, theirs) for mine, theirs in pairs]
    return torch.stack([error / (scale + 1e-8) for error, scale in zip(errors, scales, strict=True)]).mean()


def _variance(values: Tensor) -> Float[Tensor, ""]:
    """Return the variance; of a single number, which has none, its square."""
    return values.var() if values.numel() > 1 else values.square().mean()


def block_outputs(module: GraphModule) -> list[str]:
    """Return the nodes through which everything flows that later layers see: the outputs of the network's blocks.

    In a residual network these are the activations after each addition, in a plain one those before each layer. A
    tensor that is padded with minus infinity counts without its padding, because it must have a variance.
    """
    nodes = [node for node in module.graph.nodes if node.op not in ("get_attr", "output") and not is_size(node)]
    position = {node: index for index, node in enumerate(nodes)}
    names, furthest = [], 0
    for index, node in enumerate(nodes):
        readers = [user for user in node.users if user in position]
        read_on = any(user.target in _READING_ON for user in readers)
        if furthest <= index and node.op == "call_function" and read_on and not _is_convolution_before_join(node):
            names.append(_before_infinities(node).name)
        furthest = max([furthest, *(position[user] for user in readers)])
    return names


def _before_infinities(node: Node) -> Node:
    while node.target in PADDINGS and any(isinstance(value, float) and math.isinf(value) for value in node.args[2:]):
        node = node_at(node, 0)
    return node


def _is_convolution_before_join(node: Node) -> bool:
    return node.target in WEIGHTED and all(user.target in JOINS for user in node.users)
