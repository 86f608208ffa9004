import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck

from qimera.config.settings import DistillationSettings, QuantizationSettings
from qimera.errors import ConfigError, DivergenceError
from qimera.graph.folding import fold_batch_norms
from qimera.graph.nodes import with_outputs
from qimera.machine.progress import Progress
from qimera.quantization.losses import block_outputs, feature_loss, kl_loss
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank
from qimera.synthesis.synthesizer import SynthesizerTraining
from qimera.teacher.teacher import Teacher
from qimera.training.distillation import StepwiseAdam, distill_
from tests import reference, shared

SEEDS = st.integers(0, 2**31 - 1)

PLAIN = {"max_shift": 0, "flip": False, "blend_probability": 0.0, "precision": "float32"}
"""Bank samples as they are, and every digit of what is computed of them."""

ONE_STEP = PLAIN | {"num_steps": 1, "batch_size": 24, "optimizer": "sgd", "momentum": 0}
"""A step along the gradient of one batch."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def student_of(teacher: Teacher, bank: SampleBank, bits: int = 3, scheme: str = "hardware") -> Student:
    settings = QuantizationSettings(weight_bits=bits, activation_bits=bits, scheme=scheme)
    return shared.fitted(teacher, bank.take(slice(None)).images, settings)


def distilled(teacher: Teacher, bank: SampleBank, seed: int = 0, bits: int = 3, **settings: object) -> Student:
    student = student_of(teacher, bank, bits)
    values: dict[str, object] = {"num_steps": 3, "batch_size": 16, **settings}
    distill_(student, teacher, bank, DistillationSettings(**values), seeded(seed))
    return student


def same(one: Student, two: Student) -> bool:
    first, second = one.module.state_dict(), two.module.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


# --- losses -----------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, temperature=st.sampled_from([1.0, 4.0, 20.0]), num_classes=st.sampled_from([2, 5, 40]))
def test_the_divergence_is_per_sample_at_the_temperature_times_its_square(
    seed: int, temperature: float, num_classes: int
) -> None:
    student, teacher = (
        4 * torch.randn(3, num_classes, generator=seeded(seed + i), dtype=torch.float64) for i in range(2)
    )
    expected = reference.kl_divergence(student.numpy(), teacher.numpy(), temperature)
    assert float(kl_loss(student, teacher, temperature)) == pytest.approx(expected, rel=1e-7, abs=1e-12)


@given(seed=SEEDS, shift=st.floats(-5, 5))
def test_the_divergence_is_zero_for_equal_probabilities_and_positive_else(seed: int, shift: float) -> None:
    logits = torch.randn(4, 6, generator=seeded(seed), dtype=torch.float64)
    assert float(kl_loss(logits + shift, logits, 2.0)) == pytest.approx(0, abs=1e-12)  # rounding
    assert float(kl_loss(logits.flip(1), logits, 2.0)) > 1e-6


def test_the_divergence_of_a_sample_does_not_depend_on_the_batch() -> None:
    student, teacher = (torch.randn(1, 6, generator=seeded(i)) for i in range(2))
    one, many = kl_loss(student, teacher, 1.0), kl_loss(student.expand(8, 6), teacher.expand(8, 6), 1.0)
    torch.testing.assert_close(one, many)


def test_the_gradient_of_the_divergence_is_that_of_finite_differences() -> None:
    student = torch.randn(3, 5, dtype=torch.float64, generator=seeded(0), requires_grad=True)
    teacher = torch.randn(3, 5, dtype=torch.float64, generator=seeded(1))
    assert gradcheck(lambda logits: kl_loss(logits, teacher, 4.0), (student,))


@given(seed=SEEDS)
def test_the_feature_loss_is_the_error_over_the_teachers_variance(seed: int) -> None:
    shapes = [(4, 3, 5, 5), (4, 7)]
    features, targets = (
        [3 * torch.randn(shape, generator=seeded(seed + i), dtype=torch.float64) for shape in shapes] for i in range(2)
    )
    expected = reference.feature_loss([x.numpy() for x in features], [x.numpy() for x in targets])
    assert float(feature_loss(features, targets)) == pytest.approx(expected, rel=1e-6)  # 1e-8 beside the variance


def test_the_feature_loss_does_not_depend_on_the_unit_of_a_block() -> None:
    mine, theirs = (torch.randn(4, 3, 5, 5, generator=seeded(i)) for i in range(2))
    torch.testing.assert_close(feature_loss([100 * mine], [100 * theirs]), feature_loss([mine], [theirs]))


def test_a_block_that_returns_a_single_number_is_judged_by_its_size() -> None:
    mine, theirs = torch.tensor([[3.0]]), torch.tensor([[2.0]])
    assert float(feature_loss([mine], [theirs])) == pytest.approx(1 / 4)


def test_without_blocks_there_is_no_feature_loss() -> None:
    assert float(feature_loss([], [])) == 0


def test_the_gradient_of_the_feature_loss_is_that_of_finite_differences() -> None:
    mine = torch.randn(2, 3, dtype=torch.float64, generator=seeded(0), requires_grad=True)
    theirs = torch.randn(2, 3, dtype=torch.float64, generator=seeded(1))
    assert gradcheck(lambda x: feature_loss([x], [theirs]), (mine,))


# --- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl_weight", "ce_weight", "feature_weight"), [(1.0, 0.5, 2.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]
)
@pytest.mark.parametrize("scheme", ["hardware", "paper"])
def test_a_step_follows_the_gradient_of_the_three_terms(
    teacher: Teacher, bank: SampleBank, scheme: str, kl_weight: float, ce_weight: float, feature_weight: float
) -> None:
    """The loss is written out again here, on a copy of the student and the same batch."""
    student = student_of(teacher, bank, scheme=scheme)
    twin = copy.deepcopy(student)
    settings = DistillationSettings(
        **ONE_STEP,
        weight_learning_rate=1e-3,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        feature_weight=feature_weight,
        temperature=2.0,
    )
    distill_(student, teacher, bank, settings, seeded(4))

    samples = next(bank.batches(24, seeded(4)))
    images = samples.images.contiguous(memory_format=torch.channels_last)
    folded = fold_batch_norms(teacher.module)
    names = block_outputs(folded)
    with torch.no_grad():
        target, target_features = with_outputs(folded, names)(images)
    logits, features = twin.with_features(names)(images)
    p = (target / 2).softmax(1)
    loss = kl_weight * 4 * (p * (p.log() - (logits / 2).log_softmax(1))).sum(1).mean()
    loss = loss - ce_weight * (samples.soft_labels * logits.log_softmax(1)).sum(1).mean()
    for mine, theirs in zip(features, target_features, strict=True):
        loss = loss + feature_weight * (mine - theirs).square().mean() / theirs.var() / len(names)
    loss.backward()
    moved = 0
    for (name, after), before in zip(student.named_parameters(), twin.parameters(), strict=True):
        gradient = torch.zeros_like(before) if before.grad is None else before.grad
        moved += int(gradient.any())
        # another order of operations, and a difference of numbers 1000 times larger
        slack = 1e-3 * float(gradient.abs().max()) + 2e-3 * float(before.detach().abs().max())
        torch.testing.assert_close((before - after) / 1e-3, gradient, rtol=1e-3, atol=slack, msg=name)
    assert moved > 10


@pytest.mark.parametrize("scheme", ["hardware", "paper"])
def test_weight_decay_acts_on_weights_and_biases_alone(teacher: Teacher, bank: SampleBank, scheme: str) -> None:
    student = student_of(teacher, bank, scheme=scheme)
    twin = copy.deepcopy(student)
    settings = DistillationSettings(
        **ONE_STEP,
        weight_learning_rate=0.1,
        weight_decay=1.0,
        kl_weight=1e-9,
        ce_weight=0.0,
        feature_weight=0.0,
    )
    distill_(student, teacher, bank, settings, seeded(4))
    assert bool(student.steps) == (scheme == "hardware")
    for after, before in zip(student.weights, twin.weights, strict=True):
        torch.testing.assert_close(after, 0.9 * before, rtol=1e-5, atol=1e-7)  # the gradient is not quite 0
    for after, before in zip(student.steps, twin.steps, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-7)


def test_stepwise_adam_moves_a_weight_by_the_rate_in_units_of_its_step() -> None:
    """Adam's first step is the rate in the direction of the gradient, whatever its size."""
    weight = nn.Parameter(torch.zeros(3, 2))
    bias = nn.Parameter(torch.zeros(3))
    unit = torch.tensor([[0.1], [1.0], [10.0]])
    optimizer = StepwiseAdam([{"params": [weight], "lr": 0.5}, {"params": [bias], "lr": 0.25}], [(weight, unit)])
    ((torch.tensor([3.0, -7.0]) * weight).sum() + bias.sum()).backward()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.5, 0.5]) * unit)
    torch.testing.assert_close(bias.detach(), torch.full((3,), -0.25))


def test_adam_has_its_rates_for_weights_biases_and_steps(teacher: Teacher, bank: SampleBank) -> None:
    student = student_of(teacher, bank)
    before = copy.deepcopy(student)
    rates = {"weight_learning_rate": 0.01, "bias_learning_rate": 0.02, "step_learning_rate": 0.03}
    distill_(student, teacher, bank, DistillationSettings(num_steps=1, batch_size=32, **rates), seeded(0))
    for (after, _), (weight, unit) in zip(student.weight_steps(), before.weight_steps(), strict=True):
        moved = (after - weight).abs() / unit
        # the rate, but where the gradient is as small as Adam's constant; a difference of larger numbers
        assert float((moved.detach() - 0.01).abs().quantile(0.5)) < 1e-4
        assert float(moved.detach().max()) < 0.0101
    for after, step in zip(student.steps, before.steps, strict=True):
        assert float((after - step).detach().abs().max()) == pytest.approx(0.03, rel=1e-2)
    quantized = {name for name, each in before.named_parameters() if any(each is w for w, _ in before.weight_steps())}
    others = dict(before.named_parameters())
    for name, after in student.named_parameters():
        if name not in quantized and "log_scale" not in name:
            assert float((after - others[name]).detach().abs().max()) == pytest.approx(0.02, rel=1e-2), name


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "cosine"}, [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]),
        ({"schedule": "milestones", "milestones": (1, 3)}, [1, 0.1, 0.1, 0.01]),
        ({"schedule": "milestones"}, [1, 1, 1, 1]),
    ],
)
def test_rates_follow_the_schedule(
    teacher: Teacher, bank: SampleBank, settings: dict[str, object], expected: list[float]
) -> None:
    """A bias of Adam that always sees the same sign moves by the rate in each step; here the sum of them is seen."""
    student = student_of(teacher, bank)
    bias = dict(student.named_parameters())["module.fc.bias"]
    before = bias.detach().clone()
    shifted = dataclasses.replace(bank, soft_labels=torch.eye(5)[torch.zeros(len(bank), dtype=torch.int64)])
    weights = {"kl_weight": 0.0, "feature_weight": 0.0, "ce_weight": 1.0}
    rates = {"bias_learning_rate": 1e-5, "weight_learning_rate": 1e-9, "step_learning_rate": 1e-9}
    made = DistillationSettings(num_steps=4, batch_size=96, **PLAIN, **weights, **rates, **settings)
    distill_(student, teacher, shifted, made, seeded(0))
    # the gradient hardly changes from step to step, so Adam's step is the rate
    assert float((bias.detach() - before)[0]) == pytest.approx(1e-5 * sum(expected), rel=0.05)


# --- the whole training -----------------------------------------------------------------------------------------------


def test_distillation_brings_the_student_nearer_to_its_teacher(
    teacher: Teacher, bank: SampleBank, toy_images: Tensor
) -> None:
    """On real images, which neither of them sees here."""
    student = student_of(teacher, bank, bits=2)

    def divergence() -> float:
        with torch.no_grad():
            return float(kl_loss(student(toy_images), teacher(toy_images), 1.0))

    before = divergence()
    distill_(student, teacher, bank, DistillationSettings(num_steps=150, batch_size=32, flip=False), seeded(0))
    after = divergence()
    assert after < 0.8 * before


def test_the_last_step_is_the_result(teacher: Teacher, bank: SampleBank) -> None:
    student = student_of(teacher, bank)
    seen: list[Student] = []
    settings = DistillationSettings(num_steps=12, batch_size=16)
    distill_(student, teacher, bank, settings, seeded(0), progress=lambda _: seen.append(copy.deepcopy(student)))
    assert same(seen[-1], student)
    assert not same(seen[0], student)


def test_no_step_no_change(teacher: Teacher, bank: SampleBank) -> None:
    assert same(distilled(teacher, bank, num_steps=0), student_of(teacher, bank))


def test_same_seed_same_student_and_another_seed_another(teacher: Teacher, bank: SampleBank) -> None:
    one, two, other = (distilled(teacher, bank, seed) for seed in (0, 0, 1))
    assert same(one, two)
    assert not same(one, other)


def test_the_teacher_gets_no_gradient_and_stays_bit_for_bit(teacher: Teacher, bank: SampleBank) -> None:
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    distilled(teacher, bank)
    assert all(each.grad is None and not each.requires_grad for each in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_zero_points_stay_where_the_search_put_them(teacher: Teacher, bank: SampleBank) -> None:
    before, after = student_of(teacher, bank).module.state_dict(), distilled(teacher, bank).module.state_dict()
    points = [name for name in before if name.endswith("zero_point")]
    assert points
    assert all(torch.equal(before[name], after[name]) for name in points)


@pytest.mark.parametrize("augmentation", [{"flip": True}, {"max_shift": 2}, {"blend_probability": 1.0}])
def test_augmentation_changes_the_result(teacher: Teacher, bank: SampleBank, augmentation: dict[str, object]) -> None:
    plain = distilled(teacher, bank, num_steps=1, **PLAIN)
    assert not same(plain, distilled(teacher, bank, num_steps=1, **{**PLAIN, **augmentation}))


# --- fresh samples ----------------------------------------------------------------------------------------------------


def test_fresh_samples_without_a_generator_are_refused(teacher: Teacher, bank: SampleBank) -> None:
    with pytest.raises(ConfigError, match=r"fresh_share is 0\.5, but the bank has no generator; set it to 0"):
        distilled(teacher, dataclasses.replace(bank, synthesizer=None), fresh_share=0.5)


def test_fresh_samples_come_from_the_generator_and_the_rest_from_the_bank(teacher: Teacher, bank: SampleBank) -> None:
    """A bank whose labels are not numbers betrays itself when it is read."""
    unreadable = dataclasses.replace(bank, soft_labels=torch.full_like(bank.soft_labels, float("nan")))
    distilled(teacher, unreadable, fresh_share=1.0, ce_weight=1.0)
    with pytest.raises(DivergenceError, match="ce became nan at step 1"):
        distilled(teacher, unreadable, fresh_share=0.5, ce_weight=1.0)


@pytest.mark.parametrize("steps", [0, 2])
def test_the_generator_learns_beside_the_student_when_asked_to(teacher: Teacher, bank: SampleBank, steps: int) -> None:
    assert bank.synthesizer is not None
    synthesizer = copy.deepcopy(bank.synthesizer)
    training = SynthesizerTraining(synthesizer, teacher, bank.settings, 1)
    settings = DistillationSettings(num_steps=3, batch_size=8, fresh_share=1.0, generator_steps_per_step=steps)
    distill_(student_of(teacher, bank), teacher, bank, settings, seeded(0), training=training)
    assert training.num_steps == 3 * steps
    unchanged = torch.equal(synthesizer.embedding.weight, bank.synthesizer.embedding.weight)
    assert unchanged is (steps == 0)


# --- reports ----------------------------------------------------------------------------------------------------------


def test_the_start_every_tenth_step_and_the_last_are_reported(teacher: Teacher, bank: SampleBank) -> None:
    reports: list[Progress] = []
    settings = DistillationSettings(num_steps=23, batch_size=8, ce_weight=0.0, kl_weight=1.0, feature_weight=1.0)
    distill_(student_of(teacher, bank), teacher, bank, settings, seeded(0), progress=reports.append)
    assert [(each.stage, each.step, each.total) for each in reports] == [
        ("distillation", step, 23) for step in (0, 10, 20, 23)
    ]
    assert all(set(each.metrics) == {"kl", "features"} for each in reports[1:])
    assert all(math.isfinite(value) and value >= 0 for each in reports for value in each.metrics.values())


@pytest.mark.parametrize(
    ("weights", "term"),
    [({"kl_weight": 1.0}, "kl"), ({"kl_weight": 0.0, "ce_weight": 1.0}, "ce"), ({"kl_weight": 0.0}, "features")],
)
def test_a_diverging_student_stops_with_the_name_of_the_term(
    teacher: Teacher, bank: SampleBank, weights: dict[str, float], term: str
) -> None:
    student = student_of(teacher, bank)
    with torch.no_grad():
        student.weight_steps()[1][0].fill_(float("nan"))
    with pytest.raises(DivergenceError, match=f"{term} became nan at step 1"):
        distill_(student, teacher, bank, DistillationSettings(num_steps=2, batch_size=8, **weights), seeded(0))
