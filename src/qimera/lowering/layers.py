"""Convolutions, linear layers, products and averages -> operations of LiteRT on integers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qimera.errors import UnsupportedModelError
from qimera.graph.nodes import pair
from qimera.lowering.flatbuffer import Steps
from qimera.lowering.values import CHANNELS_LAST, Constant, Deferred, Order, Tensor, Value
from qimera.lowering.writer import VALID, Writer, activation
from qimera.student.grids import LARGEST_WINDOW, Grid, Levels, fits_nibbles, grid_of, widening

_INT32, _FLOAT32 = 2, 0


@dataclass(frozen=True)
class Parameter:
    """The integers of a weight or bias, and the steps of its channels."""

    levels: np.ndarray
    steps: np.ndarray
    axis: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in PyTorch."""
        return self.levels.shape

    @property
    def array(self) -> np.ndarray:
        """The numbers that the integers stand for."""
        numbers = self.levels.astype(np.float32)
        numbers *= self.steps.reshape([-1 if axis == self.axis else 1 for axis in range(self.levels.ndim)])
        return numbers


@dataclass(frozen=True)
class _Scaled:
    """A layer's weight and bias as a file holds them for an input and a result on these grids."""

    weight: np.ndarray
    bias: np.ndarray
    steps: np.ndarray
    bias_steps: np.ndarray


def _scaled(w: Writer, weight: Parameter, bias: Parameter | None, entering: Grid, leaving: Grid) -> _Scaled:
    """Return the parameters widened, and in the unit that the file gives each tensor."""
    factor = 1
    lowest, highest = int(weight.levels.min(initial=0)), int(weight.levels.max(initial=0))
    if not (w.packs and fits_nibbles(lowest, highest)):
        factor = widening(max(-lowest, highest), 0 if bias is None else int(np.abs(bias.levels).max(initial=0)))
    steps = weight.steps.astype(np.float64) / factor * leaving.unit / entering.unit
    zeros = np.zeros(len(steps), np.int32)
    added = zeros if bias is None else (bias.levels.astype(np.int64) * factor).astype(np.int32)
    bias_steps = np.float32(entering.scale) * steps.astype(np.float32)
    return _Scaled((weight.levels * factor).astype(np.int8), added, steps, np.resize(bias_steps, len(added)))


def convolution(
    w: Writer,
    x: Tensor,
    weight: Parameter | Constant,
    bias: Parameter | Constant | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Deferred:
    """Lower ``aten.conv2d``."""
    layer, shape = w.layer, w.shape
    channels, kernel = x.shape[1], weight.shape[2:]
    is_depthwise = groups == channels and groups > 1
    kind, order = ("DEPTHWISE_CONV_2D", (1, 2, 3, 0)) if is_depthwise else ("CONV_2D", (0, 2, 3, 1))

    def write(levels: Levels | None) -> Value:
        w.name = layer
        entering, mode = w.padded(w.entering(x, levels), kernel, stride, padding, dilation, shape)
        result = w.output(shape, CHANNELS_LAST, None if levels is None else grid_of(levels, w.name))
        options = {"padding": mode, "strideH": stride[0], "strideW": stride[-1]}
        options |= {"dilationHFactor": dilation[0], "dilationWFactor": dilation[-1], **_fused(result)}
        if is_depthwise:
            options["depthMultiplier"] = shape[1] // channels
        parameters = _parameters(w, layer, weight, bias, (entering, result), order, packs=True)
        w.file.operation(kind, [entering.tensor, *parameters], [result.tensor], 5 if groups > 1 else 3, **options)
        return w.noted(layer, result)

    return Deferred(shape, write)


def _fused(result: Value) -> dict[str, int]:
    return {"fusedActivationFunction": activation("NONE" if result.grid is None else result.grid.activation)}


def _parameters(
    w: Writer,
    layer: str,
    weight: Parameter | Constant,
    bias: Parameter | Constant | None,
    between: tuple[Value, Value],
    order: Order,
    *,
    packs: bool = False,
) -> list[int]:
    """Return the constants of a layer, its weight in ``order``: integers, or numbers where it computes with those.

    ``between`` are what it reads and what it writes, whose last axis in memory is that of the channels. With ``packs``
    microcontrollers have a kernel that reads int4.
    """
    entering, result = between
    if entering.grid is None or result.grid is None or isinstance(weight, Constant) or isinstance(bias, Constant):
        w.float_layers.append(layer)
        added = np.zeros(result.stored[-1], np.float32) if bias is None else bias.array
        return [_float_weight(w, layer, weight, order), w.file.constant(f"{layer}.bias", added)]
    scaled, axis = _scaled(w, weight, bias, entering.grid, result.grid), order.index(weight.axis)
    is_int4 = packs and w.is_micro and fits_nibbles(int(scaled.weight.min()), int(scaled.weight.max()))
    return [
        w.file.constant(f"{layer}.weight", scaled.weight.transpose(order), Steps(scaled.steps, axis), is_int4=is_int4),
        w.file.constant(f"{layer}.bias", scaled.bias, Steps(scaled.bias_steps)),
    ]


def _float_weight(w: Writer, layer: str, weight: Parameter | Constant, order: Order) -> int:
    """Return a weight as numbers, of which the file stores the integers where there are any."""
    if isinstance(weight, Constant) or w.is_micro:  # where only tensors with one step can be dequantized
        return w.file.constant(f"{layer}.weight", weight.array.transpose(order))
    stored = weight.levels.transpose(order)
    integers = w.file.constant(f"{layer}.weight", stored, Steps(weight.steps, order.index(weight.axis)))
    numbers = w.file.tensor(f"{layer}.weight", stored.shape, np.float32)
    w.file.operation("DEQUANTIZE", [integers], [numbers], 5)
    return numbers


def transposed_convolution(
    w: Writer,
    x: Tensor,
    weight: Parameter | Constant,
    bias: Parameter | Constant | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    output_padding: Sequence[int] = (0, 0),
    groups: int = 1,
    dilation: Sequence[int] = (1, 1),
) -> Deferred:
    """Lower ``aten.conv_transpose2d``: the full result, of which ``padding`` is cut off at the sides."""
    layer, shape = w.layer, w.shape
    kernel = weight.shape[2:]
    full = [(x.shape[2 + axis] - 1) * stride[axis] + kernel[axis] for axis in range(2)]
    if groups > 1 or set(dilation) != {1} or any(size < step for size, step in zip(kernel, stride, strict=True)):
        raise UnsupportedModelError(
            f"{layer}: LiteRT has no transposed convolution with groups, dilation or gaps; export to ONNX instead"
        )
    if any(padding[axis] + shape[2 + axis] > full[axis] for axis in range(2)):
        raise UnsupportedModelError(
            f"{layer}: LiteRT's transposed convolution cannot pad its result; export to ONNX instead"
        )

    def write(levels: Levels | None) -> Value:
        w.name = layer
        grid = None if levels is None else grid_of(levels, w.name)
        _, source = w.read(w.entering(x, levels), CHANNELS_LAST)
        result = w.output((1, shape[1], *full), CHANNELS_LAST, None if grid is None else grid.plain)
        parameters = _parameters(w, layer, weight, bias, (source, result), (1, 2, 3, 0))
        inputs = [w.integers(result.stored), parameters[0], source.tensor, parameters[1]]
        options = {"padding": VALID, "strideH": stride[0], "strideW": stride[-1]}
        w.file.operation("TRANSPOSE_CONV", inputs, [result.tensor], 3, **options)
        cut = w.sliced(result, [0, 0, *padding], shape)
        return w.noted(layer, cut if grid is None else w.finished(cut, grid))

    return Deferred(shape, write)


def linear(w: Writer, x: Tensor, weight: Parameter | Constant, bias: Parameter | Constant | None = None) -> Deferred:
    """Lower ``aten.linear``: of rows, or of tokens."""
    layer, shape = w.layer, w.shape
    if not isinstance(weight, Parameter | Constant):
        raise UnsupportedModelError(
            f"{layer}: its weight depends on the image, which LiteRT's linear layers cannot read; "
            "export to ONNX instead"
        )

    def write(levels: Levels | None) -> Value:
        w.name = layer
        sums_integers = levels is None and isinstance(weight, Parameter) and not w.is_micro
        in_integers = levels is not None or sums_integers
        source = w.on_grid(x) if in_integers else w.floats(x)
        ordered = _in_order_of_memory(weight, source)
        last = len(shape) - 1
        order = (*(axis for axis in source.order if axis != last), last)
        source = replace(source, parts=())
        if sums_integers and isinstance(ordered, Parameter):
            return _sums(w, layer, source, ordered, bias, shape, order)
        number, entering = w.read(source, order)
        result = w.output(shape, order, None if levels is None else grid_of(levels, w.name))
        parameters = _parameters(w, layer, ordered, bias, (entering, result), (0, 1))
        options = {**_fused(result), "keepNumDims": len(shape) > 2}
        w.file.operation("FULLY_CONNECTED", [number, *parameters], [result.tensor], 5, **options)
        return w.noted(layer, result)

    return Deferred(shape, write)


def _in_order_of_memory(weight: Parameter | Constant, source: Value) -> Parameter | Constant:
    """Return a weight with its columns in the order in which flattened channels and positions lie in memory."""
    if not source.parts:
        return weight
    numbers = weight.levels if isinstance(weight, Parameter) else weight.array
    moved = numbers.reshape(-1, *source.parts).transpose(0, 2, 3, 1).reshape(numbers.shape)
    return replace(weight, levels=moved) if isinstance(weight, Parameter) else Constant(moved)


def _sums(
    w: Writer,
    layer: str,
    x: Value,
    weight: Parameter,
    bias: Parameter | Constant | None,
    shape: tuple[int, ...],
    order: Order,
) -> Value:
    """Write a layer whose result is on no grid: exact sums of integers, which are scaled in floating point.

    Of LiteRT's kernels BATCH_MATMUL alone returns int32. It takes zero points for 0, which the bias makes up for.
    """
    number, entering = w.read(w.plain(x), order)
    assert entering.grid is not None
    added = -entering.grid.zero_point * weight.levels.astype(np.int64).sum(1)
    if isinstance(bias, Parameter):
        added += bias.levels
    factors = np.float32(entering.grid.scale) * weight.steps.astype(np.float32)
    stored = w.file.constant(f"{layer}.weight", weight.levels, Steps(np.ones(1)))
    result = w.output(shape, order)
    sums = w.file.tensor(layer, result.stored, np.int32)
    w.file.operation("BATCH_MATMUL", [number, stored], [sums], 4, adjY=True)
    numbers, shifted = (w.file.tensor(layer, result.stored, np.float32) for _ in range(2))
    w.file.operation("CAST", [sums], [numbers], inDataType=_INT32, outDataType=_FLOAT32)
    w.file.operation("ADD", [numbers, w.file.constant(f"{layer}.bias", added.astype(np.float32))], [shifted])
    w.file.operation("MUL", [shifted, w.file.constant(f"{layer}.scale", factors)], [result.tensor])
    return result


def product(w: Writer, first: Tensor, second: Tensor) -> Deferred:
    """Lower ``aten.matmul``, in floating point.

    XNNPACK has no integer kernel for it, and the built-in one is far slower than XNNPACK's for float32.
    """
    layer, shape = w.layer, w.shape
    if min(len(first.shape), len(second.shape)) < 2:
        raise UnsupportedModelError(f"{layer}: LiteRT has no product of a matrix and a vector; export to ONNX instead")

    def write(levels: Levels | None) -> Value:
        w.name = layer
        w.float_layers.append(layer)
        a, b = w.floats(first), w.whole(w.floats(second))
        rank = len(b.shape)
        turned = b.order[-2:] == (rank - 1, rank - 2)
        last = (rank - 1, rank - 2) if turned else (rank - 2, rank - 1)
        left, right = w.read(a, tuple(range(len(a.shape))))[0], w.read(b, (*range(rank - 2), *last))[0]
        result = w.output(shape, tuple(range(len(shape))))
        w.file.operation("BATCH_MATMUL", [left, right], [result.tensor], 1, adjY=turned)
        return result if levels is None else w.quantized(result, levels)

    return Deferred(shape, write)


def average(w: Writer, x: Tensor, window: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Deferred:
    """Lower an average over windows, the zeros of ``padding`` included.

    It is a depthwise convolution with ones, which sums exactly and rounds once. Over very many positions it is MEAN,
    which would round its sum first.
    """
    name, shape = w.name, w.shape
    size = math.prod(window)
    maps = (1, x.shape[1], *(shape[2:] or (1, 1)))

    def write(levels: Levels | None) -> Value:
        w.name = name
        if levels is None or size > LARGEST_WINDOW:
            return _mean(w, x, window, stride, padding, levels, maps)
        entering, mode = w.padded(w.on_grid(x), window, stride, padding, (1, 1), maps)
        result = w.output(maps, CHANNELS_LAST, grid_of(levels, w.name))
        factor = widening(1)
        ones = Parameter(np.full((x.shape[1], 1, *window), factor, np.int8), np.full(x.shape[1], 1 / size / factor))
        options = {"padding": mode, "strideH": stride[0], "strideW": stride[-1], "depthMultiplier": 1}
        options |= {"dilationHFactor": 1, "dilationWFactor": 1, **_fused(result)}
        parameters = _parameters(w, name, ones, None, (entering, result), (1, 2, 3, 0))
        w.file.operation("DEPTHWISE_CONV_2D", [entering.tensor, *parameters], [result.tensor], 3, **options)
        return result

    return Deferred(maps, write)


def _mean(
    w: Writer,
    x: Tensor,
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    levels: Levels | None,
    maps: tuple[int, ...],
) -> Value:
    grid = None if levels is None else grid_of(levels, w.name)
    source = w.plain(w.entering(x, levels))
    if tuple(window) == tuple(x.shape[2:]) and not any(padding):
        number, _ = w.read(source, CHANNELS_LAST)
        result = w.output(maps, CHANNELS_LAST, None if grid is None else grid.plain)
        w.file.operation("MEAN", [number, w.integers([1, 2])], [result.tensor], 2, keepDims=True)
        return result if grid is None else w.finished(result, grid)
    sides = [(0, 0), (0, 0), *((each, each) for each in padding)]
    number, _ = w.read(w.surrounded(w.floats(source), sides) if any(padding) else w.floats(source), CHANNELS_LAST)
    result = w.output(maps, CHANNELS_LAST)
    options = {"padding": VALID, "strideH": stride[0], "strideW": stride[-1]}
    options |= {"filterHeight": window[0], "filterWidth": window[-1]}
    w.file.operation("AVERAGE_POOL_2D", [number], [result.tensor], 1, **options)
    return result if levels is None else w.quantized(result, levels)


def largest(
    w: Writer,
    x: Tensor,
    window: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    _ceil: bool = False,
) -> Value:
    """Lower ``aten.max_pool2d``, which moves integers or numbers about."""
    if set(np.atleast_1d(dilation).tolist()) != {1}:
        raise UnsupportedModelError(f"{w.name}: LiteRT has no maximum pooling with dilation; export to ONNX instead")
    window, stride, padding = pair(window), pair(stride or window), pair(padding)
    value = w.value(x)
    entering, mode = w.padded(value, window, stride, padding, (1, 1), w.shape, lowest=True)
    result = w.output(w.shape, CHANNELS_LAST, value.grid)
    options = {"padding": mode, "strideH": stride[0], "strideW": stride[1]}
    options |= {"filterHeight": window[0], "filterWidth": window[1]}
    w.file.operation("MAX_POOL_2D", [entering.tensor], [result.tensor], 2 if value.grid else 1, **options)
    return result
