"""Tensors of PyTorch -> how they lie in a LiteRT file: axes in another order, reshaped when something reads them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qimera.student.grids import Grid, Levels

Order = tuple[int, ...]

CHANNELS_LAST: Order = (0, 2, 3, 1)


@dataclass(frozen=True)
class Value:
    """A tensor that an operation of the file writes."""

    tensor: int
    """Its number in the file."""

    written: tuple[int, ...]
    """Its shape in the file."""

    shape: tuple[int, ...]
    """The shape that PyTorch sees."""

    order: Order
    """The axes of ``shape`` as they lie in memory."""

    grid: Grid | None = None
    """None for floating point."""

    parts: tuple[int, ...] = ()
    """Sizes (channel, height, width) that were flattened into the last axis, where memory has the channel last."""

    @property
    def stored(self) -> tuple[int, ...]:
        """``shape`` in the order of memory."""
        return tuple(self.shape[axis] for axis in self.order)

    def permuted(self, axes: Sequence[int]) -> "Value":
        """Return what PyTorch sees with its axes in another order; memory stays as it is."""
        place = {axis: index for index, axis in enumerate(axes)}
        return replace(
            self, shape=tuple(self.shape[axis] for axis in axes), order=tuple(place[axis] for axis in self.order)
        )

    def reshaped(self, shape: tuple[int, ...]) -> "Value | None":
        """Return what PyTorch sees in another shape, or None where memory has to be rearranged for it."""
        groups = None if self.parts else _groups(self.shape, shape)
        if groups is None:
            return None
        places = {axis: place for place, axis in enumerate(axis for axis in self.order if self.shape[axis] > 1)}
        starts = []
        for old, new in groups:
            there = [places[axis] for axis in old if axis in places]
            if there and there != list(range(there[0], there[0] + len(there))):
                return None
            starts.append((there[0] if there else -1, new))
        order = [axis for _, new in sorted(starts, key=lambda each: each[0]) for axis in new]
        return replace(self, shape=shape, order=tuple(order))

    def flattened(self, shape: tuple[int, ...]) -> "Value | None":
        """Return channels and positions as one axis, whose order in memory ``parts`` tells."""
        if self.parts or len(self.shape) != 4 or self.order != CHANNELS_LAST or shape != (1, math.prod(self.shape)):
            return None
        return replace(self, shape=shape, order=(0, 1), parts=self.shape[1:])


def _groups(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]] | None:
    """Return which axes of one shape become which of the other, in order; None where their products do not match."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        old, new = list(range(i, min(i + 1, len(before)))), list(range(j, min(j + 1, len(after))))
        i, j = i + len(old), j + len(new)
        while (left := math.prod(before[axis] for axis in old)) != (right := math.prod(after[axis] for axis in new)):
            if left < right and i < len(before):
                old.append(i)
                i += 1
            elif j < len(after):
                new.append(j)
                j += 1
            else:
                return None
        groups.append((old, new))
    return groups


@dataclass(frozen=True)
class Constant:
    """A tensor that depends on no image; on a grid if ``levels`` say which."""

    array: np.ndarray
    """The numbers, or the levels of uint8."""

    levels: Levels | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.array.shape


@dataclass(frozen=True)
class Deferred:
    """A tensor that is not written yet, since its grid depends on what reads it."""

    shape: tuple[int, ...]
    write: Callable[[Levels | None], Value]
    """Writes the operation, whose result is then on these levels, or in floating point."""

    low: float = -math.inf
    high: float = math.inf

    def clipped(self, low: float, high: float) -> "Deferred":
        """Return it behind a clip."""
        return replace(self, low=max(self.low, low), high=min(self.high, high))


Tensor = Value | Constant | Deferred
