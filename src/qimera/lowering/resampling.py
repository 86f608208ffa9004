"""Maps of one size -> maps of another: positions that are copied, or weighted sums of them in floating point."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from qimera.lowering.moves import moved
from qimera.lowering.values import CHANNELS_LAST, Order, Tensor, Value
from qimera.lowering.writer import SAME, Writer

_Operation = Callable[..., torch.Tensor]


def nearest(operation: _Operation, w: Writer, x: Tensor, *arguments: object) -> Tensor:
    """Lower an enlargement that copies positions; the operation itself says which, on an image of their numbers."""
    shape, (height, width) = w.shape, x.shape[2:]
    numbers = operation(torch.arange(float(height * width)).reshape(1, 1, height, width), *arguments)[0, 0].int()
    sources = (numbers[:, 0] // width).tolist(), (numbers[0] % width).tolist()

    def move(value: Value) -> Value:
        _, source = w.read(value, CHANNELS_LAST)
        if all(_is_even(each, size) for each, size in zip(sources, (height, width), strict=True)):
            result = w.output(shape, CHANNELS_LAST, source.grid)
            inputs = [source.tensor, w.integers(shape[2:])]
            w.file.operation("RESIZE_NEAREST_NEIGHBOR", inputs, [result.tensor], 2)
            return result
        for axis in (0, 1):
            wanted = (*source.shape[: 2 + axis], *shape[2 + axis : 3 + axis], *source.shape[3 + axis :])
            result = w.output(wanted, CHANNELS_LAST, source.grid)
            w.file.operation("GATHER", [source.tensor, w.integers(sources[axis])], [result.tensor], 2, axis=1 + axis)
            source = result
        return source

    return moved(w, x, shape, move)


def _is_even(sources: Sequence[int], size: int) -> bool:
    """Whether every position is copied to as many others."""
    factor, rest = divmod(len(sources), size)
    return not rest and list(sources) == [place // factor for place in range(len(sources))]


def bilinear(
    w: Writer,
    x: Tensor,
    size: Sequence[int] | None,
    aligned: bool,
    scales: Sequence[float] | None = None,
) -> Value:
    """Lower ``aten.upsample_bilinear2d``, for which LiteRT has a kernel where sizes say the scales."""
    if scales and [before * each for before, each in zip(x.shape[2:], scales, strict=True)] != list(w.shape[2:]):
        return weighted(torch.ops.aten.upsample_bilinear2d.vec, w, x, size, aligned, scales)
    number, _ = w.read(w.floats(x), CHANNELS_LAST)
    result = w.output(w.shape, CHANNELS_LAST)
    options = {"alignCorners": aligned, "halfPixelCenters": not aligned}
    w.file.operation("RESIZE_BILINEAR", [number, w.integers(w.shape[2:])], [result.tensor], 3, **options)
    return result


def weighted(operation: _Operation, w: Writer, x: Tensor, *arguments: object) -> Value:
    """Lower an operation whose results are weighted sums of rows, and then of columns, in which weights sum to 1.

    The operation itself says which weights: on images in which one row, or one column, is 1 and all others are 0.
    """
    value, (height, width) = w.floats(x), x.shape[2:]
    rows = torch.eye(height)[None, :, :, None].expand(-1, -1, -1, width)
    columns = torch.eye(width)[None, :, None, :].expand(-1, -1, height, -1)
    tables = operation(rows, *arguments)[0, :, :, 0], operation(columns, *arguments)[0, :, 0]
    assert all(torch.allclose(table.sum(0), torch.ones(table.shape[1])) for table in tables), w.name
    orders: tuple[Order, Order] = (0, 1, 3, 2), (0, 1, 2, 3)
    for table, order in zip(tables, orders, strict=True):
        if not torch.equal(table, torch.eye(len(table), table.shape[1])):
            value = _summed(w, value, table.T.contiguous().numpy(), order)
    return value


def _summed(w: Writer, value: Value, weights: np.ndarray, order: Order) -> Value:
    """Write sums of the axis that ``order`` has last, with one row of weights for each of them."""
    number, source = w.read(value, order)
    shape = tuple(len(weights) if axis == order[-1] else size for axis, size in enumerate(source.shape))
    result = w.output(shape, order)
    table = w.file.constant(f"{w.name}_weights", weights.astype(np.float32))
    w.file.operation("FULLY_CONNECTED", [number, table], [result.tensor], 5, keepNumDims=True)
    return result


def average(
    w: Writer, x: Tensor, window: Sequence[int], stride: Sequence[int], padding: Sequence[int], *, ceil: bool
) -> Value:
    """Lower an average over what of each window lies inside the maps, as TensorFlow's averages are."""
    extents = list(zip(x.shape[2:], w.shape[2:], window, stride, padding, strict=True))
    if not all(_is_same(*each) for each in extents):
        return weighted(torch.ops.aten.avg_pool2d.default, w, x, window, stride, padding, ceil, False)
    number, _ = w.read(w.floats(x), CHANNELS_LAST)
    result = w.output(w.shape, CHANNELS_LAST)
    options = {"padding": SAME, "strideH": stride[0], "strideW": stride[1]}
    options |= {"filterHeight": window[0], "filterWidth": window[1]}
    w.file.operation("AVERAGE_POOL_2D", [number], [result.tensor], 1, **options)
    return result


def _is_same(before: int, behind: int, length: int, step: int, padding: int) -> bool:
    """Whether windows lie where TensorFlow's padding SAME puts them."""
    reach = (behind - 1) * step + length - before
    return -(-before // step) == behind and padding == max(0, reach) // 2
