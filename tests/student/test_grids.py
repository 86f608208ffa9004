"""Grids of int8: what kernels clip by saturation and one fused activation is what the student clips."""

import numpy as np
import pytest
from hypothesis import given, strategies as st
from torch import nn
from torch.nn import functional as F

from qimera.config.settings import QuantizationSettings
from qimera.errors import UnsupportedModelError
from qimera.student.grids import Grid, Levels, grid_of, widening
from qimera.teacher.teacher import Teacher
from tests import shared
from tests.networks import SPEC, Head, Lambda

ACTIVATIONS = {"NONE": (-np.inf, np.inf), "RELU": (0.0, np.inf), "RELU_N1_TO_1": (-1.0, 1.0)}


@st.composite
def levels(draw: st.DrawFn) -> Levels:
    low = draw(st.integers(0, 254))
    high = draw(st.integers(low + 1, 255))
    return Levels(draw(st.floats(1e-4, 10)), draw(st.integers(low, high)), low, high)


def as_a_kernel_clips(integers: np.ndarray, grid: Grid) -> np.ndarray:
    """Saturate, and clip as the fused activation function does: at its limits, rounded onto the grid."""
    low, high = ACTIVATIONS[grid.activation]
    bounds = [np.clip(np.rint(np.float64(each) / grid.scale) + grid.zero_point, -128, 127) for each in (low, high)]
    return np.clip(np.clip(integers, -128, 127), *bounds).astype(int)


@given(levels())
def test_saturation_and_one_activation_clip_to_exactly_the_levels(wanted: Levels) -> None:
    grid = grid_of(wanted)
    unclipped = np.arange(-300, 600)
    assert (
        as_a_kernel_clips(unclipped + grid.offset, grid) - grid.offset == unclipped.clip(wanted.low, wanted.high)
    ).all()


@given(levels())
def test_the_plain_form_of_a_grid_holds_the_same_integers_in_the_students_unit(wanted: Levels) -> None:
    grid = grid_of(wanted)
    assert grid.plain.scale == wanted.step
    assert (grid.plain.zero_point, grid.plain.unit, grid.plain.activation) == (grid.zero_point, 1, "NONE")
    assert grid.unit * wanted.step == pytest.approx(grid.scale)


def test_a_narrow_unsigned_grid_lies_at_the_top_of_int8() -> None:
    grid = grid_of(Levels(0.1, 0, 0, 15))
    assert (grid.zero_point, grid.offset, grid.activation) == (112, 112, "RELU")


def test_a_clip_in_front_of_a_grid_becomes_fewer_levels() -> None:
    assert Levels(0.1, 10, 0, 255).clipped(0.0, np.inf) == Levels(0.1, 10, 10, 255)
    assert Levels(0.1, 0, 0, 255).clipped(0.0, 6.0) == Levels(0.1, 0, 0, 60)
    assert Levels(0.1, 0, 0, 15).clipped(0.0, 6.0) == Levels(0.1, 0, 0, 15)


def test_a_range_without_zero_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"stem\.conv: .* ranges that hold zero.* export to ONNX instead"):
        grid_of(Levels(0.1, 0, 0, 255).clipped(1.0, 2.0), "stem.conv")


def test_a_layer_whose_range_is_without_zero_is_named_by_the_student() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Lambda(lambda x: F.hardtanh(F.relu(x), 0.1, 0.5)), Head(4)).eval()
    settings = QuantizationSettings(target="litert-builtin")
    with pytest.raises(UnsupportedModelError, match=r"^conv2d: .* ranges that hold zero"):
        shared.fitted(Teacher.capture(model, SPEC), shared.noise(), settings)(shared.noise())


@pytest.mark.parametrize(("lowest", "highest", "factor"), [(-8, 7, 8), (-7, 7, 16), (-127, 127, 1), (-2, 1, 32)])
def test_narrow_weights_are_widened_but_never_to_minus_128(lowest: int, highest: int, factor: int) -> None:
    assert widening(max(-lowest, highest)) == factor


def test_weights_are_widened_only_as_far_as_the_bias_has_room() -> None:
    assert widening(7, 1 << 28) == 4
