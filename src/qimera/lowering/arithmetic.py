"""Additions and functions of numbers -> operations of LiteRT: integers where it has a kernel, else floating point."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qimera.errors import UnsupportedModelError
from qimera.lowering.moves import reshape
from qimera.lowering.values import Constant, Deferred, Order, Tensor, Value
from qimera.lowering.writer import Writer, activation
from qimera.student.grids import Grid, Levels, grid_of

_INTEGER_KINDS = ("ADD", "SUB", "MUL")
_LEAST_THRESHOLD = 16
"""Above which softplus(x) is x in float32."""

_FUSING = (*_INTEGER_KINDS, "DIV")


def binary(
    kind: str, w: Writer, first: Tensor | float | int, second: Tensor | float | int, alpha: float | int = 1
) -> Deferred:
    """Lower an operation of two tensors, or of a tensor and a number."""
    if alpha != 1:
        raise UnsupportedModelError(
            f"{w.name}: a factor {alpha} inside of an addition has no counterpart; export to ONNX instead"
        )
    name, shape = w.name, w.shape
    operands = [each if isinstance(each, Tensor) else Constant(np.array(each, np.float32)) for each in (first, second)]

    def write(levels: Levels | None) -> Value:
        w.name = name
        in_integers = levels is not None and kind in _INTEGER_KINDS and all(has_grid(each) for each in operands)
        if levels is None or not in_integers:
            result = _written(w, kind, [w.floats(each) for each in operands], shape)
            return result if levels is None else w.quantized(result, levels)
        grid = grid_of(levels, w.name)
        direct = grid if grid.activation == "RELU" else grid.plain
        result = _written(w, kind, [w.plain(w.value(each)) for each in operands], shape, direct)
        return w.finished(result, grid)

    return Deferred(shape, write)


def has_grid(tensor: Tensor) -> bool:
    """Whether the tensor consists of integers."""
    if isinstance(tensor, Constant):
        return tensor.levels is not None
    return isinstance(tensor, Value) and tensor.grid is not None


def _written(w: Writer, kind: str, values: Sequence[Value], shape: tuple[int, ...], grid: Grid | None = None) -> Value:
    """Write an operation of two tensors, which are brought into one order of memory."""
    rank = len(shape)
    spread = [w.whole(each).reshaped((1,) * (rank - len(each.shape)) + each.shape) for each in values]
    found = [each for each in spread if each is not None]
    order = max(found, key=lambda each: math.prod(each.shape)).order
    numbers = [w.read(each, order)[0] for each in found]
    result = w.output(shape, order, grid)
    options: dict[str, Any] = {}
    if kind in _FUSING:
        options["fusedActivationFunction"] = activation(grid.activation if grid else "NONE")
    w.file.operation(kind, numbers, [result.tensor], 2 if grid else 1, **options)
    return result


def unary(kind: str, w: Writer, x: Tensor, **options: Any) -> Value:
    """Lower a function of each number, in floating point."""
    value = w.floats(x)
    result = replace(value, tensor=w.file.tensor(w.name, value.written, np.float32))
    w.file.operation(kind, [value.tensor], [result.tensor], **options)
    return result


def gelu(w: Writer, x: Tensor, approximate: str = "none") -> Value:
    """Lower ``aten.gelu``."""
    return unary("GELU", w, x, approximate=approximate == "tanh")


def leaky_relu(w: Writer, x: Tensor, slope: float | int = 0.01) -> Value:
    """Lower ``aten.leaky_relu``."""
    return unary("LEAKY_RELU", w, x, alpha=slope)


def prelu(w: Writer, x: Tensor, slope: Constant) -> Value:
    """Lower ``aten.prelu``, whose slopes are of channels."""
    number, value = w.read(w.floats(x), _with_last(w.whole(w.floats(x)), 1))
    slopes = np.broadcast_to(slope.array.ravel(), value.stored[-1]).reshape(*[1] * (len(value.shape) - 2), -1)
    result = w.output(value.shape, value.order)
    w.file.operation("PRELU", [number, w.file.constant(f"{w.name}_slope", slopes)], [result.tensor])
    return result


def _of_channels(numbers: np.ndarray, value: Value) -> np.ndarray:
    return numbers.reshape(-1, *[1] * (len(value.shape) - 2))


def _with_number(kind: str, w: Writer, value: Value, number: float | int | np.ndarray) -> Value:
    return _written(w, kind, [value, w.value(Constant(np.asarray(number, np.float32)))], value.shape)


def hard_sigmoid(w: Writer, x: Tensor) -> Value:
    """Lower ``aten.hardsigmoid``: relu6(x + 3) / 6."""
    shifted = unary("RELU6", w, _with_number("ADD", w, w.floats(x), 3.0))
    return _with_number("MUL", w, shifted, 1 / 6)


def silu(w: Writer, x: Tensor) -> Value:
    """Lower ``aten.silu``: x sigmoid(x)."""
    value = w.floats(x)
    return _written(w, "MUL", [value, unary("LOGISTIC", w, value)], value.shape)


def softplus(w: Writer, x: Tensor, beta: float | int = 1, threshold: float | int = 20) -> Value:
    """Lower ``aten.softplus``, log(1 + exp(x)), as relu(x) - log(sigmoid(|x|)), which never overflows."""
    if threshold < _LEAST_THRESHOLD:
        raise UnsupportedModelError(f"{w.name}: a softplus with threshold {threshold} jumps; export to ONNX instead")
    value = w.floats(x) if beta == 1 else _with_number("MUL", w, w.floats(x), beta)
    less = unary("LOG", w, unary("LOGISTIC", w, unary("ABS", w, value)))
    result = _written(w, "SUB", [unary("RELU", w, value), less], value.shape)
    return result if beta == 1 else _with_number("MUL", w, result, 1 / beta)


def mish(w: Writer, x: Tensor) -> Value:
    """Lower ``aten.mish``: x tanh(softplus(x))."""
    value = w.floats(x)
    return _written(w, "MUL", [value, unary("TANH", w, softplus(w, value))], value.shape)


def softmax(w: Writer, x: Tensor, axis: int, *_: object) -> Value:
    """Lower ``aten.softmax``, over the axis that is last in memory."""
    number, value = w.read(w.floats(x), _with_last(w.whole(w.floats(x)), axis))
    result = w.output(value.shape, value.order)
    w.file.operation("SOFTMAX", [number], [result.tensor], beta=1.0)
    return result


def _with_last(value: Value, axis: int) -> Order:
    """Return the order of memory of ``value`` with one axis innermost."""
    axis %= len(value.shape)
    return (*(each for each in value.order if each != axis), axis)


def reduced(kind: str, w: Writer, x: Tensor, axes: Sequence[int], keep: bool = False) -> Value:
    """Write a mean or another operation that takes axes together."""
    value = w.whole(w.value(x) if kind == "REDUCE_MAX" else w.floats(x))
    number, value = w.read(value)
    rank = len(value.shape)
    gone = {axis % rank for axis in axes}
    result = w.output([1 if axis in gone else size for axis, size in enumerate(value.shape)], value.order, value.grid)
    places = w.integers([value.order.index(axis) for axis in sorted(gone)])
    w.file.operation(kind, [number, places], [result.tensor], 2, keepDims=True)
    if keep:
        return result
    shape = tuple(size for axis, size in enumerate(value.shape) if axis not in gone)
    order = [axis - sum(each < axis for each in gone) for axis in value.order if axis not in gone]
    return replace(result, shape=shape, order=tuple(order))


def vector_norm(
    w: Writer, x: Tensor, order: float | int = 2, axes: Sequence[int] | None = None, keep: bool = False, **_: object
) -> Value:
    """Lower ``aten.linalg_vector_norm`` of lengths: the root of a sum of squares."""
    if order != 2:
        raise UnsupportedModelError(
            f"{w.name}: a norm of order {order} has no counterpart here; export to ONNX instead"
        )
    squares = unary("SQUARE", w, x)
    return unary("SQRT", w, reduced("SUM", w, squares, range(len(x.shape)) if axes is None else axes, keep))


def layer_norm(
    w: Writer,
    x: Tensor,
    sizes: Sequence[int],
    scale: Constant | None,
    shift: Constant | None,
    eps: float | int,
    *_: object,
) -> Value:
    """Lower ``aten.layer_norm``, written out."""
    value = w.floats(x)
    result = _normalized(w, value, [axis - len(sizes) for axis in range(len(sizes))], eps)
    return _scaled(w, result, None if scale is None else scale.array, None if shift is None else shift.array)


def group_norm(
    w: Writer, x: Tensor, groups: int, scale: Constant | None, shift: Constant | None, eps: float | int, *_: object
) -> Value:
    """Lower ``aten.group_norm``, written out."""
    shape = w.shape
    w.shape = (1, groups, x.shape[1] // groups, math.prod(x.shape[2:]))
    parts = reshape(w, w.floats(x))
    normalized = _normalized(w, w.floats(parts), [2, 3], eps)
    w.shape = shape
    result = w.floats(reshape(w, normalized))
    return _scaled(w, result, *(None if each is None else _of_channels(each.array, result) for each in (scale, shift)))


def instance_norm(
    w: Writer,
    x: Tensor,
    scale: Constant | None,
    shift: Constant | None,
    mean: Constant | None,
    variance: Constant | None,
    of_image: bool,
    _: object,
    eps: float | int,
    *__: object,
) -> Value:
    """Lower ``aten.instance_norm``: a group norm of single channels, or a batch norm where it keeps statistics."""
    if of_image or mean is None or variance is None:
        return group_norm(w, x, x.shape[1], scale, shift, eps)
    factor = (1 if scale is None else scale.array) / np.sqrt(variance.array + eps)
    offset = (0 if shift is None else shift.array) - mean.array * factor
    value = w.floats(x)
    return _scaled(w, value, _of_channels(factor, value), _of_channels(offset, value))


def _normalized(w: Writer, value: Value, axes: Sequence[int], eps: float | int) -> Value:
    centred = _written(w, "SUB", [value, reduced("MEAN", w, value, axes, keep=True)], value.shape)
    variance = reduced("MEAN", w, _written(w, "MUL", [centred, centred], value.shape), axes, keep=True)
    inverse = unary("RSQRT", w, _with_number("ADD", w, variance, eps))
    return _written(w, "MUL", [centred, inverse], value.shape)


def _scaled(w: Writer, value: Value, scale: np.ndarray | None, shift: np.ndarray | None) -> Value:
    result = value if scale is None else _with_number("MUL", w, value, scale)
    return result if shift is None else _with_number("ADD", w, result, shift)
