"""Random blends, flips and shifts of a batch, drawn from a given random generator."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def flip_at_random(
    images: Float[Tensor, "batch channel height width"], rng: torch.Generator
) -> Float[Tensor, "batch channel height width"]:
    """Mirror about half of the images left to right."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=rng).to(images.device) < 0.5
    return torch.where(mirrored, images.flip(3), images)


def blend_at_random(
    images: Float[Tensor, "batch channel height width"],
    soft_labels: Float[Tensor, "batch num_classes"],
    probability: float,
    rng: torch.Generator,
) -> tuple[Float[Tensor, "batch channel height width"], Float[Tensor, "batch num_classes"]]:
    """Blend some of the images, and their labels, with another image of the batch, which gets at most half the weight.

    Superposition once more, in the space of images (mixup, Zhang et al. 2018; deviation D24): it costs nothing and
    fills the space between the samples of a small bank.
    """
    share = 0.5 * torch.rand(len(images), 1, generator=rng)
    share *= torch.rand(len(images), 1, generator=rng) < probability
    share = share.to(images.device)
    labels = torch.lerp(soft_labels, soft_labels.flip(0), share)
    return torch.lerp(images, images.flip(0), share[:, :, None, None]), labels


def shift_batch(
    images: Float[Tensor, "batch channel height width"], max_shift: int, rng: torch.Generator
) -> Float[Tensor, "batch channel height width"]:
    """Move the whole batch by one random offset of at most ``max_shift`` pixels each way, mirroring at the borders.

    Along an axis of as many pixels or fewer, it moves by at most all but one of them.
    """
    height, width = images.shape[2:]
    down, right = _largest_shifts(images, max_shift)
    top, left = (torch.randint(2 * max_shift + 1, (2,), generator=rng) - max_shift).tolist()
    top, left = down + max(-down, min(down, top)), right + max(-right, min(right, left))
    return _mirrored(images, down, right)[:, :, top : top + height, left : left + width]


def shift_each(
    images: Float[Tensor, "batch channel height width"], max_shift: int, rng: torch.Generator
) -> Float[Tensor, "batch channel height width"]:
    """Move every image by a random offset of its own, limited as in ``shift_batch``."""
    batch, _, height, width = images.shape
    down, right = _largest_shifts(images, max_shift)
    offsets = torch.randint(2 * max_shift + 1, (2, batch, 1), generator=rng).to(images.device) - max_shift
    rows = offsets[0].clamp(-down, down) + down + torch.arange(height, device=images.device)  # (batch, height)
    columns = offsets[1].clamp(-right, right) + right + torch.arange(width, device=images.device)  # (batch, width)
    index = torch.arange(batch, device=images.device)[:, None, None]
    pixels = _mirrored(images, down, right).permute(0, 2, 3, 1)
    return pixels[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _largest_shifts(images: Tensor, max_shift: int) -> tuple[int, int]:
    """Return the pixels down and to the right that an image can move and still be mirrored at its borders."""
    height, width = images.shape[2:]
    return min(max_shift, height - 1), min(max_shift, width - 1)


def _mirrored(images: Tensor, down: int, right: int) -> Tensor:
    return F.pad(images, [right, right, down, down], mode="reflect")
