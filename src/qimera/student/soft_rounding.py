"""A weight on its grid -> one that may lie between its integers and the next ones, and that a training moves."""

import torch
from jaxtyping import Float
from torch import Tensor

from qimera.quantization.fake_quantize import Levels

_START = 0.3
"""Share of its rounding error that a weight starts away from its integer."""

_STRETCH = 0.1
"""How far the sigmoid reaches beyond 0 and 1, so that both can be arrived at (Louizos et al. 2018)."""


class SoftRounding:
    """A weight of which every entry lies between its integer and the next one on the side of its real value.

    Args:
        weight: On the grid.
        real: What it was before it was rounded.
        scale: Step of the grid, one or one per channel.
        low: Lowest integer.
        high: Highest integer.
    """

    def __init__(
        self, weight: Float[Tensor, "..."], real: Float[Tensor, "..."], scale: Tensor, low: Levels, high: Levels
    ) -> None:
        self._integers, self._scale = (weight / scale).round(), scale
        missing = real / scale - self._integers
        side = torch.where(missing >= 0, 1.0, -1.0)
        beyond = self._integers + side
        self._side = torch.where((beyond < low) | (beyond > high), -side, side)
        start = (missing * self._side).clamp(0, 1) * _START
        stretched = (start.clamp(0.005, 0.995) + _STRETCH) / (1 + 2 * _STRETCH)
        self.undecided = stretched.logit().requires_grad_()
        """What is trained; its stretched sigmoid is the share of the way to the next integer."""

    def share(self) -> Float[Tensor, "..."]:
        """Return how far each entry is on its way to the next integer, from 0 to 1."""
        return (self.undecided.sigmoid() * (1 + 2 * _STRETCH) - _STRETCH).clamp(0, 1)

    def between(self) -> Float[Tensor, "..."]:
        """Return the weight as it is now, in full precision."""
        return self._scale * (self._integers + self._side * self.share())

    def rounded(self) -> Float[Tensor, "..."]:
        """Return the weight on its grid: every entry at the integer that is nearer."""
        return self._scale * (self._integers + self._side * (self.share().detach() >= 0.5))

    def pull(self, sharpness: float) -> Float[Tensor, "..."]:
        """Return the gradient of the regulariser, the sum of 1 - |2 share - 1| ** sharpness (AdaRound)."""
        away = 1 - (2 * self.share() - 1).abs() ** sharpness
        (gradient,) = torch.autograd.grad(away.sum(), self.undecided)
        return gradient
