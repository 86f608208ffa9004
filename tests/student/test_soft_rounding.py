"""soft_rounding.py: weights that choose between two integers."""

import math

import pytest
import torch

from qimera.student.soft_rounding import SoftRounding

SCALE = torch.tensor([[0.5], [0.25]])


def soft_rounding() -> tuple[SoftRounding, torch.Tensor, torch.Tensor]:
    """Return one of two channels on a grid from -4 to 3, its integers and its real values in steps."""
    rng = torch.Generator().manual_seed(0)
    real = (3 * torch.randn(2, 50, generator=rng)).clamp(-4, 3)
    integers = (real + 0.3 * torch.randn(2, 50, generator=rng)).round().clamp(-4, 3)
    return SoftRounding(SCALE * integers, SCALE * real, SCALE, -4, 3), integers, real


def test_a_weight_starts_three_tenths_of_its_rounding_error_away_from_its_integer() -> None:
    soft, integers, real = soft_rounding()
    steps = soft.between().detach() / SCALE
    for at, integer, exact in zip(steps.flatten(), integers.flatten(), real.flatten(), strict=True):
        missing = float(exact - integer)
        inside = -4 <= integer + math.copysign(1, missing) <= 3
        share = 0.3 * min(abs(missing), 1) if inside else 0.0
        side = math.copysign(1, missing) * (1 if inside else -1)
        assert float(at) == pytest.approx(float(integer) + side * max(share, 0.005), abs=1e-5)


def test_before_training_it_rounds_to_the_integers_that_it_got() -> None:
    soft, integers, _ = soft_rounding()
    torch.testing.assert_close(soft.rounded(), SCALE * integers)


def test_wherever_training_leads_integers_move_by_one_at_most_and_stay_on_the_grid() -> None:
    soft, integers, _ = soft_rounding()
    with torch.no_grad():
        soft.undecided += 20 * torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    counted = soft.rounded() / SCALE
    assert torch.equal(counted, counted.round())
    assert set((counted - integers).abs().unique().tolist()) == {0.0, 1.0}
    assert counted.min() >= -4
    assert counted.max() <= 3


@pytest.mark.parametrize("sharpness", [2.0, 7.5, 20.0])
def test_the_pull_is_the_gradient_of_the_regulariser(sharpness: float) -> None:
    soft, _, _ = soft_rounding()
    with torch.no_grad():
        soft.undecided.copy_(torch.linspace(-2, 2, 100).view(2, 50))
    pulled = soft.pull(sharpness)
    for index in (3, 40, 77):
        values = []
        for change in (-1e-2, 1e-2):
            share = 1.2 / (1 + math.exp(-float(soft.undecided.detach().flatten()[index]) - change)) - 0.1
            values.append(1 - abs(2 * min(max(share, 0), 1) - 1) ** sharpness)
        # a difference quotient instead of a derivative
        assert float(pulled.flatten()[index]) == pytest.approx((values[1] - values[0]) / 2e-2, abs=5e-3)
