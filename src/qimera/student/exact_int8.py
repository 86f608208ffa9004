"""A student's graph -> the same graph, in which operations on grids compute as LiteRT's kernels for int8 do."""

import math
import operator
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from qimera.graph.nodes import MATRIX_PRODUCTS, WEIGHTED, aten, logits_node, node_at, pair
from qimera.graph.rewriting import arguments
from qimera.quantization.scheme import before_moves, is_move
from qimera.student.exact import (
    ExactLayer,
    exact_layer,
    exact_product,
    levels_of,
    with_exact_sums,
)
from qimera.student.grids import (
    CLIPS,
    LARGEST_WINDOW,
    MAXIMA,
    MOVING,
    Place,
    fits_nibbles,
    moving_step,
    place_behind,
    place_of,
    widening,
)
from qimera.student.int8_kernels import Arithmetic, FixedPoint, Xnnpack

_AVERAGES = {aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.mean.dim}


_ARITHMETIC: dict[str, Arithmetic] = {
    "litert": Xnnpack(),
    "litert-builtin": FixedPoint(is_built_in=True),
    "tflm": FixedPoint(),
}


def with_exact_rounding(module: GraphModule, target: str) -> GraphModule:
    """Return a graph that computes on levels and rounds as the kernels of ``target`` do; its parameters are shared."""
    arithmetic = _ARITHMETIC.get(target)
    return with_exact_sums(module) if arithmetic is None else with_int8_kernels(module, arithmetic)


def with_int8_kernels(module: GraphModule, arithmetic: Arithmetic) -> GraphModule:
    """Return a graph that rounds as LiteRT's kernels do; parameters and the rest of the graph are shared.

    Args:
        module: The student's graph.
        arithmetic: That of the kernels. Microcontrollers read weights of 4 bits as they are, others widened.
    """
    packs = arithmetic == FixedPoint()
    graph = fx.Graph()
    mapping: dict[Node, Node] = {}
    graph.graph_copy(module.graph, mapping)
    graph.output(mapping[logits_node(module)])
    result = GraphModule(module, graph)
    kernels = {node: _kernel(module, node, arithmetic, packs=packs) for node in module.graph.nodes}
    for node, copied in mapping.items():
        kernel, rounding = kernels.get(node), _rounding(module, node, arithmetic, kernels)
        for new, name in ((kernel, f"kernel_{copied.name}"), (rounding, f"rounding_{copied.name}")):
            if new is not None:
                result.add_submodule(name, new)
        with graph.inserting_before(copied):
            if kernel is not None:
                copied.replace_all_uses_with(graph.call_module(f"kernel_{copied.name}", copied.args))
            if rounding is not None:
                copied.update_arg(0, graph.call_module(f"rounding_{copied.name}", copied.args))
    graph.eliminate_dead_code()
    result.recompile()
    return result


def _kernel(module: GraphModule, node: Node, arithmetic: Arithmetic, *, packs: bool) -> nn.Module | None:
    """Return what computes ``node`` as a kernel does; None where the graph's own operation does."""
    leaving = place_behind(module, node) if node.op == "call_function" else None
    if node.target in WEIGHTED:
        layer, entering = exact_layer(module, node), place_of(module, node.args[0])
        if layer is None or leaving is None or entering is None:
            return layer
        return _Layer(layer, arithmetic, entering, leaving, packs=packs)
    if node.target in MATRIX_PRODUCTS:
        return exact_product(module, node, rounds=False)
    if leaving is None or node.kwargs:
        return None
    if node.target is aten.cat.default:
        parts = [place_of(module, each) for each in node.args[0]]  # type: ignore[union-attr]
        return None if None in parts else _Concatenation(arithmetic, [each for each in parts if each], leaving)
    first, second = (place_of(module, each) for each in (*node.args, None)[:2])
    if node.target in _JOINED:
        return None if first is None or second is None else _Join(node.target, arithmetic, (first, second, leaving))
    is_average = node.target in _AVERAGES and first is not None and _is_over_windows(node)
    return _Average(node.target, arithmetic, first, leaving) if is_average and first is not None else None


def _is_over_windows(average: Node) -> bool:
    """Whether the average is over positions, and whole windows, padding included."""
    if average.target is aten.mean.dim:
        return list(average.args[1]) in ([2, 3], [-2, -1], [-1, -2], [3, 2])  # type: ignore[arg-type]
    if average.target is aten.adaptive_avg_pool2d.default:
        return True
    _, _, _, padding, ceil, counts_zeros, divisor = arguments(average)
    return not ceil and not divisor and (bool(counts_zeros) or not any(padding))


def _rounding(
    module: GraphModule, node: Node, arithmetic: Arithmetic, kernels: dict[Node, nn.Module | None]
) -> nn.Module | None:
    """Return what rounds the numbers that a quantizer reads as a kernel does; None where they are rounded already."""
    place = place_of(module, node) if node.op == "call_module" else None
    if place is None:
        return None
    source = _before_maxima(node_at(node, 0))
    before = place_of(module, source)
    if before is not None:
        return _Move(arithmetic, before, place)
    while source.target in CLIPS:
        source = before_moves(node_at(source, 0))
    is_rounded = source.op == "get_attr" or isinstance(kernels.get(source), _Layer | _Kernel)
    return None if is_rounded else _Quantization(arithmetic, place)


def _before_maxima(tensor: Node) -> Node:
    """Return the tensor whose values ``tensor`` holds, moved about or chosen."""
    while is_move(tensor) or tensor.target in (*MAXIMA, operator.getitem):
        tensor = node_at(tensor, 0)
    return tensor


# --- kernels ----------------------------------------------------------------------------------------------------------


class _Layer(nn.Module):
    """A convolution or linear layer, its weight widened to int8 where it has fewer bits and the file says so."""

    def __init__(
        self, exact: ExactLayer, arithmetic: Arithmetic, entering: Place, leaving: Place, *, packs: bool
    ) -> None:
        super().__init__()
        self.exact, self.arithmetic, self.entering, self.leaving = exact, arithmetic, entering, leaving
        self.packs = packs
        self.is_plain = exact.layer is aten.conv_transpose2d.input

    def forward(
        self,
        x: Float[Tensor, "batch ..."],
        weight: Float[Tensor, "..."],
        bias: Float[Tensor, " channel"] | None = None,
        *arguments: object,
    ) -> Float[Tensor, "batch ..."]:
        """Return what the layer comes to, not clipped yet."""
        activation, weight_quantizer, _ = self.exact.quantizers
        entering, leaving = self.entering.grid(), self.leaving.grid()
        leaving = leaving.plain if self.is_plain else leaving
        steps = weight_quantizer.scale.detach()
        sums = self.exact.sums(x, weight, *arguments).double()
        lowest, highest = (int(each) for each in levels_of(weight, steps).aminmax())
        largest_bias = 0
        if bias is not None:
            added = levels_of(bias, (activation.scale.detach() * self.exact.by_channel(steps, sums)).flatten())
            sums += self.exact.by_channel(added, sums)
            largest_bias = int(added.abs().max())
        factor = 1
        if not (self.packs and fits_nibbles(lowest, highest)):
            factor = widening(max(-lowest, highest), largest_bias)
        in_file = (steps.double() / factor * leaving.unit / entering.unit).float()
        levels = self.arithmetic.layer(
            sums * factor, entering.scale, self.exact.by_channel(in_file, sums), leaving.scale
        )
        return self.leaving.values(levels)


class _Kernel(nn.Module):
    """What other kernels share: an arithmetic, and the grid on which they write."""

    def __init__(self, arithmetic: Arithmetic, leaving: Place) -> None:
        super().__init__()
        self.arithmetic, self.leaving = arithmetic, leaving

    def moved(self, x: Tensor, before: Place) -> Tensor:
        """Return values of one grid on that of the result."""
        grids = before.grid(), self.leaving.grid()
        steps = (grids[0].scale, moving_step(*grids), grids[1].scale)
        return self.leaving.values(self.arithmetic.product(before.levels(x), _number(MOVING, x), steps))


def _number(value: int, x: Tensor) -> Tensor:
    return torch.tensor(float(value), device=x.device)


class _Move(_Kernel):
    """The same tensor on another grid."""

    def __init__(self, arithmetic: Arithmetic, entering: Place, leaving: Place) -> None:
        super().__init__(arithmetic, leaving)
        self.entering = entering

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return it, not clipped yet."""
        return self.moved(x, self.entering)


class _Concatenation(_Kernel):
    """Tensors on grids of their own, put together on one."""

    def __init__(self, arithmetic: Arithmetic, entering: Sequence[Place], leaving: Place) -> None:
        super().__init__(arithmetic, leaving)
        self.entering = tuple(entering)

    def forward(self, parts: Sequence[Tensor], axis: int = 0) -> Tensor:
        """Return them, not clipped yet."""
        return torch.cat([self.moved(*each) for each in zip(parts, self.entering, strict=True)], axis)


class _Quantization(_Kernel):
    """Numbers in floating point on a grid."""

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return them rounded, not clipped yet."""
        return self.leaving.values(self.arithmetic.quantize(x, self.leaving.grid().plain.scale))


class _Join(_Kernel):
    """The sum, difference or product of two tensors, element by element."""

    def __init__(self, operation: object, arithmetic: Arithmetic, places: tuple[Place, Place, Place]) -> None:
        super().__init__(arithmetic, places[2])
        self.operation, self.places = operation, places

    def forward(self, a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return what it comes to, not clipped yet."""
        first, second, result = (each.grid().plain.scale for each in self.places)
        levels_a, levels_b = self.places[0].levels(a), self.places[1].levels(b)
        if self.operation is aten.mul.Tensor:
            return self.leaving.values(self.arithmetic.product(levels_a, levels_b, (first, second, result)))
        signed = -levels_b if self.operation is aten.sub.Tensor else levels_b
        return self.leaving.values(self.arithmetic.sum(levels_a, signed, (first, second, result)))


class _Average(_Kernel):
    """An average over windows: a depthwise convolution with ones, or a mean where windows are large."""

    def __init__(self, operation: object, arithmetic: Arithmetic, entering: Place, leaving: Place) -> None:
        super().__init__(arithmetic, leaving)
        self.operation, self.entering = operation, entering

    def forward(self, x: Float[Tensor, "batch channel height width"], *arguments: object) -> Tensor:
        """Return it, not clipped yet."""
        leaving = self.leaving.grid()
        if self.operation is aten.adaptive_avg_pool2d.default and _overlap(x.shape[2:], pair(arguments[0])):
            means = F.adaptive_avg_pool2d(x, pair(arguments[0]))
            return self.leaving.values(self.arithmetic.quantize(means, leaving.plain.scale))
        window, stride, padding = self._windows(x, arguments)
        sums = F.avg_pool2d(self.entering.levels(x), window, stride, padding, divisor_override=1)
        size = math.prod(window)
        entering = self.entering.grid()
        if size > LARGEST_WINDOW and (window != list(x.shape[2:]) or any(padding)):
            levels = self.arithmetic.quantize(F.avg_pool2d(x, window, stride, padding), leaving.plain.scale)
        elif size > LARGEST_WINDOW:
            before, after = entering.plain, leaving.plain
            zero_points = (before.zero_point, after.zero_point)
            levels = self.arithmetic.mean(sums, size, before.scale, zero_points, after.scale)
        else:
            factor = widening(1)
            step = torch.tensor(1 / size / factor * leaving.unit / entering.unit, device=x.device)
            levels = self.arithmetic.layer(sums * factor, entering.scale, step, leaving.scale)
        keeps = self.operation is not aten.mean.dim or (len(arguments) > 1 and arguments[1])
        return self.leaving.values(levels if keeps else levels.flatten(1))

    def _windows(self, x: Tensor, arguments: tuple[object, ...]) -> tuple[list[int], list[int], list[int]]:
        """Return size, stride and padding of the windows."""
        sizes = list(x.shape[2:])
        if self.operation is aten.mean.dim:
            return sizes, sizes, [0, 0]
        if self.operation is aten.adaptive_avg_pool2d.default:
            window = [size // wanted for size, wanted in zip(sizes, pair(arguments[0]), strict=True)]
            return window, window, [0, 0]
        window = list(pair(arguments[0]))
        stride = list(pair(arguments[1])) if len(arguments) > 1 and arguments[1] else window
        return window, stride, list(pair(arguments[2])) if len(arguments) > 2 else [0, 0]


def _overlap(before: Sequence[int], behind: Sequence[int]) -> bool:
    """Whether windows of an adaptive average overlap; their average is no integer kernel's."""
    return any(size % wanted for size, wanted in zip(before, behind, strict=True))


_JOINED = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor}
