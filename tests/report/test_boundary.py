"""boundary.py: the classes that a teacher confuses most, and samples from one of them to the other."""

import dataclasses

import pytest
import torch

from qimera.config.settings import DirectSettings
from qimera.report import boundary
from qimera.report.boundary import nearest_classes, nearest_three, walk_between
from qimera.synthesis.bank import SampleBank
from qimera.teacher.teacher import Teacher


def test_the_three_classes_are_the_nearest_two_and_the_next(bank: SampleBank) -> None:
    logits = torch.full((96, 5), -9.0)
    for row, pair in enumerate(16 * [(1, 3), (1, 3), (1, 3), (3, 4), (3, 4), (0, 2)]):
        logits[row, list(pair)] = 9.0
    confused = dataclasses.replace(bank, logits=logits)
    assert nearest_classes(confused) == (1, 3)
    assert nearest_three(confused) == [1, 3, 4]


def test_the_walk_leads_from_one_class_to_the_other(
    teacher: Teacher, bank: SampleBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boundary, "_MOST_STEPS", 60)
    longer = bank.settings.model_copy(update={"direct": DirectSettings(num_steps=60)})
    walk = walk_between(1, 3, teacher, dataclasses.replace(bank, settings=longer))
    assert walk.pixels.shape == (7, *teacher.input_spec.shape)
    assert float(walk.probabilities[0, 0]) > 0.6 > 0.3 > float(walk.probabilities[-1, 0])
    assert float(walk.probabilities[-1, 1]) > 0.6
    assert nearest_classes(bank)[0] < nearest_classes(bank)[1]
