"""Operations that only move values about -> views of memory, and parts of it, on whatever grid the values are."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from qimera.errors import UnsupportedModelError
from qimera.lowering.values import Deferred, Tensor, Value
from qimera.lowering.writer import Writer
from qimera.student.grids import Levels, grid_of

_MAX_PARTS = 4
"""Tensors that XNNPACK concatenates at once."""


def moved(w: Writer, x: Tensor, shape: Sequence[int], move: Callable[[Value], Value]) -> Tensor:
    """Move values about, which then have this ``shape``; those of a tensor that is not written yet once it is."""
    if isinstance(x, Deferred):
        return replace(x, shape=tuple(shape), write=lambda levels: move(x.write(levels)))
    return move(w.value(x))


def reshape(w: Writer, x: Tensor, *_: object) -> Tensor:
    """Lower everything that keeps the order of values: views, flattening, axes of one."""
    shape = w.shape

    def move(value: Value) -> Value:
        found = value.reshaped(shape) or value.flattened(shape)
        if found is None:
            found = w.read(value, tuple(range(len(value.shape))))[1].reshaped(shape)
        assert found is not None
        return found

    return moved(w, x, shape, move)


def permute(w: Writer, x: Tensor, axes: Sequence[int]) -> Tensor:
    """Lower ``aten.permute``, which moves nothing: memory is read in another order."""
    axes = [axis % len(x.shape) for axis in axes]
    return moved(w, x, w.shape, lambda value: w.whole(value).permuted(axes))


def transpose(w: Writer, x: Tensor, first: int = 0, second: int = 1) -> Tensor:
    """Lower ``aten.transpose``."""
    axes = list(range(len(x.shape)))
    if len(axes) > 1:
        axes[first], axes[second] = axes[second], axes[first]
    return permute(w, x, axes)


def cut(
    w: Writer, x: Tensor, axis: int = 0, start: int | None = None, _end: int | None = None, step: int = 1
) -> Tensor:
    """Lower ``aten.slice``."""
    size, shape, axis = x.shape[axis], w.shape, axis % len(x.shape)
    first = start or 0
    first = min(max(first + (size if first < 0 else 0), 0), size)
    if step == 1:
        return _part(w, x, axis, first, shape)

    def move(value: Value) -> Value:
        number, source = w.read(w.whole(value))
        result = w.output(shape, source.order, source.grid)
        begin, end, steps = [0] * len(shape), list(source.shape), [1] * len(shape)
        begin[axis], end[axis], steps[axis] = first, min(size, first + step * shape[axis]), step
        places = [w.integers([each[axis] for axis in source.order]) for each in (begin, end, steps)]
        w.file.operation("STRIDED_SLICE", [number, *places], [result.tensor], 2)
        return result

    return moved(w, x, shape, move)


def _part(w: Writer, x: Tensor, axis: int, first: int, shape: Sequence[int]) -> Tensor:
    begin = [0] * len(shape)
    begin[axis] = first
    return moved(w, x, shape, lambda value: w.sliced(w.whole(value), begin, shape))


def select(w: Writer, x: Tensor, axis: int, index: int) -> Tensor:
    """Lower ``aten.select``."""
    axis %= len(x.shape)
    shape = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
    return reshape(w, _part(w, x, axis, index % x.shape[axis], shape))


def split(w: Writer, x: Tensor, sizes: int | Sequence[int], axis: int = 0) -> tuple[Tensor, ...]:
    """Lower ``aten.split``, into parts of one size or of several."""
    axis %= len(x.shape)
    if isinstance(sizes, int):
        sizes = [min(sizes, x.shape[axis] - start) for start in range(0, x.shape[axis], sizes)]
    starts = np.cumsum([0, *sizes[:-1]])
    shapes = [(*x.shape[:axis], size, *x.shape[axis + 1 :]) for size in sizes]
    return tuple(_part(w, x, axis, int(start), shape) for start, shape in zip(starts, shapes, strict=True))


def chunk(w: Writer, x: Tensor, count: int, axis: int = 0) -> tuple[Tensor, ...]:
    """Lower ``aten.chunk``."""
    return split(w, x, -(-x.shape[axis] // count), axis)


def unbind(w: Writer, x: Tensor, axis: int = 0) -> tuple[Tensor, ...]:
    """Lower ``aten.unbind``."""
    axis %= len(x.shape)
    w.shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    return tuple(select(w, x, axis, index) for index in range(x.shape[axis]))


def expand(w: Writer, x: Tensor, *_: object) -> Tensor:
    """Lower ``aten.expand``, which does nothing to a class token of one image."""
    shape = w.shape
    if math.prod(shape) == math.prod(x.shape):
        return reshape(w, x)

    def move(value: Value) -> Value:
        spread = value.reshaped((1,) * (len(shape) - len(value.shape)) + value.shape)
        assert spread is not None
        number, source = w.read(spread)
        result = w.output(shape, source.order, source.grid)
        w.file.operation("BROADCAST_TO", [number, w.integers(result.stored)], [result.tensor], 2)
        return result

    return moved(w, x, shape, move)


def repeat(w: Writer, x: Tensor, counts: Sequence[int]) -> Tensor:
    """Lower ``aten.repeat``."""
    shape = w.shape

    def move(value: Value) -> Value:
        spread = w.whole(value).reshaped((1,) * (len(shape) - len(value.shape)) + value.shape)
        assert spread is not None
        number, source = w.read(spread)
        result = w.output(shape, source.order, source.grid)
        w.file.operation("TILE", [number, w.integers([counts[axis] for axis in source.order])], [result.tensor])
        return result

    return moved(w, x, shape, move)


def interleave(w: Writer, x: Tensor, count: int, axis: int | None = None, **_: object) -> Tensor:
    """Lower ``aten.repeat_interleave``: every value ``count`` times, one after the other."""
    shape = w.shape
    if axis is None:
        w.shape = (math.prod(x.shape),)
        x, axis = reshape(w, x), 0
    axis %= len(x.shape)
    before, behind = x.shape[: axis + 1], x.shape[axis + 1 :]
    w.shape = (*before, 1, *behind)
    spread = reshape(w, x)
    w.shape = (*before, count, *behind)
    repeated = repeat(w, spread, [count if place == axis + 1 else 1 for place in range(len(w.shape))])
    w.shape = shape
    return reshape(w, repeated)


def pad(w: Writer, x: Tensor, sides: Sequence[int], mode: str = "constant", value: float | int | None = None) -> Tensor:
    """Lower ``aten.pad`` with zeros, or with minus infinity, which no maximum returns."""
    if mode != "constant" or value not in (None, 0, -math.inf) or any(each < 0 for each in sides):
        raise UnsupportedModelError(f"{w.name}: only padding with zeros has a counterpart here; export to ONNX instead")
    pairs = [(int(sides[2 * index]), int(sides[2 * index + 1])) for index in range(len(sides) // 2)]
    around = [(0, 0)] * (len(x.shape) - len(pairs)) + pairs[::-1]
    return moved(w, x, w.shape, lambda each: w.surrounded(w.whole(each), around, lowest=value == -math.inf))


def pad_with(w: Writer, x: Tensor, sides: Sequence[int], value: float | int = 0) -> Tensor:
    """Lower ``aten.constant_pad_nd``."""
    return pad(w, x, sides, "constant", value)


def concatenate(w: Writer, parts: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Lower ``aten.cat``, whose kernels want all parts on the grid of the result."""
    name, shape = w.name, w.shape
    axis %= len(shape)

    def write(levels: Levels | None) -> Value:
        w.name = name
        values = [w.value(each) for each in parts]
        if levels is not None and all(each.grid is not None for each in values):
            values = [w.requantized(w.quantized(each, levels), grid_of(levels, w.name)) for each in values]
        elif len({each.grid for each in values}) > 1 or levels is not None:
            values = [w.floats(each) for each in values]
        result = _joined(w, values, axis)
        return result if levels is None else w.quantized(result, levels)

    grids = {each.grid if isinstance(each, Value) else None for each in parts}
    return write(None) if len(grids) == 1 and None not in grids else Deferred(shape, write)


def stack(w: Writer, parts: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Lower ``aten.stack``: a concatenation along an axis of its own."""
    shape = w.shape
    axis %= len(shape)
    w.shape = (*shape[:axis], 1, *shape[axis + 1 :])
    spread = [reshape(w, each) for each in parts]
    w.shape = shape
    return concatenate(w, spread, axis)


def _joined(w: Writer, values: Sequence[Value], axis: int) -> Value:
    """Write a concatenation of tensors on one grid, a few at a time, as XNNPACK takes them."""
    if len(values) > _MAX_PARTS:
        groups = [values[start : start + _MAX_PARTS] for start in range(0, len(values), _MAX_PARTS)]
        return _joined(w, [_joined(w, each, axis) for each in groups], axis)
    order = w.whole(values[0]).order
    read = [w.read(each, order) for each in values]
    if len(read) == 1:
        return read[0][1]
    sizes = [value.shape[axis] for _, value in read]
    first = read[0][1]
    shape = (*first.shape[:axis], sum(sizes), *first.shape[axis + 1 :])
    result = w.output(shape, order, first.grid)
    w.file.operation("CONCATENATION", [number for number, _ in read], [result.tensor], 2, axis=order.index(axis))
    return result


def roll(w: Writer, x: Tensor, shifts: Sequence[int], axes: Sequence[int]) -> Tensor:
    """Lower ``aten.roll``: two parts change places."""
    whole = w.value(x)
    w.shape = whole.shape
    for shift, axis in zip(shifts, axes, strict=True):
        size = whole.shape[axis]
        if shift % size:
            parts = split(w, whole, [size - shift % size, shift % size], axis)
            whole = w.value(concatenate(w, parts[::-1], axis))
    return whole


def shuffle(w: Writer, x: Tensor, factor: int, *, up: bool) -> Tensor:
    """Lower ``aten.pixel_shuffle``, which moves channels to positions, or back: reshape, permute, reshape."""
    _, channels, height, width = x.shape
    shape = w.shape
    if up:
        w.shape = (1, channels // factor**2, factor, factor, height, width)
        axes = (0, 1, 4, 2, 5, 3)
    else:
        w.shape = (1, channels, height // factor, factor, width // factor, factor)
        axes = (0, 1, 3, 5, 2, 4)
    moved = permute(w, reshape(w, x), axes)
    w.shape = shape
    return reshape(w, moved)
