"""Random draws -> which classes each synthetic sample mixes, in which shares, and the label that follows."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qimera.config.settings import LabelSettings


def take_turns(num_samples: int, num_classes: int, rng: torch.Generator) -> Int[Tensor, " sample"]:
    """Return one class for each sample: all of them, in random order, before any comes again (deviation D8)."""
    num_rounds = -(-num_samples // num_classes)
    return torch.cat([torch.randperm(num_classes, generator=rng) for _ in range(num_rounds)])[:num_samples]


def draw_mixtures(
    first: Int[Tensor, " batch"], num_classes: int, settings: LabelSettings, rng: torch.Generator
) -> tuple[Int[Tensor, "batch k"], Float[Tensor, "batch k"]]:
    """Return the classes mixed into each sample and the share of each; a plain sample has all weight on its first.

    Shares are the softmax of K standard normal numbers and classes may repeat, as in the code of Choi et al. 2021.
    Each sample decides for itself whether it is superposed (deviation D6).

    Args:
        first: The first class of each sample, as from ``take_turns``.
        num_classes: How many there are.
        settings: How many are mixed, and how often.
        rng: Draws the other classes and the shares.
    """
    num_samples = len(first)
    k = settings.num_superposed_classes if settings.superposition else 1
    label = torch.randint(num_classes, (num_samples, k), generator=rng)
    label[:, 0] = first
    weight = torch.randn(num_samples, k, generator=rng).softmax(1)
    draws = torch.rand(num_samples if settings.per_sample else 1, generator=rng)
    plain = (draws >= settings.superposition_probability).expand(num_samples)
    weight[plain] = torch.eye(k)[0]
    return label, weight


def superpose(
    latent: Float[Tensor, "batch k latent"], weight: Float[Tensor, "batch k"]
) -> Float[Tensor, "batch latent"]:
    """Return the weighted sum of each sample's K class latents (Choi et al. 2021, superposed latent embeddings)."""
    return torch.einsum("bkl,bk->bl", latent, weight)


def soft_labels(
    label: Int[Tensor, "batch k"], weight: Float[Tensor, "batch k"], num_classes: int
) -> Float[Tensor, "batch num_classes"]:
    """Return the class probabilities that the teacher should give to each sample.

    A class drawn twice receives the sum of its weights.

    Args:
        label: Classes mixed into each sample, in ``[0, num_classes)``, repeats allowed.
        weight: Share of each class; every row sums to 1.
        num_classes: Width of the result.
    """
    target = weight.new_zeros(label.shape[0], num_classes)
    return target.scatter_add_(1, label, weight)


_ONE_CLASS = 0.999
"""Share of its class in the label of a sample of one class."""


def shows_one_class(soft_label: Float[Tensor, "sample num_classes"]) -> Bool[Tensor, " sample"]:
    """Return which samples are to show one class; the others are superposed."""
    return soft_label.amax(1) > _ONE_CLASS
