import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from qimera.quantization.fake_quantize import (
    LearnedStepFakeQuantize,
    MinMaxFakeQuantize,
    PerChannelBiasFakeQuantize,
    round_to_grid,
)
from qimera.quantization.ranges import affine_parameters, integer_range
from tests import reference

SEEDS = st.integers(0, 2**31 - 1)
BITS = st.integers(2, 8)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def activation_quantizer(bits: int, scale: float, zero_point: int) -> LearnedStepFakeQuantize:
    low, high = integer_range(bits, signed=False)
    quantizer = LearnedStepFakeQuantize(
        dtype=torch.uint8, quant_min=low, quant_max=high, qscheme=torch.per_tensor_affine
    )
    quantizer.set_(torch.tensor(scale), torch.tensor(zero_point))
    return quantizer


def weight_quantizer(bits: int, weight: Tensor, *, symmetric: bool = True, axis: int = 0) -> LearnedStepFakeQuantize:
    low, high = integer_range(bits, signed=True)
    quantizer = LearnedStepFakeQuantize(
        dtype=torch.int8,
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_channel_symmetric if symmetric else torch.per_channel_affine,
        ch_axis=axis,
        shape=tuple(weight.shape),
    )
    quantizer.fit_(weight, "minmax")
    return quantizer


def minmax_quantizer(bits: int, *, per_call: bool = False, weight: Tensor | None = None) -> MinMaxFakeQuantize:
    low, high = integer_range(bits, signed=weight is not None)
    if weight is None:
        return MinMaxFakeQuantize(
            per_call=per_call, dtype=torch.uint8, quant_min=low, quant_max=high, qscheme=torch.per_tensor_affine
        )
    return MinMaxFakeQuantize(
        per_call=per_call,
        dtype=torch.int8,
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_channel_affine,
        ch_axis=0,
        shape=tuple(weight.shape),
    )


def parameters(quantizer: LearnedStepFakeQuantize | MinMaxFakeQuantize) -> tuple[Tensor, Tensor]:
    scale, zero_point = quantizer.calculate_qparams()
    return scale.detach(), zero_point


# --- values -----------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, bits=BITS, scale=st.floats(1e-3, 10), share=st.floats(0, 1))
def test_per_tensor_values_are_those_of_torch(seed: int, bits: int, scale: float, share: float) -> None:
    high = 2**bits - 1
    quantizer = activation_quantizer(bits, scale, round(share * high))
    x = torch.randn(4, 3, 5, 5, generator=seeded(seed)) * scale * high / 2
    expected = torch.fake_quantize_per_tensor_affine(x, *parameters(quantizer), 0, high)
    assert torch.equal(quantizer(x), expected)


@given(seed=SEEDS, bits=BITS, symmetric=st.booleans())
def test_per_channel_values_are_those_of_torch(seed: int, bits: int, symmetric: bool) -> None:
    weight = torch.randn(6, 3, 3, 3, generator=seeded(seed)) * torch.logspace(-3, 1, 6).view(-1, 1, 1, 1)
    quantizer = weight_quantizer(bits, weight, symmetric=symmetric)
    scale, zero_point = parameters(quantizer)
    if symmetric:
        assert not zero_point.any()
    low, high = integer_range(bits, signed=True)
    for x in (weight, 1.5 * weight):
        expected = torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, low, high)
        assert torch.equal(quantizer(x), expected)


@given(seed=SEEDS, bits=BITS, share=st.floats(0, 1))
def test_values_are_the_nearest_levels_of_the_equation(seed: int, bits: int, share: float) -> None:
    high = 2**bits - 1
    quantizer = activation_quantizer(bits, 0.25, round(share * high))  # a power of two: x / s is exact
    x = torch.randn(40, generator=seeded(seed)) * high / 8
    expected = reference.fake_quantize(x.double().numpy(), 0.25, round(share * high), 0, high)
    assert np.array_equal(quantizer(x).detach().numpy(), expected)


@given(seed=SEEDS, bits=BITS)
def test_each_channel_is_quantized_on_its_own_grid(seed: int, bits: int) -> None:
    low, high = integer_range(bits, signed=True)
    weight = torch.randn(3, 8, generator=seeded(seed))
    quantizer = weight_quantizer(bits, weight)
    scale = torch.tensor([0.25, 1.0, 0.03125])
    quantizer.set_(scale.view(3, 1), torch.zeros(3, 1, dtype=torch.int32))
    zero_point = np.zeros(3, dtype=np.int64)
    x = weight.double().numpy()
    expected = reference.fake_quantize_per_channel(x, scale.double().numpy(), zero_point, low, high)
    # exp(log(step)) is off by a rounding error
    np.testing.assert_allclose(quantizer(weight).detach().numpy(), expected, rtol=1e-6)


def test_halves_go_to_the_even_level() -> None:
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    assert round_to_grid(x, torch.tensor(1.0), -8, 7).tolist() == [-2, 0, 0, 2, 2, 4]


@given(seed=SEEDS, bits=BITS, scale=st.floats(1e-6, 1e3), share=st.floats(0, 1))
def test_zero_is_exact(seed: int, bits: int, scale: float, share: float) -> None:
    quantizer = activation_quantizer(bits, scale, round(share * (2**bits - 1)))
    assert quantizer(torch.zeros(1)).item() == 0
    weight = torch.randn(3, 4, generator=seeded(seed))
    assert not weight_quantizer(bits, weight, symmetric=False)(torch.zeros(3, 4)).any()


@given(seed=SEEDS, bits=BITS, scale=st.floats(1e-3, 10), share=st.floats(0, 1))
def test_quantizing_twice_changes_nothing(seed: int, bits: int, scale: float, share: float) -> None:
    quantizer = activation_quantizer(bits, scale, round(share * (2**bits - 1)))
    once = quantizer(torch.randn(100, generator=seeded(seed)) * scale * 2**bits)
    assert torch.equal(quantizer(once), once)


@given(seed=SEEDS, bits=BITS, scale=st.floats(1e-3, 10), share=st.floats(0, 1))
def test_inside_the_range_the_error_is_at_most_half_a_step_and_outside_the_end_is_taken(
    seed: int, bits: int, scale: float, share: float
) -> None:
    high = 2**bits - 1
    zero_point = round(share * high)
    quantizer = activation_quantizer(bits, scale, zero_point)
    x = torch.randn(200, generator=seeded(seed)) * scale * high
    y = quantizer(x).detach()
    first, last = -zero_point * scale, (high - zero_point) * scale
    inside = (x >= first) & (x <= last)
    assert bool(((y - x).abs()[inside] <= 0.5 * scale * (1 + 1e-5) + 1e-6 * scale * high).all())  # float32
    # exp(log(step)) is off by a rounding error
    torch.testing.assert_close(y[x > last], torch.full_like(y[x > last], last), rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(y[x < first], torch.full_like(y[x < first], first), rtol=1e-5, atol=1e-30)


@given(seed=SEEDS, bits=BITS)
def test_there_are_no_more_values_than_levels(seed: int, bits: int) -> None:
    weight = torch.randn(4, 200, generator=seeded(seed))
    assert all(len(row.unique()) <= 2**bits for row in weight_quantizer(bits, weight)(weight))


def test_the_zero_point_shifts_the_range() -> None:
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])
    assert activation_quantizer(2, 1.0, 0)(x).tolist() == [0, 0, 0, 1, 3]
    assert activation_quantizer(2, 1.0, 1)(x).tolist() == [-1, -1, 0, 1, 2]
    assert activation_quantizer(2, 1.0, 3)(x).tolist() == [-3, -1, 0, 0, 0]


def test_a_transposed_convolution_has_its_channels_on_the_second_axis() -> None:
    weight = torch.randn(3, 5, 2, 2, generator=seeded(0)) * torch.logspace(-3, 1, 5).view(1, 5, 1, 1)
    quantizer = weight_quantizer(4, weight, axis=1)
    expected = torch.fake_quantize_per_channel_affine(weight, *parameters(quantizer), 1, -8, 7)
    assert torch.equal(quantizer(weight), expected)
    assert quantizer.scale.shape == (1, 5, 1, 1)


# --- gradients of the learned step ------------------------------------------------------------------------------------


def naive(x: Tensor, scale: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    """Rounding with the identity's gradient; clamp and multiplication left to autograd."""
    v = x / scale
    rounded = v.round().detach() + (v - v.detach())
    return rounded.clamp(low, high) * scale


def tie_free(x: Tensor, scale: Tensor) -> Tensor:
    """Move values off the places where rounding turns, so that float32 and float64 round alike."""
    v = x / scale
    near = ((v - v.floor()) - 0.5).abs() < 1e-3
    return torch.where(near, x + 0.01 * scale, x)


@given(seed=SEEDS, bits=BITS, scale=st.floats(1e-2, 10), share=st.floats(0, 1), channels_last=st.booleans())
def test_per_tensor_gradients_are_those_of_the_naive_straight_through_estimator(
    seed: int, bits: int, scale: float, share: float, channels_last: bool
) -> None:
    high = 2**bits - 1
    zero_point = round(share * high)
    quantizer = activation_quantizer(bits, scale, zero_point)
    x = tie_free(torch.randn(2, 3, 4, 5, generator=seeded(seed)) * scale * high, torch.tensor(scale))
    dy = torch.randn(2, 3, 4, 5, generator=seeded(seed + 1))
    leaf = (x.contiguous(memory_format=torch.channels_last) if channels_last else x.clone()).requires_grad_()
    quantizer(leaf).backward(dy)

    log_scale = quantizer.log_scale.detach().double().requires_grad_()
    naive_leaf = x.double().requires_grad_()
    naive(naive_leaf, log_scale.exp(), -zero_point, high - zero_point).backward(dy.double())
    assert leaf.grad is not None
    assert naive_leaf.grad is not None
    assert quantizer.log_scale.grad is not None
    assert log_scale.grad is not None
    # autograd multiplies by the step and divides by it again
    torch.testing.assert_close(leaf.grad.double(), naive_leaf.grad, rtol=1e-12, atol=0)
    # float32 sums of 120 products that may cancel
    bound = 1e-5 * float((dy.abs() * x.abs()).sum())
    assert float(quantizer.log_scale.grad) == pytest.approx(float(log_scale.grad), rel=1e-4, abs=bound)


@given(seed=SEEDS, bits=BITS, symmetric=st.booleans())
def test_per_channel_gradients_are_those_of_the_naive_straight_through_estimator(
    seed: int, bits: int, symmetric: bool
) -> None:
    weight = torch.randn(4, 3, 3, 3, generator=seeded(seed))
    quantizer = weight_quantizer(bits, weight, symmetric=symmetric)
    x = tie_free(1.7 * weight, quantizer.scale.detach()).requires_grad_()
    dy = torch.randn(4, 3, 3, 3, generator=seeded(seed + 1))
    quantizer(x).backward(dy)

    low, high = integer_range(bits, signed=True)
    log_scale = quantizer.log_scale.detach().double().requires_grad_()
    leaf = x.detach().double().requires_grad_()
    offset = quantizer.zero_point
    naive(leaf, log_scale.exp(), low - offset, high - offset).backward(dy.double())
    assert x.grad is not None
    assert leaf.grad is not None
    assert quantizer.log_scale.grad is not None
    # autograd multiplies by the step and divides by it again
    torch.testing.assert_close(x.grad.double(), leaf.grad, rtol=1e-12, atol=0)
    # float32 sums of 27 products that may cancel
    torch.testing.assert_close(quantizer.log_scale.grad.double(), log_scale.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_are_those_of_the_lsq_equations(bits: int) -> None:
    high, zero_point, scale = 2**bits - 1, 1, 0.25
    quantizer = activation_quantizer(bits, scale, zero_point)
    x = (torch.randn(60, generator=seeded(0)) * high / 8).requires_grad_()
    dy = torch.randn(60, generator=seeded(1))
    quantizer(x).backward(dy)
    expected_dx, expected_ds = reference.learned_step_gradients(
        x.detach().double().numpy(), dy.double().numpy(), scale, zero_point, 0, high
    )
    assert x.grad is not None
    assert quantizer.log_scale.grad is not None
    assert np.array_equal(x.grad.numpy(), expected_dx)
    # float32 sum; the step is learned as a logarithm, so its gradient has the step as a factor
    assert float(quantizer.log_scale.grad) == pytest.approx(expected_ds * scale, rel=1e-4)


def test_the_gradient_passes_where_values_are_rounded_and_stops_where_they_are_clamped() -> None:
    quantizer = activation_quantizer(2, 1.0, 1)  # levels -1, 0, 1, 2
    x = torch.tensor([-1.6, -1.4, 0.3, 2.4, 2.6, 9.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0, 0]


def test_clipped_values_pull_the_step_up() -> None:
    quantizer = activation_quantizer(4, 0.1, 0)
    x = torch.full((10,), 5.0)
    (quantizer(x) - x).square().sum().backward()
    assert quantizer.log_scale.grad is not None
    assert float(quantizer.log_scale.grad) < 0  # descending raises it


def test_learning_the_step_lowers_the_error() -> None:
    x = torch.randn(500, generator=seeded(0))
    quantizer = activation_quantizer(4, 0.05, 8)
    optimizer = torch.optim.Adam(quantizer.parameters(), 0.05)
    errors = []
    for _ in range(60):
        error = (quantizer(x) - x).square().mean()
        errors.append(float(error.detach()))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert errors[-1] < 0.1 * errors[0]


def test_inside_one_rounding_cell_the_gradient_of_the_step_is_that_of_finite_differences() -> None:
    """Between two turns of rounding the output is level times step, smooth in the step; x is held at its level."""
    levels = torch.tensor([-2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    log_scale = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)

    def clipped(log_scale: Tensor) -> Tensor:
        quantizer = activation_quantizer(2, 1.0, 1).double()
        return torch.func.functional_call(quantizer, {"log_scale": log_scale}, (levels.sign() * 100.0,))

    assert gradcheck(clipped, (log_scale,))


# --- min-max ----------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, bits=BITS)
def test_a_range_that_follows_its_weight_is_that_of_the_call(seed: int, bits: int) -> None:
    low, high = integer_range(bits, signed=True)
    weight = torch.randn(3, 2, 2, 2, generator=seeded(seed))
    quantizer = minmax_quantizer(bits, per_call=True, weight=weight)
    for x in (weight, 3 * weight + 1):
        scale, zero_point = affine_parameters(x, low, high, symmetric=False, axis=0)
        expected = torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, low, high)
        assert torch.equal(quantizer(x), expected)


def test_a_range_averages_over_the_calls_of_the_search_and_then_stands_still() -> None:
    quantizer = minmax_quantizer(8)
    quantizer.searching = "minmax"
    for top in (1.0, 2.0, 6.0):
        quantizer(torch.tensor([0.0, top]))
    quantizer.searching = None
    assert float(quantizer.scale) == pytest.approx(3 / 255, rel=1e-5)  # float32
    quantizer(torch.tensor([0.0, 100.0]))
    assert float(quantizer.scale) == pytest.approx(3 / 255, rel=1e-5)


def test_a_constant_range_is_found_in_the_first_call_and_kept() -> None:
    """The authors' average, corrected twice for its bias, overshoots here by orders of magnitude."""
    quantizer = minmax_quantizer(8)
    quantizer.searching = "minmax"
    for _ in range(30):
        quantizer(torch.tensor([0.0, 1.0]))
        assert float(quantizer.scale) == pytest.approx(1 / 255, rel=1e-5)  # float32


@given(seed=SEEDS, bits=BITS, factor=st.sampled_from([1.0, 3.0, 1000.0]))
def test_min_max_values_lie_on_the_grid_bit_for_bit(seed: int, bits: int, factor: float) -> None:
    x = torch.randn(200, generator=seeded(seed))
    quantizer = minmax_quantizer(bits)
    quantizer.searching = "minmax"
    quantizer(x)
    quantizer.searching = None
    expected = torch.fake_quantize_per_tensor_affine(factor * x, *parameters(quantizer), 0, 2**bits - 1)
    assert torch.equal(quantizer(factor * x), expected)


@pytest.mark.parametrize("factor", [1.0, 5.0])
def test_the_min_max_gradient_passes_everywhere_also_where_clipped(factor: float) -> None:
    x = torch.randn(200, generator=seeded(0))
    quantizer = minmax_quantizer(3)
    quantizer.searching = "minmax"
    quantizer(x)
    quantizer.searching = None
    leaf = (factor * x).requires_grad_()
    dy = torch.randn(200, generator=seeded(1))
    quantizer(leaf).backward(dy)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, dy)


# --- state ------------------------------------------------------------------------------------------------------------


def test_a_restored_quantizer_gives_the_same_values() -> None:
    x = torch.randn(50, generator=seeded(0))
    quantizer = activation_quantizer(4, 0.2, 5)
    fresh = activation_quantizer(4, 1.0, 0)
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh(x), quantizer(x))
    weight = torch.randn(3, 4, generator=seeded(1)) + 1
    asymmetric = weight_quantizer(4, weight, symmetric=False)
    other = weight_quantizer(4, torch.ones(3, 4), symmetric=False)
    other.load_state_dict(asymmetric.state_dict())
    assert torch.equal(other(weight), asymmetric(weight))


def test_the_range_is_fitted_while_searching_alone() -> None:
    quantizer = activation_quantizer(4, 1.0, 0)
    x = torch.rand(100, generator=seeded(0))
    quantizer(x)
    assert float(quantizer.scale.detach()) == 1
    quantizer.searching = "mse"
    quantizer(x)
    assert float(quantizer.scale.detach()) < 0.07


def test_zero_points_of_a_bias_are_on_the_device_of_its_steps() -> None:
    activation = activation_quantizer(4, 0.1, 0).to("meta")
    weight = weight_quantizer(4, torch.ones(6, 3)).to("meta")
    bias = PerChannelBiasFakeQuantize(
        num_channels=6, dtype=torch.int32, quant_min=-1, quant_max=1, qscheme=torch.per_channel_symmetric
    )
    bias.follow_(activation, weight)
    scale, zero_point = bias.calculate_qparams()
    assert scale.device == zero_point.device == torch.device("meta")
    assert scale.shape == zero_point.shape == (6,)
