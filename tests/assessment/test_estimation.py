import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

from qimera.assessment.estimation import (
    ONE_CLASS,
    SUPERPOSED,
    Calibration,
    distance,
    estimate_drop,
    estimate_from,
    estimate_on_held_out,
    held_out_distances,
    interval,
    telling,
)
from qimera.config.settings import QuantizationSettings, SynthesisSettings
from qimera.errors import ConfigError
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank
from qimera.teacher.teacher import Teacher
from tests import shared
from tests.networks import SPEC, TinyNet

SEEDS = st.integers(0, 2**31 - 1)
EXACT = Calibration(factor=1.0, power=1.0, fixed_error=0.0, relative_error=0.0)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def student_of(teacher: Teacher, bank: SampleBank, bits: int = 3) -> Student:
    settings = QuantizationSettings(weight_bits=bits, activation_bits=bits)
    return shared.fitted(teacher, bank.take(slice(bank.num_training)).images, settings)


class Answering(Student):
    """A student that answers what a function makes of the teacher's logits."""

    device = torch.device("cpu")

    def __init__(self, teacher: Teacher, answer: Callable[[Tensor], Tensor]) -> None:
        nn.Module.__init__(self)
        self.teacher_hash, self.answer, self.teacher = teacher.hash, answer, (teacher,)

    def forward(self, images: Tensor) -> Tensor:
        return self.answer(self.teacher[0](images))


# --- the distance -----------------------------------------------------------------------------------------------------


@given(seed=SEEDS)
def test_the_distance_is_zero_for_equal_and_one_for_disjoint_probabilities(seed: int) -> None:
    logits = torch.randn(4, 6, generator=seeded(seed))
    torch.testing.assert_close(distance(logits + 3, logits), torch.zeros(4), atol=1e-6, rtol=0)  # rounding
    sure = 1000 * torch.eye(6)[:4]
    torch.testing.assert_close(distance(sure.roll(1, 1), sure), torch.ones(4))
    assert bool(((distance(logits.flip(1), logits) >= 0) & (distance(logits.flip(1), logits) <= 1)).all())


@given(seed=SEEDS)
def test_for_sure_models_the_distance_is_the_share_of_disagreements(seed: int) -> None:
    student, teacher = (torch.randint(5, (50,), generator=seeded(seed + i)) for i in range(2))
    logits = [1000 * torch.eye(5)[each] for each in (student, teacher)]
    assert torch.equal(distance(*logits), (student != teacher).float())


# --- the calibration --------------------------------------------------------------------------------------------------


@given(share=st.floats(0.01, 0.5), more=st.floats(1.05, 2.0))
def test_a_larger_distance_gives_a_larger_drop(share: float, more: float) -> None:
    one, two = (estimate_from(torch.full((64,), each), 90.0) for each in (share, more * share))
    assert two.drop > one.drop
    assert two.high > one.high


@given(num_samples=st.integers(2, 200), num_wrong=st.integers(0, 200))
def test_the_interval_of_an_exact_calibration_is_that_of_a_share_of_samples(num_samples: int, num_wrong: int) -> None:
    """The normal approximation of the binomial distribution, two-sided at 90 %."""
    wrong = min(num_wrong, num_samples)
    distances = torch.cat([torch.ones(wrong), torch.zeros(num_samples - wrong)])
    estimate = estimate_from(distances, 0.0, EXACT)
    share = wrong / num_samples
    assert estimate.drop == pytest.approx(100 * share, rel=1e-5)
    half = 1.645 * 100 * (share * (1 - share) / (num_samples - 1)) ** 0.5
    assert estimate.high - estimate.drop == pytest.approx(half, rel=1e-4, abs=1e-6)
    assert estimate.drop - estimate.low == pytest.approx(half, rel=1e-4, abs=1e-6)


def test_the_power_applies_to_percent_and_to_what_samples_scatter() -> None:
    """20 percent with a standard error of 2: squared and divided by 100, 4 points with one of 0.8."""
    drop, low, high = interval(20.0, 2.0, Calibration(factor=0.01, power=2.0, fixed_error=0.0, relative_error=0.0))
    assert (drop, low, high) == pytest.approx((4.0, 4 - 1.645 * 0.8, 4 + 1.645 * 0.8))
    assert interval(0.0, 0.0, Calibration(0.01, 2.0, 1.0, 0.5)) == pytest.approx((0.0, -1.645, 1.645))


def test_more_samples_narrow_the_interval() -> None:
    few = estimate_from(torch.tensor([0.0, 0.2, 0.1, 0.5]), 0.0)
    many = estimate_from(torch.tensor([0.0, 0.2, 0.1, 0.5]).repeat(50), 0.0)
    assert many.drop == pytest.approx(few.drop)
    assert many.high - many.low < few.high - few.low


def test_the_estimate_is_a_sentence() -> None:
    estimate = estimate_from(torch.full((8,), 0.5), 75.0, Calibration(0.1, 1.0, 1.0, 0.0))
    assert estimate.text() == "a drop of 5.0 points (3.4 to 6.6, 90 %), from 8 held-out synthetic samples"


def test_no_sentence_says_minus_zero() -> None:
    estimate = dataclasses.replace(estimate_from(torch.full((8,), 0.5), 75.0), drop=-0.01, low=-0.04, high=0.02)
    assert estimate.text().startswith("a drop of 0.0 points (0.0 to 0.0, ")


# --- students ---------------------------------------------------------------------------------------------------------


def test_a_perfect_student_has_no_drop_and_an_interval_about_it(teacher: Teacher, split_bank: SampleBank) -> None:
    estimate = estimate_on_held_out(Answering(teacher, lambda logits: logits), teacher, split_bank)
    assert estimate.drop == pytest.approx(0, abs=1e-4)  # rounding
    assert estimate.agreement == 100
    assert estimate.low < 0 < estimate.high
    assert estimate.high < 3
    _, superposed = telling(split_bank.held_out.soft_labels, split_bank.held_out.logits)
    assert estimate.num_samples == int(superposed.sum()) > 2


def test_a_student_that_is_always_wrong_has_the_largest_drop(teacher: Teacher, split_bank: SampleBank) -> None:
    wrong = Answering(teacher, lambda logits: 1000 * torch.eye(logits.shape[1])[(logits.argmax(1) + 1) % 5])
    estimate = estimate_on_held_out(wrong, teacher, split_bank)
    assert estimate.agreement == 0
    # The distance cannot exceed 100 percent; the calibration is for students that are still of use.
    assert 0.5 < estimate.drop / (SUPERPOSED.factor * 100**SUPERPOSED.power) <= 1
    assert estimate.high > 35


def test_fewer_bits_are_estimated_to_lose_more(teacher: Teacher, split_bank: SampleBank) -> None:
    drops = [
        estimate_on_held_out(student_of(teacher, split_bank, bits), teacher, split_bank).drop for bits in (8, 4, 3, 2)
    ]
    assert drops == sorted(drops)
    assert drops[0] < 2 < drops[3]


def test_only_the_held_out_samples_are_asked_about(teacher: Teacher, split_bank: SampleBank) -> None:
    student = student_of(teacher, split_bank)
    black = split_bank.pixels.clone()
    black[: split_bank.num_training] = 0
    other = dataclasses.replace(split_bank, pixels=black)
    assert estimate_on_held_out(student, teacher, other) == estimate_on_held_out(student, teacher, split_bank)


def test_the_same_student_gets_the_same_estimate_again(teacher: Teacher, split_bank: SampleBank) -> None:
    student = student_of(teacher, split_bank)
    torch.manual_seed(1)
    one = estimate_on_held_out(student, teacher, split_bank)
    torch.manual_seed(2)
    assert estimate_on_held_out(student, teacher, split_bank) == one


def test_without_held_out_samples_there_is_no_estimate(teacher: Teacher, bank: SampleBank) -> None:
    with pytest.raises(ConfigError, match="holds no held-out samples"):
        estimate_on_held_out(student_of(teacher, bank), teacher, bank)


def test_without_batch_norms_no_held_out_samples_are_missed() -> None:
    teacher = shared.teacher_of("transformer")
    labels = torch.eye(teacher.num_classes).repeat(4, 1)
    settings = SynthesisSettings(num_optimized=len(labels))
    bank = SampleBank.from_images(shared.noise(len(labels)), labels, teacher, settings, 0)
    estimate = estimate_drop(student_of(teacher, bank), teacher, bank)
    assert math.isnan(estimate.drop)
    assert "the network has no batch norms" in estimate.text()


def test_a_student_of_another_teacher_is_refused(teacher: Teacher, split_bank: SampleBank) -> None:
    torch.manual_seed(3)
    other = Teacher.capture(TinyNet().eval(), SPEC)
    with pytest.raises(ConfigError, match="belong to different teachers"):
        estimate_on_held_out(student_of(teacher, split_bank), other, split_bank)


# --- which samples ----------------------------------------------------------------------------------------------------


def test_samples_of_one_class_count_where_the_teacher_is_sure_and_superposed_ones_always_do() -> None:
    sure, unsure = 20 * torch.eye(5), torch.eye(5)
    one, mixed = torch.eye(5), torch.full((5, 5), 0.2)
    single, superposed = telling(torch.cat([one, one, mixed]), torch.cat([sure, unsure, sure]))
    assert single.tolist() == [True] * 5 + [False] * 10
    assert superposed.tolist() == [False] * 10 + [True] * 5


def test_where_the_teacher_is_sure_of_none_all_count() -> None:
    single, superposed = telling(torch.eye(5), torch.eye(5))
    assert single.all()
    assert not superposed.any()


def test_superposed_samples_decide_and_without_any_those_of_one_class(teacher: Teacher, split_bank: SampleBank) -> None:
    """Of 32 held-out samples 16 are superposed; of the others the teacher is sure of 10."""
    labels, logits = split_bank.soft_labels.clone(), split_bank.logits.clone()
    labels[64:], labels[64:80], logits[80:90], logits[90:] = torch.eye(5)[0], 0.2, 20 * torch.eye(5)[0], 0
    bank = dataclasses.replace(split_bank, soft_labels=labels, logits=logits)
    student = student_of(teacher, split_bank)
    single, superposed, agreement = held_out_distances(student, bank)
    assert (len(single), len(superposed)) == (10, 16)
    assert estimate_on_held_out(student, teacher, bank) == estimate_from(superposed, agreement, SUPERPOSED)
    labels[64:80], logits[64:80] = torch.eye(5)[0], 0
    other = dataclasses.replace(bank, soft_labels=labels, logits=logits)
    assert estimate_on_held_out(student, teacher, other) == estimate_from(single, agreement, ONE_CLASS)


@pytest.mark.parametrize(("num_superposed", "used"), [(1, 31), (7, 25), (8, 8), (26, 26)])
def test_a_few_superposed_samples_do_not_outvote_those_of_one_class(
    teacher: Teacher, split_bank: SampleBank, num_superposed: int, used: int
) -> None:
    labels, logits = split_bank.soft_labels.clone(), split_bank.logits.clone()
    labels[64:], logits[64:] = torch.eye(5)[0], 20 * torch.eye(5)[0]
    labels[64 : 64 + num_superposed] = 0.2
    bank = dataclasses.replace(split_bank, soft_labels=labels, logits=logits)
    assert estimate_on_held_out(student_of(teacher, split_bank), teacher, bank).num_samples == used


@pytest.mark.parametrize("calibration", [SUPERPOSED, ONE_CLASS])
def test_the_calibration_expects_scatter(calibration: Calibration) -> None:
    assert calibration.fixed_error > 0
    assert calibration.relative_error > 0
