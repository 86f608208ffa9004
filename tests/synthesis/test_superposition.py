import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from qimera.config.settings import LabelSettings
from qimera.synthesis.superposition import draw_mixtures, soft_labels, superpose, take_turns
from tests import reference

SEEDS = st.integers(0, 2**31 - 1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixtures(count: int, num_classes: int, seed: int = 0, **labels: object) -> tuple[Tensor, Tensor]:
    generator = seeded(seed)
    return draw_mixtures(take_turns(count, num_classes, generator), num_classes, LabelSettings(**labels), generator)


# --- superposition ----------------------------------------------------------------------------------------------------


@given(seed=SEEDS, batch=st.integers(1, 5), k=st.integers(1, 6), width=st.integers(1, 9))
def test_superposition_is_the_weighted_sum_of_latents(seed: int, batch: int, k: int, width: int) -> None:
    latent = torch.randn(batch, k, width, generator=seeded(seed), dtype=torch.float64)
    weight = torch.randn(batch, k, generator=seeded(seed + 1), dtype=torch.float64).softmax(1)
    expected = [reference.superpose(a, b) for a, b in zip(latent.numpy(), weight.numpy(), strict=True)]
    np.testing.assert_allclose(superpose(latent, weight).numpy(), expected, atol=1e-12)  # order of summation


def test_every_latent_and_every_share_has_a_say() -> None:
    latent = torch.randn(1, 3, 4, generator=seeded(0))
    weight = torch.tensor([[0.2, 0.3, 0.5]])
    mixed = superpose(latent, weight)
    for k in range(3):
        other = latent.clone()
        other[0, k] += 1
        # rtol: rounding of one sum
        torch.testing.assert_close(superpose(other, weight) - mixed, weight[0, k].expand(1, 4), rtol=1e-5, atol=1e-6)


def test_equal_latents_stay_as_they_are_under_any_shares() -> None:
    latent = torch.randn(4, 1, 6, generator=seeded(0))
    weight = torch.randn(4, 3, generator=seeded(1)).softmax(1)
    torch.testing.assert_close(superpose(latent.expand(4, 3, 6), weight), latent[:, 0])


def test_the_gradient_of_superposition_is_that_of_finite_differences() -> None:
    latent = torch.randn(2, 3, 4, dtype=torch.float64, generator=seeded(0), requires_grad=True)
    weight = torch.rand(2, 3, dtype=torch.float64, generator=seeded(1), requires_grad=True)
    assert gradcheck(superpose, (latent, weight))


# --- soft labels ------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, batch=st.integers(1, 6), k=st.integers(1, 8), num_classes=st.sampled_from([2, 3, 10, 1000]))
def test_soft_labels_are_the_shares_of_the_classes(seed: int, batch: int, k: int, num_classes: int) -> None:
    label = torch.randint(num_classes, (batch, k), generator=seeded(seed))
    weight = torch.randn(batch, k, generator=seeded(seed + 1)).softmax(1)
    target = soft_labels(label, weight, num_classes)
    expected = [
        reference.soft_label(a, b, num_classes) for a, b in zip(label.numpy(), weight.double().numpy(), strict=True)
    ]
    np.testing.assert_allclose(target.numpy(), expected, atol=1e-6)  # float32 sums of up to eight shares
    torch.testing.assert_close(target.sum(1), torch.ones(batch))
    assert bool((target >= 0).all())


def test_a_class_drawn_twice_gets_both_shares() -> None:
    target = soft_labels(torch.tensor([[1, 1, 0]]), torch.tensor([[0.5, 0.3, 0.2]]), 3)
    torch.testing.assert_close(target, torch.tensor([[0.2, 0.8, 0.0]]))


# --- draws ------------------------------------------------------------------------------------------------------------


@given(
    seed=SEEDS,
    count=st.integers(1, 50),
    num_classes=st.integers(2, 1000),
    k=st.integers(2, 20),
    probability=st.floats(0, 1),
    per_sample=st.booleans(),
)
def test_drawn_classes_exist_and_drawn_shares_sum_to_one(
    seed: int, count: int, num_classes: int, k: int, probability: float, per_sample: bool
) -> None:
    label, weight = mixtures(
        count,
        num_classes,
        seed,
        num_superposed_classes=k,
        superposition_probability=probability,
        per_sample=per_sample,
    )
    assert label.shape == weight.shape == (count, k)
    assert 0 <= int(label.min()) <= int(label.max()) < num_classes
    assert bool((weight >= 0).all())
    torch.testing.assert_close(weight.sum(1), torch.ones(count))


def test_with_probability_zero_no_sample_is_superposed() -> None:
    label, weight = mixtures(500, 10, superposition_probability=0.0, num_superposed_classes=3)
    assert torch.equal(weight, torch.tensor([1.0, 0.0, 0.0]).expand(500, 3))
    assert bool((soft_labels(label, weight, 10).amax(1) == 1).all())


def test_with_superposition_off_there_is_one_class_per_sample() -> None:
    label, weight = mixtures(50, 10, superposition=False, superposition_probability=1.0)
    assert label.shape == (50, 1)
    assert torch.equal(weight, torch.ones(50, 1))


def test_with_probability_one_every_sample_has_a_share_of_each_of_its_classes() -> None:
    _, weight = mixtures(500, 10, superposition_probability=1.0, num_superposed_classes=3)
    assert bool((weight > 0).all())


def test_the_share_of_superposed_samples_is_the_probability() -> None:
    _, weight = mixtures(10_000, 10, superposition_probability=0.4)
    superposed = float((weight.amax(1) < 1).float().mean())
    assert superposed == pytest.approx(0.4, abs=0.025)  # five standard deviations of the draw


def test_per_batch_draws_are_all_superposed_or_none() -> None:
    superposed = []
    for seed in range(200):
        _, weight = mixtures(4, 10, seed, superposition_probability=0.4, per_sample=False)
        found = (weight.amax(1) < 1).unique()
        assert len(found) == 1
        superposed.append(bool(found[0]))
    assert sum(superposed) / len(superposed) == pytest.approx(0.4, abs=0.17)  # five standard deviations


def test_per_sample_draws_mix_both_kinds_in_one_batch() -> None:
    _, weight = mixtures(100, 10, superposition_probability=0.4)
    assert len((weight.amax(1) < 1).unique()) == 2


@pytest.mark.parametrize(("k", "largest", "entropy"), [(2, 0.727, 0.54), (10, 0.319, 1.93), (100, 0.082, 4.12)])
def test_shares_are_softmaxes_of_standard_normals(k: int, largest: float, entropy: float) -> None:
    """The expected figures come from a simulation of w = softmax(randn(K)) made apart from this code."""
    _, weight = mixtures(4000, 10, superposition_probability=1.0, num_superposed_classes=k)
    assert float(weight.amax(1).mean()) == pytest.approx(largest, abs=0.015)
    assert float(-(weight * weight.log()).sum(1).mean()) == pytest.approx(entropy, abs=0.03)


@given(seed=SEEDS, count=st.integers(1, 60), num_classes=st.integers(2, 12))
def test_first_classes_take_turns(seed: int, count: int, num_classes: int) -> None:
    label, _ = mixtures(count, num_classes, seed)
    counts = label[:, 0].bincount(minlength=num_classes)
    assert int(counts.max() - counts.min()) <= 1


def test_the_order_of_first_classes_is_random() -> None:
    label, _ = mixtures(100, 10)
    assert not torch.equal(label[:, 0], torch.arange(100) % 10)


def test_few_samples_may_show_any_of_many_classes_first() -> None:
    """Not always the first of them."""
    seen = torch.cat([take_turns(32, 1000, seeded(seed)) for seed in range(200)])
    assert len(seen.unique()) > 950  # 6,400 draws leave out two of 1,000 classes
    assert all(len(take_turns(32, 1000, seeded(seed)).unique()) == 32 for seed in range(20))


def test_other_classes_are_drawn_from_all() -> None:
    label, _ = mixtures(1000, 10, num_superposed_classes=3)
    assert label[:, 1:].unique().tolist() == list(range(10))


def test_same_seed_same_draw_and_another_seed_another() -> None:
    first, again, other = mixtures(20, 10, 3), mixtures(20, 10, 3), mixtures(20, 10, 4)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = mixtures(20, 10)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(mixtures(20, 10)[1], first[1])
