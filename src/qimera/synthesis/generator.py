"""Latents -> images inside the valid pixel range, of any height and width."""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from qimera.input_spec import InputSpec
from qimera.settings import GeneratorSettings

_FEWEST_CHANNELS = 8
_FEWEST_PIXELS = 4


class ClassConditionalBatchNorm(nn.Module):
    """Batch norm whose scale and shift are the label-weighted sum of each class's own (deviation D3)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.scale = nn.Parameter(torch.ones(num_classes, channels))
        self.shift = nn.Parameter(torch.zeros(num_classes, channels))

    def forward(
        self, x: Float[Tensor, "batch channel height width"], soft_label: Float[Tensor, "batch num_classes"]
    ) -> Float[Tensor, "batch channel height width"]:
        """Return the normalised ``x``, scaled and shifted for its sample's mixture of classes."""
        scale, shift = soft_label @ self.scale, soft_label @ self.shift  # (batch, channel)
        normalised: Tensor = self.norm(x)
        return normalised * scale[:, :, None, None] + shift[:, :, None, None]


class _SharedBatchNorm(nn.BatchNorm2d):
    """Batch norm that ignores the label, for few classes; its constant is PyTorch's, not 0.8 (deviation D21)."""

    def forward(self, x: Tensor, soft_label: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class Generator(nn.Module):
    """The generator of GDFQ and Qimera: a linear layer, then doublings of the resolution.

    They make two; with more of them the channels are halved once more at each, so that few are left where pixels are
    many (deviation D32). Sizes that are no multiples are reached by upsampling to the exact size (deviation D22). The
    last batch norm gives images the mean and variance of normalised ones; a tanh after it bends their extremes into the
    valid pixel range (deviation D4).
    """

    def __init__(self, latent_dim: int, input_spec: InputSpec, settings: GeneratorSettings, num_classes: int) -> None:
        super().__init__()
        channels, height, width = input_spec.shape
        doublings = settings.num_doublings or _doublings(min(height, width))
        self.sizes = [(-(-height // 2**level), -(-width // 2**level)) for level in range(doublings, -1, -1)]
        self.base_channels = first = settings.base_channels
        widths = [first, *(max(_FEWEST_CHANNELS, first >> level) for level in range(doublings))]
        self.linear = nn.Linear(latent_dim, first * self.sizes[0][0] * self.sizes[0][1])
        self.convs = nn.ModuleList(nn.Conv2d(*pair, 3, padding=1) for pair in pairwise(widths))
        self.last_conv = nn.Conv2d(widths[-1], channels, 3, padding=1)
        conditional = num_classes >= settings.conditional_norm_from

        def norm(width: int) -> nn.Module:
            return ClassConditionalBatchNorm(width, num_classes) if conditional else _SharedBatchNorm(width)

        self.first_norm, self.norms = norm(first), nn.ModuleList(norm(width) for width in widths[1:])
        self.last_norm = nn.BatchNorm2d(channels, affine=False)
        self.register_buffer("centre", (input_spec.low + input_spec.high) / 2)
        self.register_buffer("radius", (input_spec.high - input_spec.low) / 2)
        # Pixels that training did not normalise have another mean and spread: the middle and a quarter of their range.
        usual = (input_spec.low < 0) & (input_spec.high > 0) & (self.radius < 8)
        self.register_buffer("mean", torch.where(usual, 0.0, self.centre), persistent=False)
        self.register_buffer("std", torch.where(usual, 1.0, self.radius / 2), persistent=False)

    centre: Tensor
    radius: Tensor
    mean: Tensor
    std: Tensor

    def forward(
        self, latent: Float[Tensor, "batch latent"], soft_label: Float[Tensor, "batch num_classes"]
    ) -> Float[Tensor, "batch channel height width"]:
        """Return one normalised image per latent."""
        x = self.first_norm(self.linear(latent).view(-1, self.base_channels, *self.sizes[0]), soft_label)
        for size, conv, norm in zip(self.sizes[1:], self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(F.interpolate(x, size=size)), soft_label), 0.2)
        normalised = self.mean + self.std * self.last_norm(self.last_conv(x))
        return self.centre + self.radius * torch.tanh((normalised - self.centre) / self.radius)


def _doublings(side: int) -> int:
    """Return how many lead to ``side`` pixels from as few as are allowed."""
    return max(1, (side // _FEWEST_PIXELS).bit_length() - 1)
