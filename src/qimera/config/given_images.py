"""Images of the user's that join a bank: how many there are, and a hash by which they are known again."""

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import UInt8
from pydantic import Field
from torch import Tensor

from qimera.config.base import Settings
from qimera.config.input_spec import InputSpec
from qimera.errors import ConfigError


class GivenImages(Settings):
    """What is remembered of the user's images; never the images themselves."""

    count: int = Field(ge=1)
    """Images."""

    sha256: str
    """Over the pixels that the model sees, whatever the files are called and in whatever order they come."""

    kept: bool = False
    """Whether the bank on disk holds the images."""

    @classmethod
    def of(cls, pixels: UInt8[Tensor, "image channel height width"], *, kept: bool = False) -> "GivenImages":
        """Return what is remembered of these images."""
        return cls.of_digests(digests_of(pixels), kept=kept)

    @classmethod
    def of_digests(cls, digests: Sequence[bytes], *, kept: bool = False) -> "GivenImages":
        """Return what is remembered of images with these hashes, in any order."""
        return cls(count=len(digests), sha256=hashlib.sha256(b"".join(sorted(digests))).hexdigest(), kept=kept)

    def text(self) -> str:
        """Return what a message calls them."""
        images = "1 image" if self.count == 1 else f"{self.count:,} images"
        return f"{images} of yours (SHA-256 {self.sha256[:12]})"


def checked_pixels(images: object, input_spec: InputSpec) -> UInt8[Tensor, "image channel height width"]:
    """Return images of the user's, from whatever device, on the CPU.

    Raises:
        ConfigError: they are no pixels of the shape that the model takes.
    """
    if not isinstance(images, Tensor):
        raise ConfigError(
            f"images: expected a tensor of pixels (torch.uint8; image, channel, height, width), given "
            f"{type(images).__name__}; give what load_images returns, or for a NumPy array (image, height, width, "
            "channel) torch.from_numpy(images).permute(0, 3, 1, 2)"
        )
    if images.dtype != torch.uint8:
        raise ConfigError(f"images: expected pixels from 0 to 255 (torch.uint8), given {images.dtype}")
    if tuple(images.shape[1:]) != input_spec.shape or not len(images):
        raise ConfigError(f"images: expected one or more of shape {input_spec.shape}, given {tuple(images.shape)}")
    return images.cpu()


def digests_of(pixels: UInt8[Tensor, "image channel height width"]) -> list[bytes]:
    """Return a hash of each image, by which they are put in order."""
    return [hashlib.sha256(image.contiguous().numpy().tobytes()).digest() for image in pixels]
