"""A student's graph -> the same graph, in which layers sum whole numbers, as integer kernels do."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.fx import GraphModule

from qimera.graph import WEIGHTED, aten, logits_node
from qimera.quantization.fake_quantize import LearnedStepFakeQuantize, PerChannelBiasFakeQuantize
from qimera.quantization.scheme import quantizer_of


def with_exact_sums(module: GraphModule) -> GraphModule:
    """Return a graph in which every layer whose tensors are all on grids sums levels; it shares all parameters."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(module.graph, mapping)
    graph.output(mapping[logits_node(module)])
    result = GraphModule(module, graph)
    for node in list(graph.nodes):
        activation, weight, bias = (quantizer_of(result, each) for each in (*node.args, None, None, None)[:3])
        has_float_bias = len(node.args) > 2 and node.args[2] is not None and bias is None
        if node.target not in WEIGHTED or has_float_bias or not isinstance(activation, LearnedStepFakeQuantize):
            continue
        if isinstance(weight, LearnedStepFakeQuantize) and isinstance(bias, PerChannelBiasFakeQuantize | None):
            name = f"exact_{node.name}"
            result.add_submodule(name, _ExactLayer(node.target, activation, weight))
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.call_module(name, node.args))
            graph.erase_node(node)
    result.recompile()
    return result


class _ExactLayer(nn.Module):
    """A convolution or linear layer of numbers on grids, computed on their levels.

    Products and sums of levels are whole numbers, which float32 holds exactly up to 2 ** 24. Summed in the unit of the
    activations each would be rounded, in an order that differs from kernel to kernel, and now and then a result would
    land on another level of the next grid.
    """

    def __init__(
        self, layer: Callable[..., Tensor], activation: LearnedStepFakeQuantize, weight: LearnedStepFakeQuantize
    ) -> None:
        super().__init__()
        self.layer = layer
        self.quantizers = (activation, weight)  # a tuple: not submodules

    def forward(
        self,
        x: Float[Tensor, "batch ..."],
        weight: Float[Tensor, "..."],
        bias: Float[Tensor, " channel"] | None = None,
        *arguments: object,
    ) -> Float[Tensor, "batch ..."]:
        activation_step, weight_step = (quantizer.scale.detach() for quantizer in self.quantizers)
        sums = self.layer(_levels(x, activation_step), _levels(weight, weight_step), None, *arguments)
        axis = -1 if self.layer is aten.linear.default else 1
        shape = [-1 if each == axis % sums.ndim else 1 for each in range(sums.ndim)]
        step = (activation_step * weight_step.reshape(-1)).repeat(sums.shape[axis] // weight_step.numel())
        if bias is not None:
            sums += _levels(bias, step).view(shape)
        return sums.mul_(step.view(shape))


def _levels(x: Tensor, step: Tensor) -> Tensor:
    return (x * (1 / step)).round_()
