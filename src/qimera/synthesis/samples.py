"""Some samples of a bank, and batches of them without end."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Some samples of a bank."""

    images: Float[Tensor, "batch channel height width"]
    """Normalised."""
    soft_labels: Float[Tensor, "batch num_classes"]
    logits: Float[Tensor, "batch num_classes"]
    """The teacher's."""

    def to(self, device: torch.device) -> "Samples":
        """Return them on ``device``; a GPU fetches them while the processor goes on."""
        parts = [self.images, self.soft_labels, self.logits]
        if device.type == "cuda":
            parts = [part.pin_memory() for part in parts]
        return Samples(*(part.to(device, non_blocking=True) for part in parts))


class Batches(Iterator[Samples]):
    """Batches of a bank's training samples without end; with the random generator, ``order`` says which come next."""

    def __init__(
        self, take: Callable[[Tensor], Samples], num_samples: int, batch_size: int, rng: torch.Generator
    ) -> None:
        self._take, self._num_samples, self._batch_size, self._rng = take, num_samples, batch_size, rng
        self.order = torch.empty(0, dtype=torch.int64)
        """Positions of samples that are drawn already and not yet used."""

    def __next__(self) -> Samples:
        if len(self.order) < self._batch_size:
            self.order = torch.cat([self.order, torch.randperm(self._num_samples, generator=self._rng)])
        chosen, self.order = self.order[: self._batch_size], self.order[self._batch_size :]
        return self._take(chosen)
