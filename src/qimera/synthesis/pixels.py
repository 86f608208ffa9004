"""Images of any value -> images that a camera could have taken."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


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


def enlarged(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return ``images`` at another size, by bilinear interpolation."""
    return images if images.shape[2:] == size else F.interpolate(images, size=size, mode="bilinear")
