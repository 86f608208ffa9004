"""Latents -> images inside the valid pixel range, of any height and width."""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from qimera.config.input_spec import InputSpec
from qimera.config.settings import GeneratorSettings
from qimera.machine.acceleration import at_least_float32
from qimera.synthesis.pixels import enlarged, within_limits

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
    many (deviation D32). Sizes that are no multiples are reached by upsampling to the exact size (deviation D22). Every
    resolution adds an image of its own to the result (deviation D33). The last batch norm gives images the mean and
    variance of normalised ones; pixels beyond black and white are clamped (deviation D4).
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
        coarse = widths[:-1] if settings.sum_of_scales else []
        self.to_pixels = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in coarse)
        self.register_buffer("low", input_spec.low)
        self.register_buffer("high", input_spec.high)
        # Pixels that training did not normalise have another mean and spread: the middle and a quarter of their range.
        centre, radius = (self.low + self.high) / 2, (self.high - self.low) / 2
        usual = (self.low < 0) & (self.high > 0) & (radius < 8)
        self.register_buffer("mean", torch.where(usual, 0.0, centre), persistent=False)
        self.register_buffer("std", torch.where(usual, 1.0, radius / 2), persistent=False)

    low: Tensor
    high: Tensor
    mean: Tensor
    std: Tensor

    def forward(
        self, latent: Float[Tensor, "batch latent"], soft_label: Float[Tensor, "batch num_classes"]
    ) -> Float[Tensor, "batch channel height width"]:
        """Return one normalised image per latent."""
        x = self.first_norm(self.linear(latent).view(-1, self.base_channels, *self.sizes[0]), soft_label)
        coarse = []
        for level, (size, conv, norm) in enumerate(zip(self.sizes[1:], self.convs, self.norms, strict=True)):
            if self.to_pixels:
                coarse.append(self.to_pixels[level](x))
            assert isinstance(conv, nn.Conv2d)
            x = F.leaky_relu(norm(convolve_enlarged(x, size, conv), soft_label), 0.2)
        images = at_least_float32(sum((enlarged(each, self.sizes[-1]) for each in coarse), self.last_conv(x)))
        return within_limits(self.mean + self.std * self.last_norm(images), self.low, self.high)


def convolve_enlarged(
    x: Float[Tensor, "batch channel height width"], size: tuple[int, int], conv: nn.Conv2d
) -> Float[Tensor, "batch new_channel new_height new_width"]:
    """Return ``conv``, 3 x 3 with padding 1, of ``x`` enlarged to ``size`` by its nearest pixels.

    To double the size and then convolve is one transposed convolution, whose 4 x 4 weights are sums of the 3 x 3 ones:
    4 multiply-adds for each value and input channel instead of 9.
    """
    if size != (2 * x.shape[2], 2 * x.shape[3]):
        return conv(F.interpolate(x, size=size))  # type: ignore[no-any-return]
    sums = F.avg_pool2d(conv.weight.flip(2, 3), 2, stride=1, padding=1, divisor_override=1)
    return F.conv_transpose2d(x, sums.transpose(0, 1), conv.bias, stride=2, padding=1)


def _doublings(side: int) -> int:
    """Return how many lead to ``side`` pixels from as few as are allowed."""
    return max(1, (side // _FEWEST_PIXELS).bit_length() - 1)
