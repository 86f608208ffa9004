"""Random generators that depend on a seed and a place alone, so that work can be done anywhere and in any order."""

from enum import IntEnum
from typing import SupportsIndex

import numpy as np
import torch

from qimera.errors import ConfigError

MAX_SEED = (1 << 63) - 1
"""The largest that PyTorch, NumPy and JSON readers take alike."""


class Stream(IntEnum):
    """Where random numbers are drawn that must not depend on what is drawn elsewhere."""

    CLASSES = 0
    GENERATOR = 1
    PARTS = 2
    TRAINING_ALONE = 3
    TRAINING_BESIDE_STUDENT = 4


def check_seed(seed: object) -> int:
    """Return ``seed`` as a plain number, also where NumPy made it.

    Raises:
        ConfigError: no random generator takes it.
    """
    whole = int(seed) if isinstance(seed, SupportsIndex) else -1
    if not 0 <= whole <= MAX_SEED:
        raise ConfigError(f"seed: expected a whole number from 0 to {MAX_SEED}, given {seed!r}")
    return whole


def generator_for(seed: int, *place: int) -> torch.Generator:
    """Return the random generator of one place, independent of those of all other places and seeds."""
    (state,) = np.random.SeedSequence(seed, spawn_key=place).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))
