"""What images a classifier takes: their shape, and how pixels become its normalised input."""

import torch
from pydantic import model_validator
from torch import Tensor

from qimera.config.base import Settings

IMAGE_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""What Pillow calls images of so many channels."""

_LARGE_IMAGE = 96 * 96
"""Pixels of an image from which recipes make fewer samples."""


class InputSpec(Settings):
    """What the classifier expects: one image's shape and how its pixels were normalised in training."""

    shape: tuple[int, int, int]
    """Channels (1 to 4), height and width (8 or more) of one image."""

    mean: tuple[float, ...]
    """Per-channel mean subtracted from pixels, in the unit of ``pixel_range``."""

    std: tuple[float, ...]
    """Per-channel divisor after the mean, in the unit of ``pixel_range``."""

    pixel_range: tuple[float, float] = (0.0, 1.0)
    """Darkest and brightest value that a pixel can take before normalisation."""

    @property
    def has_large_images(self) -> bool:
        """Whether images are so large that recipes make fewer samples."""
        return self.shape[1] * self.shape[2] >= _LARGE_IMAGE

    @model_validator(mode="after")
    def _check(self) -> "InputSpec":
        channels, height, width = self.shape
        if not 1 <= channels <= 4 or min(height, width) < 8:
            turned = (width, channels, height)
            likely = f"; did you mean {_listed(turned)}?" if 1 <= width <= 4 and min(channels, height) >= 8 else ""
            raise ValueError(
                f"shape must be channels (1 to 4), height and width (at least 8), given {_listed(self.shape)}{likely}"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels:
                raise ValueError(
                    f"{name} must have one value per channel ({channels}), given {len(values)}: {_listed(values)}"
                )
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, given {_listed(self.std)}")
        low, high = self.pixel_range
        if low >= high:
            raise ValueError(f"pixel_range must be LOW,HIGH with LOW < HIGH, given {_listed(self.pixel_range)}")
        self._check_units(low, high)
        return self

    def _check_units(self, low: float, high: float) -> None:
        """Refuse a mean or std that pixels of this range cannot have; a std of 1 (no scaling) is always allowed."""
        outside = [value for value in self.mean if not low <= value <= high]
        too_wide = [value for value in self.std if value > max(high - low, 1.0)]
        if not outside and not too_wide:
            return
        name, values = ("mean", self.mean) if outside else ("std", self.std)
        likely = next((each for each in _COMMON_RANGES if self._fits(*each)), None)
        advice = f"did you mean pixel_range {_listed(likely)}?" if likely else "give all in one unit"
        raise ValueError(
            f"{name} {_listed(values)} cannot be that of pixels from {low:g} to {high:g} "
            f"(pixel_range {low:g},{high:g}); {advice}"
        )

    def _fits(self, low: float, high: float) -> bool:
        return all(low <= value <= high for value in self.mean) and max(self.std) <= high - low

    @property
    def low(self) -> Tensor:
        """Normalised value of the darkest pixel, shape (channel, 1, 1)."""
        return (self.pixel_range[0] - _column(self.mean)) / _column(self.std)

    @property
    def high(self) -> Tensor:
        """Normalised value of the brightest pixel, shape (channel, 1, 1)."""
        return (self.pixel_range[1] - _column(self.mean)) / _column(self.std)

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 pixels (batch, channel, height, width), 0 darkest and 255 brightest -> normalised float32."""
        low, high = self.low.to(pixels.device), self.high.to(pixels.device)
        return low + pixels.float() * ((high - low) / 255)

    def to_pixels(self, images: Tensor) -> Tensor:
        """Normalised images (batch, channel, height, width) -> the nearest uint8 pixels."""
        low, high = self.low.to(images.device), self.high.to(images.device)
        return ((images - low) * (255 / (high - low))).round().clamp(0, 255).to(torch.uint8)


_COMMON_RANGES = ((0.0, 1.0), (0.0, 255.0), (-1.0, 1.0), (0.0, 65535.0))


def _listed(values: tuple[int | float, ...]) -> str:
    """Return numbers as the command line takes them."""
    return ",".join(f"{value:g}" for value in values)


def _column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)
