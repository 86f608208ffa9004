"""Latents -> images inside the valid pixel range, of any height and width."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from qimera.input_spec import InputSpec


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
    """The generator of GDFQ and Qimera: a linear layer, then two doublings of the resolution.

    Sizes that are no multiple of four are reached by upsampling to the exact size (deviation D22). The last batch norm
    gives images the mean and variance of normalised ones; a tanh after it bends their extremes into the valid pixel
    range (deviation D4).
    """

    def __init__(
        self, latent_dim: int, input_spec: InputSpec, base_channels: int, num_classes: int, *, conditional: bool
    ) -> None:
        super().__init__()
        channels, height, width = input_spec.shape
        self.sizes = [(-(-height // step), -(-width // step)) for step in (4, 2, 1)]
        self.base_channels = base_channels
        half = base_channels // 2
        self.linear = nn.Linear(latent_dim, base_channels * self.sizes[0][0] * self.sizes[0][1])
        self.conv1 = nn.Conv2d(base_channels, base_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(base_channels, half, 3, padding=1)
        self.conv3 = nn.Conv2d(half, channels, 3, padding=1)

        def norm(width: int) -> nn.Module:
            return ClassConditionalBatchNorm(width, num_classes) if conditional else _SharedBatchNorm(width)

        self.norm0, self.norm1, self.norm2 = norm(base_channels), norm(base_channels), norm(half)
        self.norm3 = nn.BatchNorm2d(channels, affine=False)
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
        x = self.linear(latent).view(-1, self.base_channels, *self.sizes[0])
        x = F.interpolate(self.norm0(x, soft_label), size=self.sizes[1])
        x = F.leaky_relu(self.norm1(self.conv1(x), soft_label), 0.2)
        x = F.interpolate(x, size=self.sizes[2])
        x = F.leaky_relu(self.norm2(self.conv2(x), soft_label), 0.2)
        normalised = self.mean + self.std * self.norm3(self.conv3(x))
        return self.centre + self.radius * torch.tanh((normalised - self.centre) / self.radius)
