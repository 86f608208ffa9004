import time

import numpy as np
import pytest

from qimera.export.verification import compare, latency_ms


def agreement(expected: list[list[float]], actual: list[list[float]]) -> float:
    return compare("a runtime", np.array(expected), np.array(actual), 1, []).agreement


def test_agreement_is_the_share_of_images_with_the_students_class() -> None:
    expected = [[1.0, 0.0, -1.0], [0.0, 2.0, 1.0], [0.0, 1.0, 3.0], [5.0, 1.0, 3.0]]
    actual = [[0.9, 0.1, -1.0], [0.0, 1.0, 1.5], [0.0, 1.0, 3.0], [5.0, 1.0, 3.0]]
    assert agreement(expected, actual) == pytest.approx(75)


def test_of_equal_logits_a_runtime_may_pick_either() -> None:
    """Logits of few bits are often equal; rounding errors of the last digit then decide."""
    expected = [[-1.0, 0.0, 0.0], [0.0, 0.0, -2.0]]
    assert agreement(expected, [[-1.0, -2e-8, 0.0], [-3e-8, 0.0, -2.0]]) == pytest.approx(100)
    assert agreement(expected, [[0.1, -2e-8, 0.0], [-3e-8, 0.0, -2.0]]) == pytest.approx(50)


def test_latency_is_the_median_without_the_first_call() -> None:
    """Here the first takes much longer than the others, of which two in five are quick."""
    pauses = iter([1.0, *[0.0, 0.0, 0.3, 0.3, 0.3]])
    assert 300 <= latency_ms(lambda _: time.sleep(next(pauses)), None) < 900
