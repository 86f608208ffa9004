"""Maps that enter a block -> random crops of them, and what the reference makes of these."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import GraphModule

_SIZE = 16
"""Positions of a crop's height and width, counted behind the block."""


class Crops:
    """Draws crops of what enters a block in the student and, at the same places, in the reference.

    Crops are padded as images are, which the outermost positions show; these are left out unless a crop is a whole map.

    Args:
        mine: What enters the student's block.
        theirs: What enters the reference's.
        reference: The block in full precision.
        rng: Draws samples and places.
    """

    def __init__(
        self,
        mine: Float[Tensor, "batch channel height width"],
        theirs: Float[Tensor, "batch channel height width"],
        reference: GraphModule,
        rng: torch.Generator,
    ) -> None:
        self._mine, self._theirs, self._reference, self._rng = mine, theirs, reference, rng
        with torch.no_grad():
            sample = reference(theirs[:8])
        self.variance = float(sample.var((0, 2, 3)).sum()) + 1e-12
        """Variance of what the block returns, added up over channels."""
        sizes = list(zip(mine.shape[2:], sample.shape[2:], strict=True))
        self._strides = [max(1, round(entering / leaving)) for entering, leaving in sizes]
        self._sizes = [min(mine.shape[2 + axis], _SIZE * stride) for axis, stride in enumerate(self._strides)]
        inner = [slice(1, -1) if size < mine.shape[2 + axis] else slice(None) for axis, size in enumerate(self._sizes)]
        self._inside = (slice(None), slice(None), *inner)

    @torch.no_grad()
    def draw(self, count: int) -> tuple[Tensor, Tensor, tuple[slice, ...]]:
        """Return ``count`` crops of what enters, what should come out, and which of its positions count."""
        chosen = torch.randint(len(self._mine), (count,), generator=self._rng).tolist()
        places = []
        for axis, (size, stride) in enumerate(zip(self._sizes, self._strides, strict=True)):
            num_places = (self._mine.shape[2 + axis] - size) // stride + 1
            places.append((stride * torch.randint(num_places, (count,), generator=self._rng)).tolist())
        height, width = self._sizes
        drawn = list(zip(chosen, *places, strict=True))
        entering = [
            torch.stack([maps[sample, :, y : y + height, x : x + width] for sample, y, x in drawn])
            for maps in (self._mine, self._theirs)
        ]
        mine, theirs = (each.contiguous(memory_format=torch.channels_last) for each in entering)
        return mine, self._reference(theirs), self._inside
