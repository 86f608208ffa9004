"""Tensors -> scale and zero point: by their extremes, or by the least squared error."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

RangeMethod = Literal["mse", "minmax"]

LOWEST_WEIGHT = -127
"""Lowest integer of weights in files; see ``weight_range``."""

_SCALE_OF_ZEROS = 2.0**-12
_NUM_CANDIDATES = 80
_MAX_VALUES = 1 << 17
"""Values of an activation tensor that the search looks at; enough for the third digit of the error."""

_AT_ONCE = 1 << 15
"""Values, over all candidates that are tried at the same time: of a small tensor all, of a large one each alone."""

_GOLDEN = (5**0.5 - 1) / 2


def integer_range(bits: int, *, signed: bool) -> tuple[int, int]:
    """Return (lowest, highest) integer of this many bits."""
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)


def weight_range(bits: int) -> tuple[int, int]:
    """Return (lowest, highest) integer of a weight with zero point 0 (deviation D36).

    At 8 bits it is -127: kernels may add two products of 8 bits in 16, which -128 overflows. Narrower weights keep all
    their integers, since no kernel's 8 bits are full of them, and every level counts.
    """
    low, high = integer_range(bits, signed=True)
    return max(low, LOWEST_WEIGHT), high


def affine_parameters(
    x: Tensor, quant_min: int, quant_max: int, *, symmetric: bool, axis: int | None = None
) -> tuple[Float[Tensor, " channel"], Int[Tensor, " channel"]]:
    """Return the scale and zero point with which the grid just covers ``x`` and zero (one each, or per channel).

    Zero is always a level, also of a tensor without it (deviation D11).
    """
    rows = _rows(x, axis)
    return _from_extremes(rows.amin(1), rows.amax(1), quant_min, quant_max, symmetric)


def search_affine_parameters(
    x: Tensor, quant_min: int, quant_max: int, *, symmetric: bool, axis: int | None = None
) -> tuple[Float[Tensor, " channel"], Int[Tensor, " channel"]]:
    """Return the scale and zero point with the least squared error on ``x`` among shrunken ranges.

    Both ends shrink together where the range is symmetric or starts at zero, else each end on its own.
    """
    rows = _rows(x, axis)
    if axis is None:
        rows = thinned(rows, _MAX_VALUES)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    both = not symmetric and bool((low < 0).any())
    ratios = torch.linspace(1, 1 / _NUM_CANDIDATES, _NUM_CANDIDATES // (4 if both else 1), device=x.device)
    high_ratios, low_ratios = (each.reshape(-1, 1) for each in torch.meshgrid(ratios, ratios, indexing="ij"))
    if not both:
        high_ratios = low_ratios = ratios[:, None]
    scales, zero_points = _from_extremes(low * low_ratios, high * high_ratios, quant_min, quant_max, symmetric)
    best = _squared_errors(rows, scales, zero_points, quant_min, quant_max).argmin(0)[None]
    return scales.gather(0, best)[0], zero_points.gather(0, best)[0]


def thinned(rows: Float[Tensor, "row value"], num_values: int) -> Float[Tensor, "row kept"]:
    """Return at most ``num_values`` of each row, spread over it evenly but in no period.

    A fixed stride would fall in step with the rows of a map and see nothing but its border; multiples of the golden
    ratio fall in step with nothing.
    """
    if rows.shape[1] <= num_values:
        return rows
    turns = torch.arange(num_values, dtype=torch.float64) * _GOLDEN
    positions = ((turns - turns.floor()) * rows.shape[1]).long()
    return rows[:, positions.to(rows.device)]


def _rows(x: Tensor, axis: int | None) -> Float[Tensor, "channel value"]:
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)


def _from_extremes(low: Tensor, high: Tensor, quant_min: int, quant_max: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        scale = _usable(torch.maximum(high / quant_max, low / quant_min))
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    scale = _usable((high - low) / (quant_max - quant_min))
    zero_point = (quant_min - low / scale).round().clamp(quant_min, quant_max)
    return scale, zero_point.to(torch.int32)


def _usable(scale: Tensor) -> Tensor:
    """Replace steps of tensors that are zero throughout: any would do, but biases lie on the grid of its products."""
    return torch.where(scale > torch.finfo(scale.dtype).tiny, scale, _SCALE_OF_ZEROS)


def _squared_errors(
    rows: Float[Tensor, "row value"],
    scales: Float[Tensor, "candidate row"],
    zero_points: Int[Tensor, "candidate row"],
    quant_min: int,
    quant_max: int,
) -> Float[Tensor, "candidate row"]:
    """Return the squared error of each row on each grid."""
    at_once = max(1, _AT_ONCE // rows.numel())
    parts = (each[:, :, None].split(at_once) for each in (scales, zero_points))
    errors = []
    for scale, zero_point in zip(*parts, strict=True):
        nearest = (rows / scale).round_().clamp_(quant_min - zero_point, quant_max - zero_point).mul_(scale)
        errors.append(nearest.sub_(rows).square_().sum(2))
    return torch.cat(errors)
