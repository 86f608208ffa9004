"""layers.py: what each layer costs alone, and where the values of its input lie."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from qimera.config.settings import DistillationSettings, QuantizationSettings
from qimera.pipeline import quantize
from qimera.report.layers import layer_reports
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank
from qimera.teacher.teacher import Teacher
from tests.networks import SPEC, Fragile, Lambda


def student_of(teacher: Teacher, bank: SampleBank, bits: str, layer_bits: str = "") -> Student:
    return quantize(teacher, bank, bits, layer_bits=layer_bits, settings=DistillationSettings(num_steps=0))


def test_fewer_bits_mean_larger_errors(teacher: Teacher, bank: SampleBank) -> None:
    images = bank.take(slice(64)).images
    found = {bits: layer_reports(student_of(teacher, bank, bits), images) for bits in ("w8a8", "w4a4", "w2a2")}
    assert [layer.name for layer in found["w8a8"]] == [layer.name for layer in teacher.layers]
    for eight, four, two in zip(*found.values(), strict=True):
        assert eight.error < four.error < two.error, eight.name
        assert eight.error < 0.01


def test_the_one_layer_with_few_bits_is_the_costly_one(teacher: Teacher, bank: SampleBank) -> None:
    student = student_of(teacher, bank, "w8a8", layer_bits="conv2=w2a8")
    found = {layer.name: layer for layer in layer_reports(student, bank.take(slice(64)).images)}
    assert found["conv2"].weight_bits == 2
    assert found["conv2"].cost == max(layer.cost for layer in found.values())
    assert all(abs(layer.cost) < 0.2 * found["conv2"].cost for name, layer in found.items() if name != "conv2")


COMPENSATED = DistillationSettings(num_steps=0, start="compensated")


def scaled_student(teacher: Teacher, bank: SampleBank, layer_bits: str = "") -> Student:
    """Return a student whose weights are rounded for good, and some of whose channels are scaled."""
    student = quantize(teacher, bank, "w4a4", layer_bits=layer_bits, settings=COMPENSATED)
    assert student.channel_scales
    return student


def test_a_loaded_student_is_reported_as_the_one_that_was_saved(
    teacher: Teacher, bank: SampleBank, tmp_path: Path
) -> None:
    student, images = scaled_student(teacher, bank), bank.take(slice(64)).images
    student.save_state(tmp_path / "student.safetensors")
    loaded = Student.load_state(tmp_path / "student.safetensors", teacher, student.settings)
    assert layer_reports(loaded, images) == layer_reports(student, images)
    with torch.no_grad():
        assert torch.equal(loaded(images), student(images))
        # the same network, whose channels are scaled and scaled back
        torch.testing.assert_close(loaded.reference(images), teacher(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layer", ["conv2", "pointwise"])
def test_the_cost_of_a_layer_whose_weights_are_rounded_for_good_is_seen(
    teacher: Teacher, bank: SampleBank, layer: str
) -> None:
    student = scaled_student(teacher, bank, f"*=w8a8,{layer}=w2a8")
    found = {each.name: each for each in layer_reports(student, bank.take(slice(64)).images)}
    assert max(found.values(), key=lambda each: each.cost).name == layer


def test_ranges_and_tails_are_those_of_the_values(teacher: Teacher, bank: SampleBank) -> None:
    student = student_of(teacher, bank, "w4a4")
    before = {name: value.clone() for name, value in student.module.state_dict().items()}
    for layer in layer_reports(student, bank.take(slice(64)).images):
        assert layer.smallest is not None
        assert layer.smallest <= layer.lower_tail <= layer.upper_tail <= layer.largest
        assert layer.low <= 0 <= layer.high
        assert 0 <= layer.clipped < 20
        if layer.clipped == 0:
            step = (layer.high - layer.low) / 15
            assert layer.low - step <= layer.smallest <= layer.largest <= layer.high + step
    assert all(torch.equal(value, before[name]) for name, value in student.module.state_dict().items())


def test_the_range_of_an_input_is_found_through_a_view_of_any_batch() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU())
    viewed = nn.Sequential(conv, nn.MaxPool2d(4), Lambda(lambda x: x.view(x.size(0), -1)), nn.Linear(4, 5)).eval()
    student = Student(Teacher.capture(viewed, SPEC), QuantizationSettings())
    images = torch.randn(16, *SPEC.shape, generator=torch.Generator().manual_seed(0))
    student.initialize_ranges_([images])
    assert all(layer.high is not None for layer in layer_reports(student, images))


def test_a_layer_that_makes_the_answers_nan_costs_without_limit() -> None:
    torch.manual_seed(0)
    student = Student(Teacher.capture(Fragile(), SPEC), QuantizationSettings(weight_bits=4, activation_bits=4))
    images = torch.randn(16, *SPEC.shape, generator=torch.Generator().manual_seed(0))
    student.initialize_ranges_([images])
    assert layer_reports(student, images)[0].cost == math.inf
