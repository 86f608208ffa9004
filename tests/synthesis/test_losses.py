import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from qimera.errors import ConfigError
from qimera.synthesis.losses import (
    bns_loss,
    channel_moments,
    entropy_loss,
    heads_loss,
    layer_norm_loss,
    safe_sqrt,
    soft_cross_entropy,
    spread_loss,
    total_variation,
)
from qimera.teacher.teacher import BatchNormTap
from tests import reference

SEEDS = st.integers(0, 2**31 - 1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tap(mean: Tensor, var: Tensor) -> BatchNormTap:
    return BatchNormTap("bn", "conv2d", mean, var)


def random_layers(seed: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[BatchNormTap]]:
    """Return inputs of three batch norms, one of them after a linear layer, and what was recorded of others."""
    generator = seeded(seed)
    shapes = [(4, 3, 5, 6), (4, 2, 1, 3), (4, 7)]
    entering = [torch.randn(shape, generator=generator, dtype=dtype) * (i + 0.5) + i for i, shape in enumerate(shapes)]
    taps = [
        tap(torch.randn(shape[1], generator=generator, dtype=dtype), torch.rand(shape[1], generator=generator) + 0.1)
        for shape in shapes
    ]
    return entering, [tap(each.mean, each.var.to(dtype)) for each in taps]


def statistics_of(x: Tensor) -> BatchNormTap:
    dims = [0, *range(2, x.ndim)]
    return tap(x.mean(dims), x.var(dims, correction=0))


# --- BNS --------------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, relative=st.booleans())
def test_bns_loss_is_the_gap_of_means_and_of_variances(seed: int, relative: bool) -> None:
    entering, taps = random_layers(seed)
    recorded = [(each.mean.numpy(), each.var.numpy()) for each in taps]
    expected = reference.bns_loss([x.numpy() for x in entering], recorded, relative)
    # rtol: the constants that keep the relative loss finite, 1e-8 against variances of at least 0.01
    assert float(bns_loss(entering, taps, relative=relative)) == pytest.approx(expected, rel=1e-5)


@given(seed=SEEDS, relative=st.booleans())
def test_bns_loss_is_zero_when_the_statistics_agree(seed: int, relative: bool) -> None:
    entering, _ = random_layers(seed)
    taps = [statistics_of(x) for x in entering]
    assert float(bns_loss(entering, taps, relative=relative)) == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("statistic", ["mean", "var"])
def test_bns_loss_is_positive_when_one_statistic_of_one_channel_is_off(
    layer: int, statistic: str, relative: bool
) -> None:
    entering, _ = random_layers(0)
    taps = [statistics_of(x) for x in entering]
    getattr(taps[layer], statistic)[0] += 0.1
    assert float(bns_loss(entering, taps, relative=relative)) > 1e-6


@given(seed=SEEDS, factor=st.sampled_from([0.0, 1e-3, 1.0, 1e3, 1e6]))
def test_a_gap_of_variances_alone_costs_at_most_one_relative_to_them(seed: int, factor: float) -> None:
    entering, taps = random_layers(seed)
    centred = [factor * (x - x.mean([0, *range(2, x.ndim)], keepdim=True)) for x in entering]
    zero_mean = [tap(torch.zeros_like(each.mean), each.var) for each in taps]
    assert float(bns_loss(centred, zero_mean, relative=True)) <= 1


@given(seed=SEEDS, factor=st.floats(0.1, 10))
def test_relative_bns_loss_does_not_depend_on_the_unit_of_the_activations(seed: int, factor: float) -> None:
    entering, taps = random_layers(seed)
    loss = bns_loss(entering, taps, relative=True)
    scaled = [tap(factor * each.mean, factor**2 * each.var) for each in taps]
    # rtol: the constant 1e-8 does not scale
    torch.testing.assert_close(
        bns_loss([factor * x for x in entering], scaled, relative=True), loss, rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("by_sums", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_the_gradient_of_the_bns_loss_is_that_of_finite_differences(relative: bool, by_sums: bool) -> None:
    entering, taps = random_layers(0)
    leaves = tuple(x.requires_grad_() for x in entering)
    assert gradcheck(lambda *xs: bns_loss(xs, taps, relative=relative, by_sums=by_sums), leaves)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moments_and_their_gradient_are_those_of_var_mean(layout: torch.memory_format) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 4, 6, generator=rng).to(memory_format=layout).requires_grad_()
    weight = torch.randn(2, 3, generator=rng)
    var, mean = torch.var_mean(x, [0, 2, 3], correction=0)
    (expected,) = torch.autograd.grad((weight[0] * mean + weight[1] * var).sum(), x)
    mine = channel_moments(x)
    assert torch.equal(mine[0], mean)
    assert torch.equal(mine[1], var)
    (actual,) = torch.autograd.grad((weight[0] * mine[0] + weight[1] * mine[1]).sum(), x)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("away", [0.0, 0.1, 3.0])
def test_sums_around_a_value_give_the_moments_to_six_digits(away: float) -> None:
    """Far from zero, where plain sums of squares would leave four of them, and near the value that is looked around."""
    x = 100 + torch.randn(8, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    var, mean = torch.var_mean(x.double(), [0, 2, 3], correction=0)
    found = channel_moments(x, (mean + away).float())
    torch.testing.assert_close(found, (mean.float(), var.float()), rtol=1e-5, atol=0)


def test_a_channel_of_one_value_has_no_negative_variance() -> None:
    x = torch.full((2, 1, 7, 7), 0.1)
    assert float(channel_moments(x, torch.tensor([0.3]))[1]) >= 0


@pytest.mark.parametrize("relative", [False, True])
def test_a_constant_channel_gives_a_finite_gradient(relative: bool) -> None:
    x = torch.zeros(4, 2, 3, 3, requires_grad=True)
    bns_loss([x], [tap(torch.ones(2), torch.ones(2))], relative=relative).backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_bns_loss_refuses_another_number_of_layers() -> None:
    entering, taps = random_layers(0)
    with pytest.raises(ValueError, match="shorter"):
        bns_loss(entering, taps[:2])


def test_the_root_is_a_root_with_a_slope_at_zero() -> None:
    x = torch.tensor([0.0, 1.0, 4.0], requires_grad=True)
    root = safe_sqrt(x)
    root.sum().backward()
    torch.testing.assert_close(root.detach(), torch.tensor([0.0, 1.0, 2.0]), atol=1.1e-4, rtol=0)  # sqrt(1e-8)
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


# --- cross-entropy and smoothness -------------------------------------------------------------------------------------


@given(seed=SEEDS, num_classes=st.sampled_from([2, 5, 40]))
def test_soft_cross_entropy_weighs_log_probabilities_with_the_label(seed: int, num_classes: int) -> None:
    logits = 3 * torch.randn(4, num_classes, generator=seeded(seed), dtype=torch.float64)
    label = torch.randn(4, num_classes, generator=seeded(seed + 1), dtype=torch.float64).softmax(1)
    expected = reference.soft_cross_entropy(logits.numpy(), label.numpy())
    assert float(soft_cross_entropy(logits, label)) == pytest.approx(expected, rel=1e-9)


def test_soft_cross_entropy_is_least_where_the_probabilities_are_the_label() -> None:
    label = torch.tensor([[0.6, 0.3, 0.1]])
    least = float(soft_cross_entropy(label.log(), label))
    for change in torch.eye(3):
        assert float(soft_cross_entropy(label.log() + 0.1 * change, label)) > least


def test_the_gradient_of_soft_cross_entropy_is_that_of_finite_differences() -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, generator=seeded(0), requires_grad=True)
    label = torch.randn(3, 5, dtype=torch.float64, generator=seeded(1)).softmax(1)
    assert gradcheck(soft_cross_entropy, (logits, label))


@given(
    seed=SEEDS,
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(2, 6), st.integers(2, 6)),
)
def test_total_variation_is_the_mean_gap_between_neighbours(seed: int, shape: tuple[int, int, int, int]) -> None:
    images = torch.randn(shape, generator=seeded(seed), dtype=torch.float64)
    assert float(total_variation(images)) == pytest.approx(reference.total_variation(images.numpy()), rel=1e-9)


def test_a_flat_image_has_no_total_variation() -> None:
    assert float(total_variation(torch.full((2, 3, 8, 8), 0.7))) == 0


def test_total_variation_of_a_ramp_is_its_slope() -> None:
    ramp = np.arange(8.0)[None, None, :, None] * 0.5 + np.arange(8.0) * 0.25
    assert float(total_variation(torch.tensor(ramp))) == pytest.approx(0.75)


# --- networks without batch norms -------------------------------------------------------------------------------------


def test_the_layer_norm_loss_is_the_gap_of_means_and_deviations() -> None:
    """Tokens of a transformer, and a map with channels last."""
    entering = [2 + 3 * torch.randn(shape, generator=seeded(0)) for shape in ((4, 5, 6), (2, 3, 3, 7))]
    expected = []
    for x in entering:
        tokens = x.double().reshape(-1, x.shape[-1]).numpy()
        normal = np.array([(each - each.mean()) / np.sqrt(each.var() + 1e-5) for each in tokens])
        gaps = [(column.mean() ** 2 + (column.std() - 1) ** 2) / (column.var() + 1) for column in normal.T]
        expected.append(np.mean(gaps))
    assert float(layer_norm_loss(entering)) == pytest.approx(np.mean(expected), rel=1e-4)  # float32


def test_a_layer_norm_with_a_still_channel_costs_more() -> None:
    x = torch.randn(64, 8, generator=seeded(0))
    loud = x.clone()
    loud[:, 0] *= 20
    assert float(layer_norm_loss([loud])) > 2 * float(layer_norm_loss([x]))


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-3)])
def test_the_spread_loss_is_the_spread_of_similarities(dtype: torch.dtype, error: float) -> None:
    """Of heads whose features stand side by side, and of windows that stand alone."""
    heads, windows = torch.randn(2, 3, 5, 4, generator=seeded(0)), torch.randn(6, 5, 4, generator=seeded(1))
    expected = []
    for images in (heads.transpose(1, 2).reshape(2, 5, 12), windows):
        spreads = []
        for tokens in images.double().numpy():
            directions = [token / np.sqrt((token**2).sum()) for token in tokens]
            spreads.append(np.std([first @ second for first in directions for second in directions]))
        expected.append(-np.mean(spreads))
    assert float(spread_loss([heads.to(dtype), windows.to(dtype)])) == pytest.approx(np.mean(expected), rel=error)


def test_tokens_that_are_all_alike_have_a_gradient() -> None:
    tokens = torch.ones(1, 1, 4, 8, requires_grad=True)
    spread_loss([tokens]).backward()
    assert bool(tokens.grad.isfinite().all())


def test_the_entropy_loss_is_that_of_a_density_of_similarities() -> None:
    tokens = torch.randn(3, 5, 4, generator=seeded(0))
    points, entropies = np.linspace(-1, 1, 41), []
    for each in tokens.double().numpy():
        directions = [token / np.sqrt((token**2).sum()) for token in each]
        similarities = [first @ second for first in directions for second in directions]
        kernels = [[np.exp(-0.5 * ((x - point) / 0.05) ** 2) for x in similarities] for point in points]
        density = np.mean(kernels, axis=1) / (0.05 * np.sqrt(2 * np.pi))
        entropies.append(-np.trapezoid(density * np.log(density + 1e-8), points))
    assert float(entropy_loss([tokens])) == pytest.approx(-np.mean(entropies), rel=1e-4)  # float32


def test_the_entropy_loss_keeps_little_for_its_gradient() -> None:
    """At 41 points, each of which looks at all similarities."""
    tokens, kept = torch.randn(2, 16, 4, generator=seeded(0), requires_grad=True), {}

    def keep(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = entropy_loss([tokens])
    assert sum(kept.values()) < 4 * 2 * 16**2
    loss.backward()
    assert gradcheck(lambda x: entropy_loss([x]), [torch.randn(2, 3, 4, generator=seeded(1)).double().requires_grad_()])


@pytest.mark.parametrize("num_tokens", [4, 6])
def test_the_heads_loss_compares_what_each_pair_of_heads_looks_at(num_tokens: int) -> None:
    scores = torch.randn(2, 3, num_tokens, num_tokens, generator=seeded(0))
    losses = []
    for image in scores.double().numpy():
        for query in range(num_tokens):
            maps = [(row - row.min()) / (row.max() - row.min()) for row in image[:, query]]
            for a in range(3):
                for b in set(range(3)) - {a}:
                    covariance = np.mean((maps[a] - maps[a].mean()) * (maps[b] - maps[b].mean()))
                    ssim = (2 * maps[a].mean() * maps[b].mean() + 1e-4) * (2 * covariance + 9e-4)
                    ssim /= maps[a].mean() ** 2 + maps[b].mean() ** 2 + 1e-4
                    ssim /= maps[a].var() + maps[b].var() + 9e-4
                    losses.append(1 - ssim**2)
    assert float(heads_loss([scores])) == pytest.approx(np.mean(losses), rel=1e-4)  # float32


def test_a_class_token_is_left_out_of_the_heads_loss() -> None:
    scores = torch.randn(2, 3, 5, 5, generator=seeded(0))
    assert float(heads_loss([scores])) == float(heads_loss([scores[:, :, 1:, 1:]]))


def test_the_heads_loss_asks_for_several_heads() -> None:
    with pytest.raises(ConfigError, match='take "spread" or "entropy"'):
        heads_loss([torch.randn(2, 1, 4, 4), torch.randn(6, 4, 4)])
