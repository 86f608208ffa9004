"""A student's graph -> the same graph, in which layers and additions compute on levels, as integer kernels do."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.fx import GraphModule

from qimera.graph.nodes import MATRIX_PRODUCTS, WEIGHTED, aten, logits_node
from qimera.quantization.fake_quantize import LearnedStepFakeQuantize, PerChannelBiasFakeQuantize
from qimera.quantization.scheme import ADDITIONS, end_of_kernel, quantizer_of

_WHOLE = 1 << 24
"""Up to here float32 holds every whole number."""


def with_exact_sums(module: GraphModule) -> GraphModule:
    """Return a graph whose layers, products and additions of tensors on grids compute on levels; the rest is shared.

    The rounding is that of ONNX Runtime; ``with_int8_kernels`` has that of LiteRT.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(module.graph, mapping)
    graph.output(mapping[logits_node(module)])
    result = GraphModule(module, graph)
    for node in list(graph.nodes):
        exact = _exact_module(result, node)
        if exact is not None:
            name = f"exact_{node.name}"
            result.add_submodule(name, exact)
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.call_module(name, node.args))
            graph.erase_node(node)
    result.recompile()
    return result


def _exact_module(module: GraphModule, node: fx.Node) -> nn.Module | None:
    if node.target in WEIGHTED:
        return exact_layer(module, node)
    return exact_product(module, node) if node.target in MATRIX_PRODUCTS else _exact_addition(module, node)


def exact_product(module: GraphModule, node: fx.Node, *, rounds: bool = True) -> "ExactProduct | None":
    """Return what computes a product of matrices on levels; None where one of them is on no grid.

    Unless it ``rounds``, it returns numbers, which the quantizer behind it brings onto its grid.
    """
    first, second = (quantizer_of(module, each) for each in node.args[:2])
    if not isinstance(first, LearnedStepFakeQuantize) or not isinstance(second, LearnedStepFakeQuantize):
        return None
    return ExactProduct(first, second, quantizer_behind(module, node) if rounds else None)


def exact_layer(module: GraphModule, layer: fx.Node) -> "ExactLayer | None":
    """Return what computes a layer on levels; None where something of it is on no grid."""
    activation, weight, bias = (quantizer_of(module, each) for each in (*layer.args, None, None)[:3])
    has_float_bias = len(layer.args) > 2 and layer.args[2] is not None and bias is None
    if has_float_bias or not isinstance(bias, PerChannelBiasFakeQuantize | None):
        return None
    if not isinstance(activation, LearnedStepFakeQuantize) or not isinstance(weight, LearnedStepFakeQuantize):
        return None
    assert callable(layer.target)
    return ExactLayer(layer.target, activation, weight, quantizer_behind(module, layer))


def _exact_addition(module: GraphModule, node: fx.Node) -> "_ExactAddition | None":
    if node.target not in ADDITIONS or node.kwargs:
        return None
    first, second = (quantizer_of(module, each) for each in node.args[:2])
    behind = quantizer_behind(module, node)
    if not isinstance(first, LearnedStepFakeQuantize) or not isinstance(second, LearnedStepFakeQuantize):
        return None
    return None if behind is None else _ExactAddition(first, second, behind)


def quantizer_behind(module: GraphModule, node: fx.Node) -> LearnedStepFakeQuantize | None:
    """Return the quantizer to whose grid an integer kernel of ``node`` rounds its sums; None if it returns floats."""
    readers = {quantizer_of(module, user) if user.op == "call_module" else None for user in end_of_kernel(node).users}
    quantizer = readers.pop() if len(readers) == 1 else None
    return quantizer if isinstance(quantizer, LearnedStepFakeQuantize) else None


class _ExactAddition(nn.Module):
    """The sum of two tensors on grids, rounded onto the grid of the result as ONNX Runtime's integer kernel does it.

    That is round(fma(a, r_a, fma(b, r_b, z - fma(r_a, z_a, r_b z_b)))) with levels a and b counted from 0, zero points
    z_a, z_b and z, and the rounded ratios r of each step to that of the result, all in float32 (measured; float64
    stands in for the fused products, in which no bit of theirs is lost).
    """

    def __init__(
        self, first: LearnedStepFakeQuantize, second: LearnedStepFakeQuantize, result: LearnedStepFakeQuantize
    ) -> None:
        super().__init__()
        self.quantizers = (first, second, result)  # a tuple: not submodules

    def forward(self, a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        first, second, result = self.quantizers
        step = result.scale.detach()
        ratio_a, ratio_b = (each.scale.detach() / step for each in (first, second))
        fixed = result.zero_point - _fused(first.zero_point, ratio_a, ratio_b * second.zero_point)
        levels = _fused(_levels_from_0(b, second), ratio_b, fixed)
        levels = _fused(_levels_from_0(a, first), ratio_a, levels)
        return levels.round_().sub_(result.zero_point).mul_(step)


def _levels_from_0(x: Tensor, quantizer: LearnedStepFakeQuantize) -> Tensor:
    return levels_of(x, quantizer.scale.detach()).add_(quantizer.zero_point)


def _fused(x: Tensor, factor: Tensor, addend: Tensor) -> Tensor:
    return torch.addcmul(addend.double(), x.double(), factor.double()).float()


class ExactProduct(nn.Module):
    """The product of two tensors on grids: whole numbers, brought onto the grid of the result as in ``ExactLayer``."""

    def __init__(
        self,
        first: LearnedStepFakeQuantize,
        second: LearnedStepFakeQuantize,
        result: LearnedStepFakeQuantize | None,
    ) -> None:
        super().__init__()
        self.quantizers = (first, second, result)  # a tuple: not submodules

    def forward(
        self, a: Float[Tensor, "... row inner"], b: Float[Tensor, "... inner column"]
    ) -> Float[Tensor, "... row column"]:
        """Return the product, rounded."""
        first, second, result = self.quantizers
        return _requantized(self.sums(a, b).float(), first.scale.detach() * second.scale.detach(), result)

    def sums(
        self, a: Float[Tensor, "... row inner"], b: Float[Tensor, "... inner column"]
    ) -> Float[Tensor, "... row column"]:
        """Return the sums of products of levels, whole numbers: in float64 where float32 may not hold them."""
        first, second, _ = self.quantizers
        levels = levels_of(a, first.scale.detach()), levels_of(b, second.scale.detach())
        largest = a.shape[-1] * (first.quant_max - first.quant_min) * (second.quant_max - second.quant_min)
        return torch.matmul(*(each if largest <= _WHOLE else each.double() for each in levels))


class ExactLayer(nn.Module):
    """A convolution or linear layer of numbers on grids, computed on their levels.

    Products and sums of levels are whole numbers, which float32 holds exactly up to 2 ** 24. Summed in the unit of the
    activations each would be rounded, in an order that differs from kernel to kernel, and now and then a result would
    land on another level of the next grid. Where the weight is such that a sum, or a part of one, may be larger, it
    is put together of smaller ones. For the same reason the sums get onto the grid of the result, if it is read on
    one, as ONNX Runtime brings them there: with the bias rounded to float32, and multiplied by one number, the rounded
    product of three steps.
    """

    def __init__(
        self,
        layer: Callable[..., Tensor],
        activation: LearnedStepFakeQuantize,
        weight: LearnedStepFakeQuantize,
        result: LearnedStepFakeQuantize | None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.quantizers = (activation, weight, result)  # a tuple: not submodules

    def forward(
        self,
        x: Float[Tensor, "batch ..."],
        weight: Float[Tensor, "..."],
        bias: Float[Tensor, " channel"] | None = None,
        *arguments: object,
    ) -> Float[Tensor, "batch ..."]:
        """Return what the layer comes to, rounded."""
        activation, weight_quantizer, result = self.quantizers
        sums = self.sums(x, weight, *arguments)
        step = activation.scale.detach() * self.by_channel(weight_quantizer.scale.detach(), sums)
        if bias is not None:
            sums += levels_of(bias, step.flatten()).view_as(step)
        return _requantized(sums.float(), step, result)

    def sums(self, x: Float[Tensor, "batch ..."], weight: Float[Tensor, "..."], *arguments: object) -> Tensor:
        """Return the sums of products of levels, whole numbers: in float64 where float32 may not hold them."""
        activation, weight_quantizer, _ = self.quantizers
        x, weight = levels_of(x, activation.scale.detach()), levels_of(weight, weight_quantizer.scale.detach())
        if _may_exceed_float32(weight, activation, weight_quantizer):
            return self._large_sums(x, weight, arguments)
        return self.layer(x, weight, None, *arguments)

    def by_channel(self, value: Tensor, sums: Tensor) -> Tensor:
        """Return one number for each channel of the weight, or bias, lined up with ``sums``."""
        axis = (-1 if self.layer is aten.linear.default else 1) % sums.ndim
        shape = [-1 if each == axis else 1 for each in range(sums.ndim)]
        return value.reshape(-1).repeat(sums.shape[axis] // value.numel()).view(shape)

    def _large_sums(
        self, x: Float[Tensor, "batch ..."], weight: Float[Tensor, "..."], arguments: tuple[object, ...]
    ) -> Float[Tensor, "batch ..."]:
        """Return sums in float64: of two digits of the weight, -8 to 8 each, if float32 holds what each comes to."""
        activation, weight_quantizer, _ = self.quantizers
        steps = activation.quant_max - activation.quant_min
        if _num_summed(weight_quantizer, weight) * steps * 8 > _WHOLE:
            return self.layer(x.double(), weight.double(), None, *arguments)
        sixteens = (weight / 16).round()
        ones = weight - 16 * sixteens
        first, second = (self.layer(x, digit, None, *arguments) for digit in (sixteens, ones))
        return first.double().mul_(16).add_(second)


def _requantized(sums: Tensor, step: Tensor, result: LearnedStepFakeQuantize | None) -> Tensor:
    """Return ``sums``, which count ``step``, in the unit of the activations, on the grid of ``result`` if there is one.

    They are changed in place.
    """
    if result is None:
        return sums.mul_(step)
    result_step = result.scale.detach()
    return sums.mul_(step / result_step).round_().mul_(result_step)


def _num_summed(weight_quantizer: LearnedStepFakeQuantize, weight: Tensor) -> int:
    """Return how many products make up a sum; for a transposed convolution the most that can."""
    return weight.numel() // weight_quantizer.scale.numel()


def _may_exceed_float32(
    weight: Float[Tensor, "..."], activation: LearnedStepFakeQuantize, quantizer: LearnedStepFakeQuantize
) -> bool:
    """Whether some inputs on the activation's grid have sums, or parts of sums, that float32 may have to round."""
    steps = activation.quant_max - activation.quant_min
    if _num_summed(quantizer, weight) * steps * -quantizer.quant_min <= _WHOLE:
        return False  # whatever the numbers: most layers, and all below 6 bits or so
    largest = max(abs(float(activation.low)), abs(float(activation.high)))
    return largest * float(weight.abs().transpose(0, quantizer.ch_axis).flatten(1).sum(1).amax()) > _WHOLE


def levels_of(x: Tensor, step: Tensor) -> Tensor:
    """Return which multiple of ``step`` each value is."""
    return (x * (1 / step)).round_()
