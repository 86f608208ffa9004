"""Random blends, flips and shifts of a batch, drawn from a given random generator."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def flip_at_random(
    images: Float[Tensor, "batch channel height width"], generator: torch.Generator
) -> Float[Tensor, "batch channel height width"]:
    """Mirror about half of the images left to right."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device) < 0.5
    return torch.where(mirrored, images.flip(3), images)


def blend_at_random(
    images: Float[Tensor, "batch channel height width"],
    soft_labels: Float[Tensor, "batch num_classes"],
    probability: float,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "batch channel height width"], Float[Tensor, "batch num_classes"]]:
    """Blend some of the images, and their labels, with another image of the batch, which gets at most half the weight.

    Superposition once more, in the space of images (mixup, Zhang et al. 2018; deviation D24): it costs nothing and
    fills the space between the samples of a small bank.
    """
    share = 0.5 * torch.rand(len(images), 1, generator=generator)
    share *= torch.rand(len(images), 1, generator=generator) < probability
    share = share.to(images.device)
    labels = torch.lerp(soft_labels, soft_labels.flip(0), share)
    return torch.lerp(images, images.flip(0), share[:, :, None, None]), labels


def shift_batch(
    images: Float[Tensor, "batch channel height width"], max_shift: int, generator: torch.Generator
) -> Float[Tensor, "batch channel height width"]:
    """Move the whole batch by one random offset of at most ``max_shift`` pixels each way, mirroring at the borders."""
    height, width = images.shape[2:]
    top, left = torch.randint(2 * max_shift + 1, (2,), generator=generator).tolist()
    return F.pad(images, [max_shift] * 4, mode="reflect")[:, :, top : top + height, left : left + width]


def shift_each(
    images: Float[Tensor, "batch channel height width"], max_shift: int, generator: torch.Generator
) -> Float[Tensor, "batch channel height width"]:
    """Move every image by a random offset of its own of at most ``max_shift`` pixels each way."""
    batch, _, height, width = images.shape
    offsets = torch.randint(2 * max_shift + 1, (2, batch, 1), generator=generator).to(images.device)
    rows = offsets[0] + torch.arange(height, device=images.device)  # (batch, height)
    columns = offsets[1] + torch.arange(width, device=images.device)  # (batch, width)
    padded = F.pad(images, [max_shift] * 4, mode="reflect")
    index = torch.arange(batch, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
