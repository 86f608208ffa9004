import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from qimera.quantization.ranges import (
    affine_parameters,
    integer_range,
    search_affine_parameters,
    thinned,
    weight_range,
)
from tests import reference

SEEDS = st.integers(0, 2**31 - 1)
BITS = st.integers(2, 8)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def squared_error(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> float:
    values = x.double().numpy()
    return float(((reference.fake_quantize(values, scale, zero_point, low, high) - values) ** 2).sum())


@pytest.mark.parametrize("bits", range(2, 9))
def test_an_integer_range_has_two_to_the_bits_levels(bits: int) -> None:
    for signed in (False, True):
        low, high = integer_range(bits, signed=signed)
        assert high - low + 1 == 2**bits
        assert (low == 0) is not signed
    assert integer_range(bits, signed=True) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_of_eight_bits_start_at_minus_127_and_narrower_ones_have_all_levels(bits: int) -> None:
    low, high = integer_range(bits, signed=True)
    assert weight_range(bits) == ((-127, 127) if bits == 8 else (low, high))


# --- min-max ----------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, bits=BITS, symmetric=st.booleans(), shift=st.floats(-3, 3))
def test_min_max_parameters_are_those_of_the_equation(seed: int, bits: int, symmetric: bool, shift: float) -> None:
    low, high = integer_range(bits, signed=symmetric)
    x = torch.randn(30, generator=seeded(seed)) + shift
    scale, zero_point = affine_parameters(x, low, high, symmetric=symmetric)
    expected_scale, expected_zero_point = reference.min_max_parameters(x.double().numpy(), low, high, symmetric)
    assert scale.item() == pytest.approx(expected_scale, rel=1e-6)  # float32
    # float32: low / scale may lie on the other side of a half
    assert abs(zero_point.item() - expected_zero_point) <= (0 if symmetric else 1)


@given(seed=SEEDS, bits=BITS, symmetric=st.booleans(), axis=st.integers(0, 2))
def test_per_channel_parameters_are_those_of_each_channel_alone(
    seed: int, bits: int, symmetric: bool, axis: int
) -> None:
    low, high = integer_range(bits, signed=True)
    x = torch.randn(4, 5, 6, generator=seeded(seed))
    for find in (affine_parameters, search_affine_parameters):
        scale, zero_point = find(x, low, high, symmetric=symmetric, axis=axis)
        assert scale.shape == zero_point.shape == (x.shape[axis],)
        for channel, part in enumerate(x.unbind(axis)):
            if find is search_affine_parameters and not symmetric:
                continue  # the search looks at both ends of all channels or at none
            alone = find(part, low, high, symmetric=symmetric)
            assert scale[channel] == alone[0]
            assert zero_point[channel] == alone[1]


@given(seed=SEEDS, bits=BITS, shift=st.floats(-3, 3), symmetric=st.booleans())
def test_the_grid_covers_every_value_and_zero(seed: int, bits: int, shift: float, symmetric: bool) -> None:
    low, high = integer_range(bits, signed=symmetric)
    x = torch.randn(30, generator=seeded(seed)) + shift
    scale, zero_point = (each.item() for each in affine_parameters(x, low, high, symmetric=symmetric))
    assert low <= zero_point <= high
    # the zero point is rounded: each end may be half a step short
    assert (low - zero_point - 0.501) * scale <= min(0, float(x.min()))
    assert (high - zero_point + 0.501) * scale >= max(0, float(x.max()))


@pytest.mark.parametrize("find", [affine_parameters, search_affine_parameters])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e-42, -2.0, 3.0])
def test_a_constant_tensor_has_a_positive_finite_step(find, symmetric: bool, value: float) -> None:  # type: ignore[no-untyped-def]
    low, high = integer_range(4, signed=symmetric)
    scale, zero_point = find(torch.full((2, 5), value), low, high, symmetric=symmetric, axis=0)
    assert bool((scale > 0).all())
    assert bool(scale.isfinite().all())
    assert bool((1 / scale).isfinite().all())
    assert bool(((low <= zero_point) & (zero_point <= high)).all())


@pytest.mark.parametrize("find", [affine_parameters, search_affine_parameters])
def test_a_tensor_without_negative_values_starts_at_zero(find) -> None:  # type: ignore[no-untyped-def]
    _, zero_point = find(torch.rand(100, generator=seeded(0)), 0, 15, symmetric=False)
    assert zero_point.item() == 0


# --- search -----------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, bits=BITS, symmetric=st.booleans(), positive=st.booleans())
def test_the_search_never_does_worse_than_min_max(seed: int, bits: int, symmetric: bool, positive: bool) -> None:
    low, high = integer_range(bits, signed=symmetric)
    x = torch.randn(200, generator=seeded(seed)) ** 3
    x = x.abs() if positive else x
    found = [
        squared_error(x, *(each.item() for each in find(x, low, high, symmetric=symmetric)), low, high)
        for find in (search_affine_parameters, affine_parameters)
    ]
    assert found[0] <= found[1] * (1 + 1e-4)  # float32 against float64


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_with_few_levels_and_an_outlier_the_search_does_far_better(bits: int, symmetric: bool) -> None:
    low, high = integer_range(bits, signed=symmetric)
    x = torch.cat([torch.randn(1000, generator=seeded(0)), torch.tensor([10.0])])
    x = x if symmetric else x.abs()
    found = [
        squared_error(x, *(each.item() for each in find(x, low, high, symmetric=symmetric)), low, high)
        for find in (search_affine_parameters, affine_parameters)
    ]
    assert found[0] < 0.9 * found[1]


def test_the_search_finds_the_best_of_a_fine_scan() -> None:
    x = torch.randn(500, generator=seeded(0))
    scale, zero_point = search_affine_parameters(x, -8, 7, symmetric=True)
    assert zero_point.item() == 0
    best = min(squared_error(x, step, 0, -8, 7) for step in np.linspace(0.05, 0.6, 400))
    assert squared_error(x, scale.item(), 0, -8, 7) < 1.02 * best  # one of 80 candidates


def test_each_end_of_a_lopsided_range_shrinks_on_its_own() -> None:
    x = torch.cat([torch.randn(2000, generator=seeded(0)).clamp(min=-0.3), torch.tensor([-10.0])])
    scale, zero_point = (each.item() for each in search_affine_parameters(x, 0, 15, symmetric=False))
    assert -zero_point * scale > -5  # of -10
    assert (15 - zero_point) * scale > 2  # of 3 to 4


def test_the_search_looks_at_a_part_of_a_large_tensor_and_finds_the_same() -> None:
    x = torch.randn(200_000, generator=seeded(0)).relu()
    scale, _ = search_affine_parameters(x, 0, 15, symmetric=False)
    part, _ = search_affine_parameters(x[:20_000], 0, 15, symmetric=False)
    assert scale.item() == pytest.approx(part.item(), rel=0.15)  # two draws of one distribution


@pytest.mark.parametrize("side", [8, 16, 32, 112])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_search_sees_all_of_a_map_and_not_its_border_alone(side: int, memory_format: torch.memory_format) -> None:
    maps = torch.rand(8, 48, side, side, generator=seeded(0)).to(memory_format=memory_format)
    maps[:, :, :, 0] *= 0.1
    maps[:, ::2] *= 3.0
    scale, _ = search_affine_parameters(maps, 0, 255, symmetric=False)
    assert 255 * float(scale) == pytest.approx(3.0, rel=0.02)


@pytest.mark.parametrize(
    ("num_values", "wanted"), [(1, 4), (100, 100), (1 << 11, 1 << 10), (1 << 20, 4096), (7**6, 4096)]
)
def test_positions_are_spread_over_all_columns_of_any_width_evenly(num_values: int, wanted: int) -> None:
    positions = thinned(torch.arange(num_values).float()[None], wanted)[0].long()
    assert len(positions) == min(num_values, wanted)
    assert len(positions.unique()) > 0.99 * len(positions)  # hardly any twice
    assert int(positions.min()) >= 0
    assert int(positions.max()) < num_values
    for width in (2, 7, 16, 64) if len(positions) >= 4096 else ():
        seen = (positions % width).bincount(minlength=width) / len(positions)
        assert float((seen * width - 1).abs().max()) < 0.1, width


def test_the_tensor_is_left_alone() -> None:
    x = torch.randn(50, generator=seeded(0))
    search_affine_parameters(x, 0, 15, symmetric=False)
    assert torch.equal(x, torch.randn(50, generator=seeded(0)))
