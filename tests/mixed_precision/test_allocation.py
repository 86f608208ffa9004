import re

import pytest
import torch
from torch import nn

from qimera.config.bits import parse_layer_bits
from qimera.config.input_spec import InputSpec
from qimera.config.settings import DistillationSettings, LayerBits, QuantizationSettings, SynthesisSettings
from qimera.errors import ConfigError
from qimera.mixed_precision.allocation import Allocation, allocate_bits
from qimera.mixed_precision.sensitivity import Sensitivity, measure_sensitivity
from qimera.pipeline import quantize, quantize_with
from qimera.quantization.sizes import float_bytes, packed_bytes
from qimera.synthesis.bank import SampleBank
from qimera.teacher.teacher import Teacher

UNTRAINED = DistillationSettings(num_steps=0, start="compensated")


@pytest.fixture(scope="module")
def sensitivity(teacher: Teacher, bank: SampleBank) -> Sensitivity:
    return measure_sensitivity(teacher, bank)


def bits_of(teacher: Teacher, allocation: Allocation) -> QuantizationSettings:
    return QuantizationSettings(layer_bits=parse_layer_bits(allocation.layer_bits))


@pytest.mark.parametrize("share", [0.15, 0.17, 0.2, 0.25])
def test_packed_bytes_of_the_student_stay_within_a_budget_of_size(
    teacher: Teacher, bank: SampleBank, sensitivity: Sensitivity, share: float
) -> None:
    allocation = allocate_bits(teacher, bank, f"size={share}", "w4a5", sensitivity=sensitivity)
    found = bits_of(teacher, allocation)
    assert packed_bytes(teacher, found) == allocation.cost <= share * float_bytes(teacher)
    assert {found.bits_of(layer.name)[1] for layer in teacher.layers} == {5}


@pytest.mark.parametrize("share", [0.008, 0.02, 0.05])
def test_bit_operations_of_the_student_stay_within_a_budget_of_them(
    teacher: Teacher, bank: SampleBank, sensitivity: Sensitivity, share: float
) -> None:
    allocation = allocate_bits(teacher, bank, f"bops={share}", sensitivity=sensitivity)
    found = bits_of(teacher, allocation)
    widths = {layer.name: found.bits_of(layer.name) for layer in teacher.layers}
    first = teacher.layers[0].name
    spent = sum(
        layer.macs * widths[layer.name][0] * (found.input_bits if layer.name == first else widths[layer.name][1])
        for layer in teacher.layers
    )
    assert spent == allocation.cost <= share * 32 * 32 * sum(layer.macs for layer in teacher.layers)


@pytest.mark.parametrize("measure", ["size", "bops"])
def test_a_larger_budget_never_predicts_a_larger_loss(
    teacher: Teacher, bank: SampleBank, sensitivity: Sensitivity, measure: str
) -> None:
    shares = (0.15, 0.17, 0.19, 0.22, 0.28) if measure == "size" else (0.006, 0.01, 0.02, 0.04, 0.06)
    losses = [allocate_bits(teacher, bank, f"{measure}={share}", sensitivity=sensitivity).loss for share in shares]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 2 * losses[-1]


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_bits_by_budget_predict_less_loss_than_the_same_size_spread_evenly(
    teacher: Teacher, bank: SampleBank, sensitivity: Sensitivity, bits: int
) -> None:
    size = packed_bytes(teacher, QuantizationSettings(weight_bits=bits)) / float_bytes(teacher)
    allocation = allocate_bits(teacher, bank, f"size={size + 1e-6:.6f}", sensitivity=sensitivity)
    assert allocation.loss < sum(sensitivity.loss(layer.name, bits) for layer in teacher.layers)


def test_where_the_same_bits_everywhere_are_best_a_budget_finds_them(
    teacher: Teacher, bank: SampleBank, sensitivity: Sensitivity
) -> None:
    size = packed_bytes(teacher, QuantizationSettings(weight_bits=4)) / float_bytes(teacher)
    allocation = allocate_bits(teacher, bank, f"size={size + 1e-6:.6f}", sensitivity=sensitivity)
    assert allocation.loss <= sum(sensitivity.loss(layer.name, 4) for layer in teacher.layers)


def test_the_student_has_the_bits_of_the_allocation(
    teacher: Teacher, bank: SampleBank, sensitivity: Sensitivity
) -> None:
    allocation = allocate_bits(teacher, bank, "bops=0.02", sensitivity=sensitivity)
    student = quantize(teacher, bank, layer_bits=allocation.layer_bits, settings=UNTRAINED)
    for layer in allocation.layers:
        assert student.settings.bits_of(layer.name) == (layer.weight_bits, layer.activation_bits)
    for name in student.layer_names().values():
        levels = student.converted().get_submodule(name).weight
        weight_bits = student.settings.bits_of(name)[0]
        assert -(1 << weight_bits - 1) <= int(levels.min()) < int(levels.max()) < 1 << weight_bits - 1


def test_bits_given_by_name_are_kept_and_count_in_the_budget(
    teacher: Teacher, bank: SampleBank, sensitivity: Sensitivity
) -> None:
    allocation = allocate_bits(teacher, bank, "size=0.29", layer_bits="conv*=w8a6", sensitivity=sensitivity)
    found = bits_of(teacher, allocation)
    assert [layer.name for layer in allocation.layers] == ["depthwise", "pointwise", "fc"]
    assert {found.bits_of(name) for name in ("conv1", "conv2", "conv3")} == {(8, 6)}
    assert packed_bytes(teacher, found) == allocation.cost <= allocation.limit


def test_the_same_seed_measures_and_decides_the_same(teacher: Teacher, bank: SampleBank) -> None:
    torch.manual_seed(1)
    one = allocate_bits(teacher, bank, "size=0.15", seed=4)
    torch.manual_seed(2)
    assert allocate_bits(teacher, bank, "size=0.15", seed=4) == one
    assert Allocation.model_validate_json(one.model_dump_json()) == one


def test_names_that_look_like_patterns_mean_one_layer_alone() -> None:
    """A module may be called anything; [0] must not stand for 0, nor * for every layer."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    model.add_module("f[0]*", nn.Linear(4 * 36, 8))
    model.add_module("f0", nn.Linear(8, 3))
    teacher = Teacher.capture(model, InputSpec(shape=(1, 8, 8), mean=(0.5,), std=(0.25,)))
    names = [layer.name for layer in teacher.layers]
    assert names == ["0", "f[0]*", "f0"]
    losses = {
        name: tuple(scale * 4.0**-bits for bits in range(2, 9)) for name, scale in zip(names, (1, 9, 99), strict=True)
    }
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    bank = SampleBank.from_images(images, torch.full((4, 3), 1 / 3), teacher, SynthesisSettings(), 0)
    allocation = allocate_bits(teacher, bank, "size=0.15", sensitivity=Sensitivity(weights=losses, activations={}))
    found = bits_of(teacher, allocation)
    assert [found.bits_of(name)[0] for name in names] == [layer.weight_bits for layer in allocation.layers]
    assert found.bits_of("f0")[0] > found.bits_of("f[0]*")[0]


def test_its_lines_name_every_layer_once_under_its_bits(
    teacher: Teacher, bank: SampleBank, sensitivity: Sensitivity
) -> None:
    allocation = allocate_bits(teacher, bank, "bops=0.02", layer_bits="fc=8", sensitivity=sensitivity)
    lines = allocation.lines()
    assert re.match(r"bops=0.02: 0\.0\d+ of full precision, fc=w8a8 as given", lines[0])
    text = "\n".join(lines[2:])
    for layer in allocation.layers:
        (line,) = [each for each in lines[2:] if re.search(rf"\b{layer.name} [\d.]+", each)]
        assert line.startswith(f"w{layer.weight_bits}a{layer.activation_bits}  ")
    assert "fc" not in text
    assert max(map(len, lines)) < 120


def test_its_lines_say_what_is_taken_where_every_layer_has_bits_as_given(teacher: Teacher, bank: SampleBank) -> None:
    (line,) = allocate_bits(teacher, bank, "size=0.9", layer_bits="*=8").lines()
    assert re.fullmatch(r"size=0.9: 0\.\d{4} of full precision, \*=w8a8 as given", line)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("size=0.01", r"budget: size=0.01 cannot be met: at 2 bits .*; give size=0\.\d+ to 0\.\d+"),
        ("bops=0.5", r"budget: bops=0.5 leaves nothing to decide: at 8 bits .*leave budget out and give bits w8a8"),
        ("latency=3", "budget: expected size=SHARE or bops=SHARE"),
    ],
)
def test_a_wrong_budget_is_refused(teacher: Teacher, bank: SampleBank, budget: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        allocate_bits(teacher, bank, budget)


def test_a_sensitivity_without_a_layer_that_the_budget_decides_on_is_refused(
    teacher: Teacher, bank: SampleBank, sensitivity: Sensitivity
) -> None:
    of_weights = Sensitivity(weights=sensitivity.weights, activations={})
    with pytest.raises(ConfigError, match=r"sensitivity: does not hold what budget bops=0\.02 needs of conv2"):
        allocate_bits(teacher, bank, "bops=0.02", sensitivity=of_weights)
    with pytest.raises(ConfigError, match=r"sensitivity: does not hold what budget size=0\.2 needs of conv1"):
        allocate_bits(teacher, bank, "size=0.2", sensitivity=Sensitivity(weights={}, activations={}))


def test_a_student_is_not_made_while_the_budget_is_not_turned_into_bits(teacher: Teacher, bank: SampleBank) -> None:
    settings = QuantizationSettings(
        budget="size=0.15", layer_bits=(LayerBits(pattern="fc", weight_bits=8, activation_bits=8),)
    )
    with pytest.raises(ConfigError, match="budget: bits are not found yet; give the layer_bits that allocate_bits"):
        quantize_with(teacher, bank, settings, UNTRAINED)


def test_quantize_finds_the_bits_of_a_budget_by_itself(teacher: Teacher, bank: SampleBank) -> None:
    allocation = allocate_bits(teacher, bank, "size=0.29", "w4a5", layer_bits="conv*=w8a6", seed=4)
    settings = UNTRAINED.replace(start="nearest")
    student = quantize(teacher, bank, "w4a5", layer_bits="conv*=w8a6", budget="size=0.29", settings=settings, seed=4)
    assert student.settings.layer_bits == allocation.all_rules
