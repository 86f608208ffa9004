"""Samples, images that a network was trained on and images that it was not: are the samples nearer to the first?

If a bank does not depend on which images were trained on, then trained and other images can be swapped without anyone
noticing. So the labels of all images are shuffled many times, and what was found is compared with what is found then
(a permutation test). It is exact for dependent samples too, such as many whose nearest image is the same. A few copies
would not move that mean. They would stand out: nearer to one image than to any other.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

_CHUNK = 2000


@dataclass(frozen=True)
class Neighbours:
    """The nearest images of each sample, trained and other ones together, nearest first."""

    distance: Float[Tensor, "sample rank"]
    index: Int64[Tensor, "sample rank"]


def nearest(samples: Float[Tensor, "sample feature"], images: Float[Tensor, "image feature"], ranks: int) -> Neighbours:
    """Return the ``ranks`` nearest of ``images`` to each sample, by the root of the mean squared difference."""
    found = Neighbours(torch.empty(len(samples), 0), torch.empty(len(samples), 0, dtype=torch.int64))
    size = samples.shape[1] ** 0.5
    for start in range(0, len(images), _CHUNK):
        part = images[start : start + _CHUNK].float()
        distance = torch.cat([found.distance, torch.cdist(samples, part) / size], 1)
        index = torch.arange(start, start + len(part)).expand(len(samples), -1)
        kept = distance.topk(min(ranks, distance.shape[1]), largest=False)
        found = Neighbours(kept.values, torch.cat([found.index, index], 1).gather(1, kept.indices))
    return found


def gaps(found: Neighbours, is_trained: Bool[Tensor, " image"]) -> Float[Tensor, " sample"]:
    """Return how much further the nearest other image is than the nearest trained one, as a logarithm of the ratio.

    Of the larger set, the expected nearest image of a random subset counts that is as large as the smaller set: with a
    share of q taken, the nearest one taken is the one of rank i with probability q * (1 - q) ** (i - 1).
    """
    counts = int(is_trained.sum()), int((~is_trained).sum())
    member = is_trained[found.index]
    log_distance = found.distance.clamp(min=1e-6).log()
    trained = _expected_nearest(log_distance, member, min(counts) / counts[0])
    other = _expected_nearest(log_distance, ~member, min(counts) / counts[1])
    return other - trained


def _expected_nearest(
    log_distance: Float[Tensor, "sample rank"], member: Bool[Tensor, "sample rank"], share: float
) -> Float[Tensor, " sample"]:
    rank = member.long().cumsum(1)
    weight = torch.where(member, share * (1 - share) ** (rank - 1.0), 0.0)
    if share == 1:
        weight = (member & (rank == 1)).float()
    return (weight * log_distance).sum(1) / weight.sum(1).clamp(min=1e-12)


def standing_out(found: Neighbours, member: Bool[Tensor, " image"]) -> Float[Tensor, " sample"]:
    """Return the distance to the nearest member over the mean distance to the 19 that follow; small for a copy."""
    is_member = member[found.index]
    rank = is_member.long().cumsum(1)
    first = (is_member & (rank == 1)).float()
    next_ones = (is_member & (rank > 1) & (rank <= _FOLLOWING)).float()
    following = (next_ones * found.distance).sum(1) / next_ones.sum(1).clamp(min=1)
    return (first * found.distance).sum(1) / following.clamp(min=1e-6)


_FOLLOWING = 20


@dataclass(frozen=True)
class Verdict:
    """What the tests say of one bank in one space."""

    nearer: float
    """How much further other images are than trained ones, in percent, geometric mean over samples."""
    low: float
    high: float
    """Between these lie 90 percent of the shuffles, in percent."""
    p_nearer: float
    """Share of shuffles after which the mean is as large: small if the bank as a whole leans towards trained images."""
    standing_out: float
    """The smallest distance to the nearest trained image over those to the next ones."""
    standing_out_others: float
    """The same for other images: what happens without copying."""
    copies: int
    """Trained images that stand out for a sample more than any other image does for any sample."""

    @property
    def p_copies(self) -> float:
        """The probability of so many by chance (precedence test).

        Of equal numbers from one distribution, each extreme one is as likely of the first kind as of the second. Images
        count, not samples, because one image can stand out for many samples.
        """
        return float(0.5**self.copies)

    @property
    def is_detected(self) -> bool:
        """Whether one of both is below 1 percent."""
        return min(self.p_nearer, self.p_copies) < 0.01


def judge(
    found: Neighbours, is_trained: Bool[Tensor, " image"], rng: torch.Generator, num_shuffles: int = 1000
) -> Verdict:
    """Compare trained images with others."""
    mean = float(gaps(found, is_trained).mean())
    means = [
        float(gaps(found, is_trained[torch.randperm(len(is_trained), generator=rng)]).mean())
        for _ in range(num_shuffles)
    ]
    low, high = torch.tensor(means).quantile(torch.tensor([0.05, 0.95])).expm1().mul(100).tolist()
    trained, others = standing_out(found, is_trained), standing_out(found, _thinned(~is_trained, is_trained, rng))
    first = found.index.gather(1, is_trained[found.index].long().argmax(1, keepdim=True))[:, 0]
    return Verdict(
        nearer=100 * math.expm1(mean),
        low=low,
        high=high,
        p_nearer=(1 + sum(each >= mean - 1e-9 for each in means)) / (1 + num_shuffles),
        standing_out=float(trained.min()),
        standing_out_others=float(others.min()),
        copies=len(first[trained < others.min()].unique()),
    )


def _thinned(
    others: Bool[Tensor, " image"], trained: Bool[Tensor, " image"], rng: torch.Generator
) -> Bool[Tensor, " image"]:
    """Return as many of the others as there are trained images, at most: few images stand out more than many do."""
    chosen = others.nonzero().flatten()
    chosen = chosen[torch.randperm(len(chosen), generator=rng)[: int(trained.sum())]]
    return torch.zeros_like(others).index_fill(0, chosen, True)


def auc(members: Float[Tensor, " member"], others: Float[Tensor, " other"]) -> float:
    """Return the probability that a member scores higher than another image; ties count half."""
    ordered = others.sort().values
    below = torch.searchsorted(ordered, members, right=False)
    up_to = torch.searchsorted(ordered, members, right=True)
    return float((below + up_to).double().mean()) / 2 / len(others)
