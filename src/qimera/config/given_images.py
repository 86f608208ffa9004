"""Images of the user's that join a bank: how many there are, and a hash by which they are known again."""

import hashlib
from collections.abc import Sequence

from jaxtyping import UInt8
from pydantic import Field
from torch import Tensor

from qimera.config.base import Settings


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


def digests_of(pixels: UInt8[Tensor, "image channel height width"]) -> list[bytes]:
    """Return a hash of each image, by which they are put in order."""
    return [hashlib.sha256(image.contiguous().numpy().tobytes()).digest() for image in pixels]
