"""Operations of a graph -> the functions that write them for LiteRT: one table."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from qimera.errors import UnsupportedModelError
from qimera.graph.nodes import aten, pair
from qimera.lowering import arithmetic, layers, moves, resampling
from qimera.lowering.values import Tensor, Value
from qimera.lowering.writer import Writer
from qimera.student.grids import Levels

_integers = torch.ops.quantized_decomposed


def _quantize(w: Writer, x: Tensor, step: float, zero_point: int, low: int, high: int, _dtype: object) -> Value:
    return w.quantized(x, Levels(step, zero_point, low, high))


def _average(
    w: Writer,
    x: Tensor,
    window: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    ceil: bool = False,
    counts_padding: bool = True,
) -> Tensor:
    window, stride, padding = pair(window), pair(stride or window), pair(padding)
    whole = [
        (x.shape[2 + axis] + 2 * padding[axis] - window[axis]) // stride[axis] + 1 == w.shape[2 + axis]
        for axis in range(2)
    ]
    if all(whole) and not (any(padding) and not counts_padding):
        return layers.average(w, x, window, stride, padding)
    return resampling.average(w, x, window, stride, padding, ceil=ceil)


def _adaptive_average(w: Writer, x: Tensor, size: Sequence[int]) -> Tensor:
    sizes = list(zip(x.shape[2:], w.shape[2:], strict=True))
    if any(before % behind for before, behind in sizes):  # windows overlap
        return resampling.weighted(aten.adaptive_avg_pool2d.default, w, x, size)
    window = [before // behind for before, behind in sizes]
    return layers.average(w, x, window, window, (0, 0))


def _mean(w: Writer, x: Tensor, axes: Sequence[int], keep: bool = False, **_: object) -> Tensor:
    gone = sorted(axis % len(x.shape) for axis in axes)
    shape = w.shape
    if gone != [2, 3] or len(x.shape) != 4 or not arithmetic.has_grid(x):
        return arithmetic.reduced("MEAN", w, x, gone, keep)
    pooled = layers.average(w, x, x.shape[2:], (1, 1), (0, 0))
    w.shape = shape
    return moves.reshape(w, pooled)


def _largest_and_place(w: Writer, x: Tensor, axis: int, keep: bool = False) -> tuple[Tensor, ...]:
    """Lower ``aten.max.dim`` without the places of the largest values."""
    return (arithmetic.reduced("REDUCE_MAX", w, x, [axis], keep),)


def _clip(low: float, high: float, w: Writer, x: Tensor) -> Tensor:
    return w.clipped(x, low, high)


def _clamp_max(w: Writer, x: Tensor, high: float | int) -> Tensor:
    return w.clipped(x, -math.inf, float(high))


def _hardtanh(w: Writer, x: Tensor, low: float | int = -1.0, high: float | int = 1.0) -> Tensor:
    return w.clipped(x, float(low), float(high))


def _clamp(w: Writer, x: Tensor, low: float | int | None = None, high: float | int | None = None) -> Tensor:
    return w.clipped(x, -math.inf if low is None else float(low), math.inf if high is None else float(high))


def _same(_: Writer, x: Tensor, *__: object) -> Tensor:
    return x


def _gated(w: Writer, x: Tensor, axis: int = -1) -> Tensor:
    shape = w.shape
    half, gate = moves.chunk(w, w.value(x), 2, axis)
    w.shape = shape
    return arithmetic.binary("MUL", w, half, arithmetic.unary("LOGISTIC", w, gate))


def _reversed_difference(
    w: Writer, x: Tensor, first: Tensor | float | int, alpha: float | int = 1, **_: object
) -> Tensor:
    return arithmetic.binary("SUB", w, first, x, alpha)


def _plus_product(w: Writer, x: Tensor, first: Tensor, second: Tensor, *, value: float | int = 1) -> Tensor:
    """Lower ``aten.addcmul``."""
    shape = w.shape
    w.shape = np.broadcast_shapes(first.shape, second.shape)
    product = arithmetic.binary("MUL", w, first, second)
    w.shape = shape
    return arithmetic.binary("ADD", w, x, product, value)


def _power(w: Writer, x: Tensor, exponent: float | int) -> Value:
    if exponent != 2:
        raise UnsupportedModelError(f"{w.name}: a power of {exponent} has no counterpart here; export to ONNX instead")
    return arithmetic.unary("SQUARE", w, x)


_NEAREST = (
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest2d.default,
    aten._upsample_nearest_exact2d.vec,
    aten._upsample_nearest_exact2d.default,
)
_WEIGHTED = (
    aten.upsample_bilinear2d.default,
    aten.upsample_bicubic2d.vec,
    aten.upsample_bicubic2d.default,
    aten._upsample_bilinear2d_aa.vec,
    aten._upsample_bicubic2d_aa.vec,
)

TABLE: dict[object, Callable[..., Any]] = {
    _integers.quantize_per_tensor.default: _quantize,
    _integers.dequantize_per_tensor.default: _same,
    aten.conv2d.default: layers.convolution,
    aten.conv_transpose2d.input: layers.transposed_convolution,
    aten.linear.default: layers.linear,
    aten.matmul.default: layers.product,
    aten.bmm.default: layers.product,
    aten.avg_pool2d.default: _average,
    aten.adaptive_avg_pool2d.default: _adaptive_average,
    aten.mean.dim: _mean,
    aten.max_pool2d.default: layers.largest,
    aten.amax.default: partial(arithmetic.reduced, "REDUCE_MAX"),
    aten.max.dim: _largest_and_place,
    aten.sum.dim_IntList: partial(arithmetic.reduced, "SUM"),
    aten.relu.default: partial(_clip, 0.0, math.inf),
    aten.relu6.default: partial(_clip, 0.0, 6.0),
    aten.hardtanh.default: _hardtanh,
    **dict.fromkeys((aten.clamp.default, aten.clamp_min.default), _clamp),
    aten.clamp_max.default: _clamp_max,
    aten.add.Tensor: partial(arithmetic.binary, "ADD"),
    aten.sub.Tensor: partial(arithmetic.binary, "SUB"),
    aten.mul.Tensor: partial(arithmetic.binary, "MUL"),
    aten.addcmul.default: _plus_product,
    aten.div.Tensor: partial(arithmetic.binary, "DIV"),
    **dict.fromkeys((aten.rsub.Scalar, aten.rsub.Tensor), _reversed_difference),
    aten.maximum.default: partial(arithmetic.binary, "MAXIMUM"),
    aten.minimum.default: partial(arithmetic.binary, "MINIMUM"),
    aten.cat.default: moves.concatenate,
    aten.stack.default: moves.stack,
    aten.softmax.int: arithmetic.softmax,
    aten.linalg_vector_norm.default: arithmetic.vector_norm,
    aten.layer_norm.default: arithmetic.layer_norm,
    aten.group_norm.default: arithmetic.group_norm,
    aten.instance_norm.default: arithmetic.instance_norm,
    aten.gelu.default: arithmetic.gelu,
    aten.glu.default: _gated,
    aten.silu.default: arithmetic.silu,
    aten.hardsigmoid.default: arithmetic.hard_sigmoid,
    aten.leaky_relu.default: arithmetic.leaky_relu,
    aten.prelu.default: arithmetic.prelu,
    aten.softplus.default: arithmetic.softplus,
    aten.mish.default: arithmetic.mish,
    aten.pow.Tensor_Scalar: _power,
    **{
        getattr(aten, name).default: partial(arithmetic.unary, kind)
        for name, kind in {
            "abs": "ABS",
            "cos": "COS",
            "elu": "ELU",
            "exp": "EXP",
            "hardswish": "HARD_SWISH",
            "log": "LOG",
            "neg": "NEG",
            "rsqrt": "RSQRT",
            "sigmoid": "LOGISTIC",
            "sin": "SIN",
            "sqrt": "SQRT",
            "square": "SQUARE",
            "tanh": "TANH",
        }.items()
    },
    **dict.fromkeys(
        (
            aten.flatten.using_ints,
            aten.reshape.default,
            aten.reshape_as.default,
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.unflatten.int,
            aten.unsqueeze.default,
            aten.view.default,
            aten.view_as.default,
        ),
        moves.reshape,
    ),
    **dict.fromkeys((aten.clone.default, aten.contiguous.default, aten.dropout.default), _same),
    aten.permute.default: moves.permute,
    **dict.fromkeys((aten.transpose.int, aten.swapaxes.default, aten.swapdims.default), moves.transpose),
    aten.mT.default: partial(moves.transpose, first=-2, second=-1),
    aten.t.default: moves.transpose,
    aten.slice.Tensor: moves.cut,
    aten.select.int: moves.select,
    aten.split.Tensor: moves.split,
    aten.split_with_sizes.default: moves.split,
    aten.chunk.default: moves.chunk,
    aten.unbind.int: moves.unbind,
    **dict.fromkeys((aten.expand.default, aten.expand_as.default), moves.expand),
    aten.repeat.default: moves.repeat,
    aten.repeat_interleave.self_int: moves.interleave,
    **{each: partial(resampling.nearest, each) for each in _NEAREST},
    aten.upsample_bilinear2d.vec: resampling.bilinear,
    **{each: partial(resampling.weighted, each) for each in _WEIGHTED},
    aten.pad.default: moves.pad,
    aten.constant_pad_nd.default: moves.pad_with,
    aten.roll.default: moves.roll,
    aten.pixel_shuffle.default: partial(moves.shuffle, up=True),
    aten.pixel_unshuffle.default: partial(moves.shuffle, up=False),
}
"""How each operation is written; ``Writer.shape`` is what it returns for one image."""
