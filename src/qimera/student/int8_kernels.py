"""The arithmetic of LiteRT's int8 kernels, bit for bit: XNNPACK's, and that of others, which rounds twice.

Everything is counted from zero points, in tensors of whole numbers, and not clipped yet: each kernel clips what it
returns here to the grid of its result. Steps are those that a file says, in float32. All of this was read off kernels:
of ai-edge-litert 2.3 on x86-64, and of tflite-micro.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


class Xnnpack:
    """Kernels of phones and servers: one multiplication in float32, rounded half to even."""

    def layer(self, sums: Tensor, entering: float, weight: Tensor, leaving: float) -> Tensor:
        """Return the levels of sums of products: of convolutions and linear layers, and of averages written as such.

        Args:
            sums: Whole numbers, as integers or in floating point that holds them exactly.
            entering: Step of the layer's input.
            weight: Steps of its weight (float32), in a shape that lines them up with the sums.
            leaving: Step of its result.
        """
        return (sums.float() * (weight * _single(entering) / _single(leaving))).round_()

    def sum(self, a: Tensor, b: Tensor, steps: tuple[float, float, float]) -> Tensor:
        """Return the levels of the sum of two tensors; ``steps`` are of both and of the result.

        Both ratios of steps get 20 bits, and their sum is rounded half up.
        """
        ratios = [np.float32(each) / np.float32(steps[2]) for each in steps[:2]]
        shift = 21 - math.frexp(max(ratios))[1]
        first, second = (round(float(each) * 2.0**shift) for each in ratios)
        return (a.long() * first + b.long() * second + (1 << shift - 1)) >> shift

    def product(self, a: Tensor, b: Tensor, steps: tuple[float, float, float]) -> Tensor:
        """Return the levels of the product of two tensors, element by element; ``steps`` as for sums."""
        return ((a * b).float() * _product_of(steps)).round_()

    def mean(self, sums: Tensor, count: int, entering: float, zero_points: tuple[int, int], leaving: float) -> Tensor:
        """Return the levels of the mean of ``count`` levels whose sum is given; zero points of input and result.

        The zero points take part in the rounding.
        """
        factor = np.float32(entering) / np.float32(leaving) * (np.float32(1) / np.float32(count))
        offset = np.float32(count * zero_points[0])
        shift = np.float32(zero_points[1]) - offset * factor
        raw = sums.float() + float(offset)
        return (raw * float(factor) + float(shift)).round_() - zero_points[1]

    def quantize(self, x: Tensor, step: float) -> Tensor:
        """Return the levels of numbers in floating point, multiplied by the reciprocal of the step."""
        return (x * float(np.float32(1) / np.float32(step))).round_()


@dataclass(frozen=True)
class FixedPoint:
    """Kernels of microcontrollers: a multiplication by 31 bits, rounded, and a shift, rounded half away from zero.

    LiteRT's built-in kernels do the same, but in layers, where they round the second time half up, in means over many
    positions, and for numbers in floating point.
    """

    is_built_in: bool = False

    def layer(self, sums: Tensor, entering: float, weight: Tensor, leaving: float) -> Tensor:
        """See ``Xnnpack``."""
        factor = weight.double() * _single(entering) / _single(leaving)
        return _rounded(sums.long(), *_fixed_point(factor), half_up=self.is_built_in)

    def sum(self, a: Tensor, b: Tensor, steps: tuple[float, float, float]) -> Tensor:
        """See ``Xnnpack``: both are first brought to twice the larger step, with 20 more bits."""
        first, second, result = map(_single, steps)
        common = 2 * max(first, second)
        operands = ((a, first), (b, second))
        both = [_multiplied(each.long() << 20, _as_factor(step / common)) for each, step in operands]
        return _multiplied(both[0] + both[1], _as_factor(common / ((1 << 20) * result)))

    def product(self, a: Tensor, b: Tensor, steps: tuple[float, float, float]) -> Tensor:
        """See ``Xnnpack``."""
        return _multiplied((a * b).long(), _as_factor(_product_of(steps)))

    def mean(self, sums: Tensor, count: int, entering: float, zero_points: tuple[int, int], leaving: float) -> Tensor:
        """See ``Xnnpack``: the multiplier takes the division in, and built-in kernels round zero points apart."""
        if self.is_built_in:
            return _built_in_mean(sums.long() + count * zero_points[0], count, entering, zero_points[0], leaving)
        (multiplier,), (exponent,) = _fixed_point(_as_factor(_single(entering) / _single(leaving)).reshape(1))
        shift = min(count.bit_length() - 1, 31 + int(exponent))
        return _rounded(sums.long(), (multiplier << shift) // count, exponent - shift)

    def quantize(self, x: Tensor, step: float) -> Tensor:
        """See ``Xnnpack``: divided by the step, and rounded half away from zero."""
        if self.is_built_in:
            return Xnnpack().quantize(x, step)
        steps = (x / _single(step)).double()
        return (steps.abs() + 0.5).floor_().copysign_(steps).float()


Arithmetic = Xnnpack | FixedPoint


def _built_in_mean(raw: Tensor, count: int, entering: float, zero_point: int, leaving: float) -> Tensor:
    """Return the levels of means of integers, (batch, channel, ...) or one for each channel.

    Sixteen channels at a time are rounded half up, those that are left half away from zero.
    """
    factor = float(np.float32(entering) / (np.float32(count) * np.float32(leaving)))
    offset = float(np.float32(zero_point) * np.float32(entering) / np.float32(leaving))
    fixed = _fixed_point(_as_factor(factor).to(raw.device))
    axis = min(1, raw.ndim - 1)
    together = raw.shape[axis] // 16 * 16
    parts = raw.tensor_split([together], axis)
    levels = [_rounded(part, *fixed, half_up=half_up) for part, half_up in zip(parts, (True, False), strict=True)]
    return torch.cat(levels, axis) - math.trunc(offset + math.copysign(0.5, offset))


def _single(step: float) -> float:
    return float(np.float32(step))


def _product_of(steps: tuple[float, float, float]) -> float:
    first, second, result = (np.float32(each) for each in steps)
    return float(first * second / result)


def _as_factor(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _multiplied(x: Tensor, factor: Tensor) -> Tensor:
    """Return whole numbers times ``factor``, rounded twice."""
    multiplier, exponent = _fixed_point(factor.to(x.device))
    return _rounded(x, multiplier, exponent)


def _fixed_point(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the multiplier of 31 bits and the exponent of two that stand for ``factor``: m * 2 ** (e - 31)."""
    fraction, exponent = torch.frexp(factor)
    multiplier = (fraction * 2.0**31 + 0.5).floor().long()
    is_next = multiplier == 1 << 31
    return torch.where(is_next, 1 << 30, multiplier), exponent.long() + is_next


def _rounded(x: Tensor, multiplier: Tensor, exponent: Tensor, *, half_up: bool = False) -> Tensor:
    """Return x * multiplier * 2 ** (exponent - 31): rounded once behind 31 bits and once more behind the others.

    The second time it is half away from zero, unless it is ``half_up``.
    """
    product = (x << exponent.clamp(min=0)) * multiplier
    high = torch.where(product >= 0, product + (1 << 30) >> 31, -((1 << 30) - product - 1 >> 31))
    shift = (-exponent).clamp(min=0)
    half = (1 << shift) >> 1
    if half_up:
        return high + half >> shift
    return torch.where(high >= 0, high + half >> shift, -(half - high >> shift))
