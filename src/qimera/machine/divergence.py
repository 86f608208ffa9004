"""Losses that are no numbers any more -> an error that says which, and what to do."""

import torch
from torch import Tensor

from qimera.errors import DivergenceError
from qimera.machine.progress import is_reported


def are_read(losses: dict[str, Tensor], step: int, last: int) -> bool:
    """Return whether losses are looked at after this step; a GPU is not waited for at every one."""
    return is_reported(step, last) or not any(loss.is_cuda for loss in losses.values())


def check_finite(losses: dict[str, Tensor], step: int, last: int) -> dict[str, Tensor]:
    """Return ``losses``; raise DivergenceError naming the term and the step when one is NaN or infinite.

    Where losses are not read at every step: what is NaN once stays so.
    """
    if not are_read(losses, step, last):
        return losses
    if not torch.isfinite(sum(losses.values(), torch.zeros(()))):
        name = next(name for name, value in losses.items() if not torch.isfinite(value))
        raise DivergenceError(
            f"{name} became {float(losses[name])} at step {step}; lower the learning rate of this stage, "
            "or check mean and std if it happened in the first steps"
        )
    return losses
