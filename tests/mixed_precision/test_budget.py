import math
import re

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

from qimera.cli.facts import inspection
from qimera.cli.tables import teacher_facts
from qimera.config.input_spec import InputSpec
from qimera.config.settings import LayerBits, QuantizationSettings
from qimera.errors import ConfigError
from qimera.mixed_precision.budget import (
    Budget,
    bit_operations,
    check_budget,
    fixed_cost,
    layer_choices,
    shares_between,
)
from qimera.quantization.ends import with_rules_for_ends
from qimera.quantization.sizes import float_bytes, packed_bytes, unquantized_bytes
from qimera.student.student import Student
from qimera.teacher.teacher import Teacher
from tests import shared
from tests.networks import NETWORKS, SPEC, Head

TOY = InputSpec(shape=(1, 8, 8), mean=(0.5,), std=(0.25,))


@pytest.fixture(scope="module")
def toy() -> Teacher:
    """A convolution of 72 weights at 36 positions, and a linear layer of 864 weights."""
    return Teacher.capture(
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 6 * 6, 3)), TOY
    )


def settings(budget: str, *rules: tuple[str, int, int], **changes: object) -> QuantizationSettings:
    layer_bits = tuple(LayerBits(pattern=name, weight_bits=w, activation_bits=a) for name, w, a in rules)
    return QuantizationSettings(budget=budget, layer_bits=layer_bits, **changes)


@pytest.mark.parametrize(
    ("text", "measure", "share"),
    [("size=0.14", "size", 0.14), (" bops=.05 ", "bops", 0.05), ("SIZE=1", "size", 1.0), ("bops=1e-2", "bops", 0.01)],
)
def test_a_budget_is_a_share_of_a_measure(text: str, measure: str, share: float) -> None:
    assert Budget.parse(text) == Budget(measure, share)
    assert Budget.parse(str(Budget.parse(text))) == Budget(measure, share)


@pytest.mark.parametrize("text", ["0.14", "size", "size=", "size=0", "size=1.5", "size=-0.1", "flops=0.1", "size=14%"])
def test_what_is_no_budget_is_refused_with_what_was_given(text: str) -> None:
    with pytest.raises(ConfigError, match=f"budget: expected size=SHARE or bops=SHARE .*given '{re.escape(text)}'"):
        Budget.parse(text)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_sizes_of_layers_add_up_to_packed_bytes(name: str, bits: int) -> None:
    teacher = shared.teacher_of(name)
    choices = layer_choices(teacher, settings("size=1"), Budget("size", 1.0))
    assert len({choice.name for choice in choices}) == len(choices)
    expected = packed_bytes(teacher, QuantizationSettings(weight_bits=bits))
    assert sum(choice.costs[bits, 4] for choice in choices) + unquantized_bytes(teacher.module) == expected


def test_bit_operations_count_weights_times_activations_and_the_input_at_its_own_bits(toy: Teacher) -> None:
    convolution, linear = layer_choices(toy, settings("bops=1"), Budget("bops", 1.0))
    assert convolution.costs == {(bits, 4): 72 * 36 * bits * 8 for bits in range(2, 9)}  # reads 8-bit pixels
    assert linear.costs == {(w, a): 864 * w * a for w in range(2, 9) for a in range(2, 9)}
    assert Budget("bops", 1.0).full(toy) == (72 * 36 + 864) * 32 * 32
    assert Budget("bops", 0.5).limit(toy) == (72 * 36 + 864) * 32 * 16


class Attention(nn.Module):
    """Sixteen tokens of six numbers, whose products of activations have two forms, behind a layer called twice."""

    def __init__(self, *, summed: bool) -> None:
        super().__init__()
        self.stem, self.again, self.head = nn.Conv2d(1, 6, 2, stride=2), nn.Conv2d(6, 6, 1), nn.Linear(6, 3)
        self.summed = summed

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.again(self.stem(x)).relu()).flatten(2).transpose(1, 2)
        if self.summed:
            nothing = x.new_zeros(1, 1, 1)
            shares = torch.baddbmm(nothing, x, x.transpose(1, 2)).softmax(-1)
            return self.head(torch.baddbmm(nothing, shares, x).mean(1))
        return self.head(torch.bmm((x @ x.transpose(1, 2)).softmax(-1), x).mean(1))


@pytest.mark.parametrize(("summed", "bits_of_products"), [(False, 5), (True, 32)])
def test_products_of_activations_count_at_their_bits_beside_what_is_decided(
    summed: bool, bits_of_products: int
) -> None:
    """A product that is added to something is computed in floating point."""
    teacher = Teacher.capture(Attention(summed=summed), TOY)
    given = settings("bops=1", ("again", 7, 6), weight_bits=3, activation_bits=5, input_bits=8)
    stem, again, head, products = 16 * 6 * 4 * 3 * 8, 2 * 16 * 36 * 7 * 6, 18 * 3 * 5, 2 * 16 * 16 * 6
    assert bit_operations(teacher, given) == stem + again + head + products * bits_of_products**2
    assert fixed_cost(teacher, given, Budget("bops", 1.0)) == products * bits_of_products**2
    assert Budget("bops", 1.0).full(teacher) == 1024 * (16 * 6 * 4 + 2 * 16 * 36 + 18 + products)


def test_inspect_tells_which_products_of_activations_are_in_integers() -> None:
    teachers = (Teacher.capture(Attention(summed=each), TOY) for each in (False, True))
    integer, summed = (" ".join(teacher_facts(inspection("m", each)).split()) for each in teachers)
    assert "all their weights and inputs; both factors of 2 products of activations;" in integer
    assert "products of activations" not in summed.partition("quantized")[2]
    assert "2 baddbmm" in summed.partition("in float")[2]
    for facts in (integer, summed):
        assert "million multiply-adds (0.0 in products of activations) per image" in facts


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_decided_and_what_is_not_add_up_to_the_bit_operations_of_a_report(name: str) -> None:
    teacher = shared.teacher_of(name)
    given, budget = settings("bops=1", weight_bits=3, activation_bits=6), Budget("bops", 1.0)
    expected = sum(each.costs[3, 6] for each in layer_choices(teacher, given, budget))
    assert bit_operations(teacher, given) == expected + fixed_cost(teacher, given, budget)


@pytest.mark.parametrize("name", ["shared convolution", "shared convolution with bias"])
def test_all_calls_of_a_layer_have_the_bits_of_its_rule(name: str) -> None:
    student = Student(shared.teacher_of(name), settings("", ("conv", 3, 8)))
    student.initialize_ranges_([torch.randn(4, *SPEC.shape, generator=torch.Generator().manual_seed(0))])
    integers = student.converted()
    for call in ("conv", "conv@1", "conv@2"):
        weight = integers.get_submodule(call).weight
        assert (int(weight.min()), int(weight.max())) == (-4, 3)


def test_a_layer_with_a_rule_keeps_its_bits_and_counts(toy: Teacher) -> None:
    convolution, linear = layer_choices(toy, settings("size=1", ("3", 7, 5)), Budget("size", 1.0))
    assert (convolution.is_fixed, linear.is_fixed) == (False, True)
    assert linear.costs == {(7, 5): 864 * 7 // 8 + 3 * 12}


def test_what_can_be_reached_is_named_in_as_many_decimals_as_it_takes() -> None:
    """The last layer alone is open, and its bits make next to no difference beside the others."""
    few = Teacher.capture(nn.Sequential(nn.Conv2d(1, 64, 3), nn.Conv2d(64, 64, 3), Head(64)), TOY)
    asked = settings("bops=0.001", ("0", 8, 7), ("1", 8, 7))
    with pytest.raises(ConfigError, match=r"bops=0\.001 cannot be met") as refused:
        check_budget(few, asked)
    low, high = re.findall(r"0\.\d+", str(refused.value).partition("give bops=")[2])
    assert float(low) < float(high)
    for share in (low, high):
        check_budget(few, asked.replace(budget=f"bops={share}"))


@given(st.data())
def test_shares_that_are_named_lie_where_they_should(data: st.DataObject) -> None:
    full = data.draw(st.integers(1, 10**12))
    lowest = data.draw(st.integers(1, full))
    highest = data.draw(st.integers(lowest, min(full, lowest + 10**6)))
    for share in shares_between(lowest, highest, full).split(" to "):
        assert lowest <= math.floor(float(share) * full) <= highest


def test_a_budget_below_two_bits_or_above_eight_is_refused_with_what_can_be_reached(toy: Teacher) -> None:
    full = float_bytes(toy)
    lowest, highest = (packed_bytes(toy, QuantizationSettings(weight_bits=bits)) / full for bits in (2, 8))
    for budget, message in (("size=0.01", "cannot be met: at 2 bits"), ("size=0.9", "leaves nothing to decide")):
        with pytest.raises(ConfigError, match=f"budget: {budget} {message}") as refused:
            check_budget(toy, settings(budget))
        found = re.search(r"give size=([\d.]+) to ([\d.]+)", str(refused.value))
        assert found is not None
        assert float(found[1]) == pytest.approx(lowest, abs=1e-4)
        assert float(found[2].rstrip(".")) == pytest.approx(highest, abs=1e-4)
        for reachable in found.groups():
            check_budget(toy, settings(f"size={reachable.rstrip('.')}"))


def test_bits_that_are_all_given_may_take_less_than_the_budget_but_not_more(toy: Teacher) -> None:
    rules = (("0", 4, 4), ("3", 4, 4))
    check_budget(toy, settings("size=0.9", *rules))
    with pytest.raises(ConfigError, match=r"budget: size=0.1 cannot be met: at the bits of layer_bits"):
        check_budget(toy, settings("size=0.1", *rules))


def test_a_budget_that_the_bits_of_both_ends_leave_out_of_reach_names_their_setting(toy: Teacher) -> None:
    ends = with_rules_for_ends(QuantizationSettings(first_last_bits=8, budget="size=0.1"), toy)
    with pytest.raises(ConfigError, match=r"cannot be met: at the bits of first_last_bits and layer_bits the model"):
        check_budget(toy, ends)


def test_a_budget_for_the_scheme_of_the_paper_is_refused(toy: Teacher) -> None:
    with pytest.raises(ConfigError, match="budget: needs scheme hardware, given paper"):
        check_budget(toy, settings("size=0.2", scheme="paper"))
