"""Levels of a student's quantizer, counted from 0 -> the int8 grid of a LiteRT tensor, placed where clips are free."""

import math
from dataclasses import dataclass, replace

import numpy as np

from qimera.errors import UnsupportedModelError

LOWEST, HIGHEST = -128, 127


@dataclass(frozen=True)
class Levels:
    """What a quantizer of the student says: the levels that it uses, of uint8."""

    step: float
    zero_point: int
    low: int
    high: int

    def clipped(self, low: float, high: float) -> "Levels":
        """Return the levels that are left behind a clip to ``low`` and ``high``, since rounding keeps the order."""
        inverse = np.float32(1) / np.float32(self.step)
        with np.errstate(over="ignore"):
            bounds = [float(np.rint(np.float32(each) * inverse)) + self.zero_point for each in (low, high)]
        lowest, highest = (int(min(max(each, self.low), self.high)) for each in bounds)
        return replace(self, low=lowest, high=highest)

    def rounded(self, numbers: np.ndarray) -> np.ndarray:
        """Return the numbers on the levels that are nearest to these."""
        levels = np.rint(numbers / np.float32(self.step)) + self.zero_point
        return (levels.clip(self.low, self.high) - self.zero_point) * np.float32(self.step)


@dataclass(frozen=True)
class Grid:
    """The grid of an int8 tensor in a file: ``scale * (integer - zero_point)``, in a unit of its own."""

    scale: float
    zero_point: int
    levels: Levels
    activation: str = "NONE"
    """The fused activation function that clips to the levels, for what writes the tensor."""

    @property
    def offset(self) -> int:
        """What is added to a level of uint8."""
        return self.zero_point - self.levels.zero_point

    @property
    def unit(self) -> float:
        """The file's unit of this tensor in that of the student; other than 1 only where an activation needs it."""
        return self.scale / self.levels.step

    @property
    def plain(self) -> "Grid":
        """The same integers in the student's unit, for operations that cannot clip to both ends."""
        return replace(self, scale=self.levels.step, activation="NONE")


def grid_of(levels: Levels) -> Grid:
    """Return the grid on which kernels clip to ``levels`` by themselves.

    Integers saturate at the ends of int8, so one end of a narrow grid is put there. The other end is clipped by an
    activation function: that of an unsigned grid by ReLU; that of a signed grid by the clip to -1 and 1, of which the
    farther end from zero is made 1.
    """
    below, above = levels.zero_point - levels.low, levels.high - levels.zero_point
    if below + above >= HIGHEST - LOWEST:
        return _placed(levels, LOWEST - levels.low)
    if below == 0:
        return _placed(levels, HIGHEST - levels.high, "RELU")
    if below < 0 or above < 0:
        raise UnsupportedModelError("LiteRT's kernels clip to ranges that hold zero; this model clips to another one")
    offset = LOWEST - levels.low if above >= below else HIGHEST - levels.high
    return replace(_placed(levels, offset, "RELU_N1_TO_1"), scale=1 / max(below, above))


def _placed(levels: Levels, offset: int, activation: str = "NONE") -> Grid:
    return Grid(levels.step, levels.zero_point + offset, levels, activation)


def widening(levels: np.ndarray, bias: np.ndarray | None, limit: int) -> int:
    """Return the largest power of two by which weights of few bits fit int8 without -128, and biases ``limit``.

    Kernels that multiply by a fixed-point number and round twice are more exact for larger sums.
    """
    room = HIGHEST / max(1, int(np.abs(levels.astype(np.int32)).max(initial=0)))
    if bias is not None:
        room = min(room, limit / max(1, int(np.abs(bias.astype(np.int64)).max(initial=0))))
    return 1 << max(0, math.floor(math.log2(room))) if room >= 1 else 1
