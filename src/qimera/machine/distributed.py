"""Several processes that make one result together, as ``torchrun`` starts them.

Every process runs the same program. What is to be the same everywhere comes from the main one, which alone writes
files of a run and talks to the user. In a single process these functions do nothing.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qimera.errors import ConfigError, PeerError, QimeraError, first_line

_P = ParamSpec("_P")
_T = TypeVar("_T")


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this is the process that writes files and talks to the user."""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Within, this process works together with those that ``torchrun`` started beside it, if it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    with _naming_lost_peers():
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def from_main(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call ``function`` in the main process alone; return what it returns there, or raise what it raises there."""
    if world_size() == 1:
        return function(*args, **kwargs)
    told: list[tuple[_T | None, QimeraError | None]] = [(None, None)]
    if is_main():
        try:
            told = [(function(*args, **kwargs), None)]
        except QimeraError as error:
            told = [(None, error)]
    with _naming_lost_peers():
        dist.broadcast_object_list(told)
    result, raised = told[0]
    if raised is not None:
        raised.is_told = not is_main()
        raise raised
    return result  # type: ignore[return-value]


def gathered(values: dict[int, _T]) -> dict[int, _T]:
    """Return the values of all processes, by number."""
    if world_size() == 1:
        return values
    found: list[dict[int, _T]] = [{}] * world_size()
    with _naming_lost_peers():
        dist.all_gather_object(found, values)
    return {number: value for part in found for number, value in part.items()}


def own_share(batch_size: int) -> slice:
    """Return which samples of a batch are this process's.

    Raises:
        ConfigError: there are fewer samples than processes.
    """
    if batch_size < world_size():
        raise ConfigError(f"batch_size: {batch_size} samples cannot be shared by {world_size()} processes; start fewer")
    return slice(rank(), None, world_size())


def average_gradients_(parameters: Iterable[Tensor], weight: float = 1.0) -> None:
    """Replace gradients by their weighted mean over all processes; the weights of all add up to their number."""
    if world_size() == 1:
        return
    gradients = [each.grad for each in parameters if each.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).mul_(weight / world_size())
    with _naming_lost_peers():
        dist.all_reduce(flat)
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, mean in zip(gradients, flat.split(sizes), strict=True):
        gradient.copy_(mean.view_as(gradient))


def pooled_variances(parts: Sequence[Tensor], weight: float) -> list[Tensor] | None:
    """Return the variance of each tensor of which every process holds a part; None where this one holds all.

    It is that of ``Tensor.var``, divided by one less than the number of values.

    Args:
        parts: What this process holds of each.
        weight: Of this process; the weights of all add up to their number.
    """
    if world_size() == 1 or not parts:
        return None
    moments = [torch.var_mean(part.float(), correction=0) for part in parts]
    sums = torch.stack([torch.stack([mean, var + mean.square()]) for var, mean in moments]) * (weight / world_size())
    with _naming_lost_peers():
        dist.all_reduce(sums)
    counts = [round(part.numel() * world_size() / weight) for part in parts]
    return [
        (square - mean.square()) * (count / (count - 1)) for (mean, square), count in zip(sums, counts, strict=True)
    ]


@torch.no_grad()
def copy_from_main_(tensors: Iterable[Tensor]) -> None:
    """Give tensors the values that they have in the main process."""
    if world_size() > 1:
        with _naming_lost_peers():
            for tensor in tensors:
                value = tensor.contiguous()
                dist.broadcast(value, 0)
                tensor.copy_(value)


def take_state_of_main_(module: nn.Module) -> None:
    """Give ``module`` the state that it has in the main process, and what its hooks derive from a state."""
    if world_size() > 1:
        state = module.state_dict()
        copy_from_main_(state.values())
        module.load_state_dict(state)


@contextmanager
def _naming_lost_peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # dist.DistError is one too
        raise PeerError(
            f"another process of this run has ended; its own message says why ({first_line(error)})"
        ) from error
