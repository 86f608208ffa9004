"""Images of any value -> images that a camera could have taken."""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

_MATRICES_PAY = 96 * 96
"""Pixels of an image from which it is enlarged by products of matrices."""


def within_limits(
    images: Float[Tensor, "batch channel height width"],
    low: Float[Tensor, "channel 1 1"],
    high: Float[Tensor, "channel 1 1"],
) -> Float[Tensor, "batch channel height width"]:
    """Return ``images`` clamped to black and white, the normalised values of which are ``low`` and ``high``.

    The gradient passes through the limits, so that a pixel beyond them can come back (deviation D4).
    """
    valid = torch.minimum(torch.maximum(images.detach(), low), high)
    # images - images.detach() is exactly 0; a difference added to the images themselves would round beyond the limits
    return valid + (images - images.detach())


def sum_of_scales(scales: list[Tensor]) -> Tensor:
    """Return the sum of images, all enlarged to the size of the first.

    Those of large images are enlarged by two products of matrices, which takes two fifths of the time.
    """
    first, *coarse = scales
    height, width = first.shape[2:]
    if not coarse or height * width < _MATRICES_PAY:
        return sum((enlarged(each, (height, width)) for each in coarse), first)
    columns = (_interpolation(each.shape[3], width).to(first.device) for each in coarse)
    wide = torch.cat([each @ column.mT for each, column in zip(coarse, columns, strict=True)], 2)
    rows = torch.cat([_interpolation(each.shape[2], height) for each in coarse], 1).to(first.device)
    return first + rows @ wide


@cache
def _interpolation(size: int, length: int) -> Float[Tensor, "length size"]:
    """Return the matrix that enlarges ``size`` values to ``length``, between which it interpolates linearly."""
    return F.interpolate(torch.eye(size)[None], size=length, mode="linear")[0].mT.contiguous()


def enlarged(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return ``images`` at another size, by bilinear interpolation."""
    return images if images.shape[2:] == size else F.interpolate(images, size=size, mode="bilinear")
