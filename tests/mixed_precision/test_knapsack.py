import itertools
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from qimera.mixed_precision.knapsack import Option, solve_knapsack

OPTIONS = st.builds(Option, st.integers(0, 30), st.floats(0, 1e6, allow_nan=False))
LAYERS = st.lists(st.lists(OPTIONS, min_size=1, max_size=5), min_size=1, max_size=5)


def total(layers: list[list[Option]], chosen: list[int]) -> Option:
    taken = [options[index] for options, index in zip(layers, chosen, strict=True)]
    return Option(sum(each.cost for each in taken), math.fsum(each.loss for each in taken))


def cheapest(layers: list[list[Option]]) -> int:
    return sum(min(each.cost for each in options) for options in layers)


def realistic(seed: int, num_layers: int) -> list[list[Option]]:
    """Bits 2 to 8 for layers of very different sizes and sensitivities."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(50, 400_000, num_layers)
    scales = np.exp(generator.normal(0, 2, num_layers))
    return [
        [Option(int(size) * bits // 8, float(scale * 4.0**-bits)) for bits in range(2, 9)]
        for size, scale in zip(sizes, scales, strict=True)
    ]


@given(layers=LAYERS, slack=st.integers(0, 60))
def test_no_other_choice_within_the_limit_is_better(layers: list[list[Option]], slack: int) -> None:
    limit = cheapest(layers) + slack
    found = total(layers, solve_knapsack(layers, limit))
    others = [total(layers, list(each)) for each in itertools.product(*(range(len(options)) for options in layers))]
    best = min(each.loss for each in others if each.cost <= limit)
    assert found.cost <= limit
    assert found.loss <= best + 1e-9 * max(1.0, best)


@pytest.mark.parametrize("seed", range(5))
def test_a_larger_limit_never_gives_a_larger_loss(seed: int) -> None:
    layers = realistic(seed, 30)
    least, most = cheapest(layers), sum(options[-1].cost for options in layers)
    found = [
        (limit, total(layers, solve_knapsack(layers, limit)))
        for limit in np.linspace(least, most, 12).astype(int).tolist()
    ]
    losses = [each.loss for _, each in found]
    assert losses == sorted(losses, reverse=True)
    assert all(each.cost <= limit for limit, each in found)
    assert [each.cost for _, each in found][:: len(found) - 1] == [least, most]


def test_a_hundred_layers_with_49_options_each_are_no_trouble() -> None:
    generator = np.random.default_rng(0)
    layers = [
        [Option(int(macs) * w * a, float(u * 4.0**-w + v * 4.0**-a)) for w in range(2, 9) for a in range(2, 9)]
        for macs, u, v in zip(generator.integers(1e5, 1e8, 100), *np.exp(generator.normal(0, 2, (2, 100))), strict=True)
    ]
    limit = 2 * cheapest(layers)
    assert 0.999 * limit < total(layers, solve_knapsack(layers, limit)).cost <= limit


def test_a_limit_below_the_cheapest_options_is_refused() -> None:
    with pytest.raises(ValueError, match="the cheapest options cost more than 1"):
        solve_knapsack([[Option(2, 0.5)]], 1)


def test_no_layers_need_no_choice() -> None:
    assert solve_knapsack([], 0) == []
