"""A teacher and two of its classes -> samples between them, as the superposition weight moves."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from qimera.synthesis.bank import SampleBank
from qimera.synthesis.direct import noise_images, optimize_images
from qimera.synthesis.superposition import soft_labels
from qimera.teacher.teacher import Teacher

NUM_SHARES = 7
_COPIES = 8
"""Samples optimised together for each share, because batch-norm statistics of a few samples say little."""

_FEW_COPIES = 2
"""The same where images are large, or where there are no batch norms."""

_MOST_STEPS = 80


@dataclass(frozen=True)
class BoundaryWalk:
    """Samples from one class to another."""

    first: int
    second: int
    shares: Float[Tensor, " step"]
    """Share of the second class that each sample is made for."""
    pixels: UInt8[Tensor, "step channel height width"]
    probabilities: Float[Tensor, "step two"]
    """Probabilities of both classes, according to the teacher."""


def nearest_classes(bank: SampleBank) -> tuple[int, int]:
    """Return the two classes that the teacher confuses most."""
    shared = _shared_probability(bank)
    first, second = divmod(int(shared.argmax()), len(shared))
    return min(first, second), max(first, second)


def nearest_three(bank: SampleBank) -> list[int]:
    """Return ``nearest_classes`` and, if there is one, the class that the teacher confuses most with either of them."""
    first, second = nearest_classes(bank)
    shared = _shared_probability(bank)
    third = shared[first] + shared[second]
    third[[first, second]] = -1
    return sorted({first, second, int(third.argmax())})


def _shared_probability(bank: SampleBank) -> Float[Tensor, "num_classes num_classes"]:
    """Return how much probability each pair of classes has on the same samples; -1 for a class and itself."""
    answer = bank.logits.softmax(1)
    return (answer.T @ answer).fill_diagonal_(-1)


def walk_between(first: int, second: int, teacher: Teacher, bank: SampleBank) -> BoundaryWalk:
    """Return samples optimised for shares between both classes, from one noise and with the settings of the bank."""
    copies = _COPIES if teacher.batch_norms and not bank.input_spec.has_large_images else _FEW_COPIES
    rng = torch.Generator().manual_seed(0)
    shares = torch.linspace(0, 1, NUM_SHARES)
    label = torch.tensor([[first, second]]).expand(NUM_SHARES, 2)
    wanted = soft_labels(label, torch.stack([1 - shares, shares], 1), teacher.num_classes).repeat(copies, 1)
    direct = bank.settings.direct
    direct = direct.model_copy(update={"num_steps": min(direct.num_steps, _MOST_STEPS), "compile": "never"})
    noise = noise_images(copies, teacher.input_spec.shape, direct.num_scales, rng)
    images = optimize_images(noise.repeat_interleave(NUM_SHARES, 0), wanted, teacher, direct, rng)[:NUM_SHARES]
    with torch.no_grad():
        answer = teacher(images).softmax(1)
    return BoundaryWalk(first, second, shares, teacher.input_spec.to_pixels(images), answer[:, [first, second]])
