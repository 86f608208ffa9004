"""Comparing a LiteRT file with its student; the model in full precision is there for its time alone."""

import logging

import pytest

pytest.importorskip("ai_edge_litert", reason="pip install 'qimera[litert]'")

from qimera.config.settings import QuantizationSettings
from qimera.litert.verification import verify_litert
from qimera.lowering.model import lower
from qimera.teacher.teacher import Teacher
from tests import shared


def test_a_model_in_full_precision_that_does_not_run_costs_its_time_alone(
    teacher: Teacher, caplog: pytest.LogCaptureFixture
) -> None:
    student = shared.fitted(teacher, shared.noise(), QuantizationSettings())
    lowered = lower(student)
    with caplog.at_level(logging.WARNING):
        found = verify_litert(
            student, lowered.content(), lowered, None, min_agreement=90.0, float_content=b"no model at all"
        )
    assert "the model in full precision does not run" in caplog.text
    assert [each.float_latency_ms for each in found.comparisons] == [None, None]
    assert all(each.latency_ms for each in found.comparisons)
