"""The audit of benchmarks/privacy sees copies, and nothing where there are none."""

import pytest
import torch
from torch import Tensor

from benchmarks.privacy.neighbours import Verdict, auc, gaps, judge, nearest, standing_out

NUM_TRAINED, NUM_OTHERS, NUM_SAMPLES = 500, 100, 64


def drawn(count: int, seed: int) -> Tensor:
    """Return points of eight coordinates."""
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


IMAGES = drawn(NUM_TRAINED + NUM_OTHERS, 0)
IS_TRAINED = torch.arange(len(IMAGES)) < NUM_TRAINED


def verdict(samples: Tensor) -> Verdict:
    found = nearest(samples, IMAGES, 200)
    return judge(found, IS_TRAINED, torch.Generator().manual_seed(0), num_shuffles=200)


def test_nearest_images_are_those_of_a_plain_search() -> None:
    samples = drawn(5, 1)
    expected = ((samples[:, None] - IMAGES[None]) ** 2).mean(2).sqrt().sort(dim=1)
    found = nearest(samples, IMAGES, 7)
    torch.testing.assert_close(found.distance, expected.values[:, :7])
    assert torch.equal(found.index, expected.indices[:, :7])


def test_the_expected_nearest_image_of_a_subset_is_that_of_many_subsets() -> None:
    found = nearest(drawn(NUM_SAMPLES, 1), IMAGES, len(IMAGES))
    rng, total = torch.Generator().manual_seed(0), torch.zeros(NUM_SAMPLES)
    for _ in range(400):
        subset = torch.zeros(len(IMAGES), dtype=torch.bool)
        subset[torch.randperm(NUM_TRAINED, generator=rng)[:NUM_OTHERS]] = True
        total += _log_nearest(found.distance, subset[found.index])
    expected = _log_nearest(found.distance, ~IS_TRAINED[found.index]) - total / 400
    assert float((gaps(found, IS_TRAINED) - expected).abs().max()) < 0.05  # of 400 subsets


def _log_nearest(distance: Tensor, member: Tensor) -> Tensor:
    return torch.where(member, distance, torch.inf).amin(1).log()


@pytest.mark.parametrize("seed", range(5))
def test_samples_that_know_nothing_of_the_images_are_not_detected(seed: int) -> None:
    found = verdict(drawn(NUM_SAMPLES, 10 + seed))
    assert not found.is_detected
    assert found.low - 2 < found.nearer < found.high + 2


def test_a_bank_that_leans_towards_trained_images_is_detected() -> None:
    found = verdict(0.7 * IMAGES[:NUM_SAMPLES] + 0.3 * drawn(NUM_SAMPLES, 1))
    assert found.p_nearer < 0.01
    assert found.nearer > found.high


def test_a_few_copies_are_detected_that_do_not_move_the_mean() -> None:
    samples = drawn(NUM_SAMPLES, 1)
    samples[:8] = IMAGES[:8] + 0.02 * drawn(8, 2)
    found = verdict(samples)
    assert found.copies >= 8
    assert found.p_copies < 0.01
    assert found.standing_out < 0.2 < found.standing_out_others
    assert found.is_detected


def test_copies_of_other_images_are_no_leak() -> None:
    found = verdict(IMAGES[-NUM_SAMPLES:] + 0.02 * drawn(NUM_SAMPLES, 2))
    assert not found.is_detected
    assert found.nearer < 0


def test_standing_out_is_the_first_distance_over_the_next_ones() -> None:
    found = nearest(torch.zeros(1, 1), torch.tensor([[1.0], [2.0], [-4.0], [50.0]]), 4)
    assert standing_out(found, torch.tensor([True, True, True, False])).tolist() == [pytest.approx(1 / 3)]


def test_the_area_under_the_curve_counts_pairs() -> None:
    members, others = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([2.0, 0.0])
    pairs = [(1.0 if m > o else 0.5 if m == o else 0.0) for m in members for o in others]
    assert auc(members, others) == pytest.approx(sum(pairs) / len(pairs))
