import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from qimera.assessment.diagnostics import diagnose
from qimera.assessment.estimation import estimate_drop
from qimera.assessment.selection import choose
from qimera.config.recipes import recipe
from qimera.config.settings import (
    DirectSettings,
    DistillationSettings,
    GeneratorSettings,
    LabelSettings,
    SynthesisSettings,
)
from qimera.machine.progress import COMPILING, Progress
from qimera.mixed_precision.sensitivity import measure_sensitivity
from qimera.pipeline import quantize, recipe_for, synthesize
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank
from qimera.synthesis.parts import parts_of
from qimera.teacher.teacher import Teacher
from tests import shared
from tests.networks import NUM_CLASSES, SPEC, TinyNet

SHORT = DistillationSettings(num_steps=4, batch_size=16)


def short_synthesis(generated: int = 12, optimized: int = 12, **changes: object) -> SynthesisSettings:
    values: dict[str, object] = {
        "num_generated": generated,
        "num_optimized": optimized,
        "generator": GeneratorSettings(num_steps=2, batch_size=8, base_channels=8, mapping_dim=4),
        "direct": DirectSettings(num_steps=2, batch_size=8),
    }
    return SynthesisSettings(**{**values, **changes})


def same_bank(one: SampleBank, two: SampleBank) -> bool:
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in ("pixels", "soft_labels", "logits"))


def same_student(one: Student, two: Student) -> bool:
    first, second = one.module.state_dict(), two.module.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


# --- the user's model -------------------------------------------------------------------------------------------------


def test_a_plain_model_serves_wherever_its_teacher_does(tiny_model: TinyNet, tmp_path: Path) -> None:
    bank = synthesize(tiny_model, SPEC, short_synthesis(num_held_out=8))
    bank.save(tmp_path / "bank")
    student = quantize(tiny_model, bank, settings=SHORT)
    teacher = Teacher.capture(tiny_model, SPEC)
    assert same_bank(SampleBank.load(tmp_path / "bank", tiny_model), bank)
    assert repr(diagnose(bank, tiny_model)) == repr(diagnose(bank, teacher))  # repr: NaN is not equal to itself
    assert repr(estimate_drop(student, tiny_model, bank)) == repr(estimate_drop(student, teacher, bank))
    assert choose([student], tiny_model, bank) == 0
    measured = measure_sensitivity(tiny_model, bank, activations=False)
    assert measured == measure_sensitivity(teacher, bank, activations=False)


@pytest.mark.parametrize("scheme", ["hardware", "paper"])
def test_a_whole_run_leaves_the_users_model_bit_for_bit_as_it_was(tiny_model: TinyNet, scheme: str) -> None:
    model = copy.deepcopy(tiny_model).train()
    model.conv2.weight.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    flags = {name: each.requires_grad for name, each in model.named_parameters()}
    bank = synthesize(model, SPEC, short_synthesis())
    quantize(model, bank, "w3a3", scheme=scheme, settings=SHORT)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: each.requires_grad for name, each in model.named_parameters()} == flags
    assert all(each.grad is None for each in model.parameters())
    assert all(module.training for module in model.modules())


def test_a_whole_run_leaves_the_teacher_bit_for_bit_as_it_was(teacher: Teacher) -> None:
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    statistics = [(tap.mean.clone(), tap.var.clone()) for tap in teacher.batch_norms]
    weight, hash_before = teacher.classifier.weight.clone(), teacher.hash
    bank = synthesize(teacher, settings=short_synthesis())
    quantize(
        teacher, bank, settings=recipe("paper", SPEC, NUM_CLASSES).distillation.model_copy(update={"num_steps": 2})
    )
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
    assert all(each.grad is None and not each.requires_grad for each in teacher.parameters())
    assert torch.equal(teacher.classifier.weight, weight)
    for tap, (mean, var) in zip(teacher.batch_norms, statistics, strict=True):
        assert torch.equal(tap.mean, mean)
        assert torch.equal(tap.var, var)
    assert Teacher(teacher.module, SPEC).hash == hash_before


def test_a_model_and_its_teacher_give_the_same(tiny_model: TinyNet, teacher: Teacher) -> None:
    one, two = synthesize(tiny_model, SPEC, short_synthesis()), synthesize(teacher, settings=short_synthesis())
    assert same_bank(one, two)
    assert same_student(quantize(tiny_model, one, settings=SHORT), quantize(teacher, two, settings=SHORT))


# --- seeds ------------------------------------------------------------------------------------------------------------


def test_same_seed_same_bank_and_another_seed_another(teacher: Teacher) -> None:
    torch.manual_seed(1)
    one = synthesize(teacher, settings=short_synthesis(), seed=5)
    torch.manual_seed(2)
    two = synthesize(teacher, settings=short_synthesis(), seed=5)
    other = synthesize(teacher, settings=short_synthesis(), seed=6)
    assert same_bank(one, two)
    assert not torch.equal(one.pixels, other.pixels)
    assert not torch.equal(one.soft_labels, other.soft_labels)


def test_same_seed_same_student_and_another_seed_another(teacher: Teacher, bank: SampleBank) -> None:
    torch.manual_seed(1)
    one = quantize(teacher, bank, settings=SHORT, seed=5)
    torch.manual_seed(2)
    two = quantize(teacher, bank, settings=SHORT, seed=5)
    assert same_student(one, two)
    assert not same_student(one, quantize(teacher, bank, settings=SHORT, seed=6))


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_callers_may_have_switched_gradients_off(
    tiny_model: TinyNet, teacher: Teacher, without_gradients: Callable[[], AbstractContextManager[object]]
) -> None:
    with without_gradients():
        bank = synthesize(tiny_model, SPEC, short_synthesis())
        student = quantize(tiny_model, bank, settings=SHORT)
    assert same_bank(bank, synthesize(teacher, settings=short_synthesis()))
    assert same_student(student, quantize(teacher, bank, settings=SHORT))


def test_one_bank_serves_every_run_unchanged(teacher: Teacher, bank: SampleBank) -> None:
    """Also where the generator goes on learning beside the student, as in the paper."""
    assert bank.synthesizer is not None
    before = copy.deepcopy(bank.synthesizer.state_dict())
    settings = recipe("paper", SPEC, NUM_CLASSES).distillation.model_copy(update={"num_steps": 2, "batch_size": 8})
    one, two = (quantize(teacher, bank, "w3a3", settings=settings) for _ in range(2))
    assert same_student(one, two)
    after = bank.synthesizer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not bank.synthesizer.training


# --- the bank ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("generated", "optimized"), [(12, 0), (0, 12), (9, 11), (17, 2)])
def test_the_bank_has_as_many_samples_as_asked_for(teacher: Teacher, generated: int, optimized: int) -> None:
    bank = synthesize(teacher, settings=short_synthesis(generated, optimized))
    assert len(bank) == generated + optimized
    torch.testing.assert_close(bank.soft_labels.sum(1), torch.ones(len(bank)))
    assert (bank.synthesizer is not None) is (generated > 0)
    assert bank.teacher_hash == teacher.hash


@pytest.mark.parametrize(("generated", "optimized"), [(12, 0), (0, 12), (9, 11)])
def test_held_out_samples_come_beside_the_others_and_do_not_change_them(
    teacher: Teacher, generated: int, optimized: int
) -> None:
    plain = synthesize(teacher, settings=short_synthesis(generated, optimized))
    split = synthesize(teacher, settings=short_synthesis(generated, optimized, num_held_out=10))
    assert len(split) == len(plain) + 10
    assert split.num_training == len(plain)
    assert torch.equal(split.pixels[: len(plain)], plain.pixels)
    assert torch.equal(split.soft_labels[: len(plain)], plain.soft_labels)
    known = {tuple(image.flatten().tolist()) for image in plain.pixels}
    assert not any(tuple(image.flatten().tolist()) in known for image in split.pixels[len(plain) :])
    assert same_student(quantize(teacher, plain, settings=SHORT), quantize(teacher, split, settings=SHORT))


def test_steps_of_held_out_samples_are_reported_with_the_others(teacher: Teacher) -> None:
    steps: list[tuple[int, int]] = []
    settings = short_synthesis(0, 12, num_held_out=5)
    synthesize(teacher, settings=settings, progress=lambda each: steps.append((each.step, each.total)))
    assert steps == [(step, 6) for step in range(7)]


@given(total=st.integers(2, 2000), size=st.integers(2, 256))
def test_parts_add_up_and_none_is_a_single_sample(total: int, size: int) -> None:
    settings = SynthesisSettings(num_optimized=total, direct=DirectSettings(batch_size=size))
    parts = [len(part.first) for part in parts_of(settings, 10, torch.Generator())]
    assert sum(parts) == total
    assert max(parts) <= size
    assert min(parts) >= 2 or (size == 2 and total % 2)


@pytest.mark.parametrize("start", ["noise", "generator"])
@pytest.mark.parametrize(("generated", "optimized"), [(40, 0), (0, 40)])
def test_with_probability_zero_no_sample_of_the_bank_is_superposed(
    teacher: Teacher, generated: int, optimized: int, start: str
) -> None:
    labels = LabelSettings(superposition_probability=0.0)
    direct = DirectSettings(num_steps=1, batch_size=20, start=start)
    bank = synthesize(teacher, settings=short_synthesis(generated, optimized, labels=labels, direct=direct))
    assert bool((bank.soft_labels.amax(1) == 1).all())


@pytest.mark.parametrize("start", ["noise", "generator"])
@pytest.mark.parametrize(("generated", "optimized"), [(40, 0), (0, 40)])
def test_with_probability_one_samples_of_both_producers_are_superposed(
    teacher: Teacher, generated: int, optimized: int, start: str
) -> None:
    labels = LabelSettings(superposition_probability=1.0, num_superposed_classes=3)
    direct = DirectSettings(num_steps=1, batch_size=20, start=start)
    bank = synthesize(teacher, settings=short_synthesis(generated, optimized, labels=labels, direct=direct))
    superposed = (bank.soft_labels.amax(1) < 1).float().mean()
    assert float(superposed) > 0.75  # three draws of one class out of five: 1 in 25


@pytest.mark.parametrize(("generated", "optimized"), [(22, 0), (0, 22), (11, 11)])
def test_classes_are_equally_frequent_even_where_a_batch_holds_but_some(
    teacher: Teacher, generated: int, optimized: int
) -> None:
    few = GeneratorSettings(num_steps=1, batch_size=3, base_channels=8, mapping_dim=4)
    settings = short_synthesis(
        generated,
        optimized,
        labels=LabelSettings(superposition=False),
        generator=few,
        direct=DirectSettings(num_steps=1, batch_size=3),
    )
    counts = synthesize(teacher, settings=settings).soft_labels.argmax(1).bincount(minlength=NUM_CLASSES)
    assert counts.tolist() == [4 + int(count > 4) for count in counts]
    assert int(counts.sum()) == 22


def test_every_class_appears_in_a_small_bank(teacher: Teacher) -> None:
    bank = synthesize(teacher, settings=short_synthesis(0, 5, labels=LabelSettings(superposition=False)))
    assert sorted(bank.soft_labels.argmax(1).tolist()) == list(range(NUM_CLASSES))


def test_optimised_samples_are_what_the_teacher_was_asked_for(teacher: Teacher) -> None:
    labels = LabelSettings(superposition_probability=0.5)
    direct = DirectSettings(num_steps=60, batch_size=40, ce_weight=1.0)
    bank = synthesize(teacher, settings=short_synthesis(0, 40, labels=labels, direct=direct))
    gap = (bank.logits.softmax(1) - bank.soft_labels).abs().sum(1) / 2
    assert float(gap.mean()) < 0.25


def test_gdfq_is_the_generator_without_superposition_mapping_and_extracted_embeddings(teacher: Teacher) -> None:
    settings = recipe("gdfq", SPEC, NUM_CLASSES).synthesis
    generator = settings.generator.model_copy(update={"num_steps": 1, "batch_size": 8, "base_channels": 8})
    bank = synthesize(teacher, settings=settings.model_copy(update={"num_generated": 10, "generator": generator}))
    assert bool((bank.soft_labels.amax(1) == 1).all())
    assert bank.synthesizer is not None
    assert isinstance(bank.synthesizer.mapping, torch.nn.Identity)
    assert bank.synthesizer.embedding.latent_dim == settings.generator.embedding_dim


# --- students ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["hardware", "paper"])
def test_an_eight_bit_student_agrees_with_its_teacher(
    teacher: Teacher, bank: SampleBank, toy_images: Tensor, scheme: str
) -> None:
    student = quantize(teacher, bank, "w8a8", scheme=scheme, settings=DistillationSettings(num_steps=20, batch_size=32))
    with torch.no_grad():
        agreement = (student(toy_images).argmax(1) == teacher(toy_images).argmax(1)).float().mean()
    assert float(agreement) >= 0.99


@pytest.mark.parametrize("scheme", ["hardware", "paper"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_trained_student_converts_to_itself(
    teacher: Teacher, bank: SampleBank, toy_images: Tensor, scheme: str, optimizer: str
) -> None:
    """At once after training, before the student is called again."""
    settings = SHORT.model_copy(update={"optimizer": optimizer, "weight_learning_rate": 1e-2})
    student = quantize(teacher, bank, "w3a4", scheme=scheme, layer_bits="fc=8", settings=settings)
    converted = student.converted()
    with torch.no_grad():
        assert torch.equal(converted(toy_images[:64]), student.module(toy_images[:64]))


def test_bits_by_layer_reach_the_student(teacher: Teacher, bank: SampleBank) -> None:
    student = quantize(teacher, bank, "w4a5", layer_bits="conv1=8,*fc*=w8a6", settings=SHORT)
    assert student.settings.bits_of("conv2") == (4, 5)
    assert student.settings.bits_of("conv1") == (8, 8)
    assert student.settings.bits_of("fc") == (8, 6)


# --- progress ---------------------------------------------------------------------------------------------------------


def test_every_stage_reports_up_to_its_total(teacher: Teacher) -> None:
    reports: list[Progress] = []
    bank = synthesize(teacher, settings=short_synthesis(), progress=reports.append)
    quantize(teacher, bank, settings=SHORT, progress=reports.append)
    by_stage: dict[str, list[Progress]] = {}
    for report in reports:
        by_stage.setdefault(report.stage, []).append(report)
    assert list(by_stage) == ["generator", "direct", "ranges", "distillation"]
    for stage, found in by_stage.items():
        steps = [each.step for each in found]
        assert steps == sorted(steps), stage
        assert found[-1].step == found[-1].total, stage
    assert set(by_stage["generator"][0].metrics) == {"generator_ce", "generator_bns", "generator_tv"}
    assert set(by_stage["direct"][1].metrics) == {"direct_ce", "direct_bns", "direct_tv"}


@pytest.mark.parametrize(("mode", "note"), [("never", ""), ("auto", ""), ("always", COMPILING)])
def test_who_waits_for_a_compiler_is_told(teacher: Teacher, bank: SampleBank, mode: str, note: str) -> None:
    reports: list[Progress] = []
    direct = DirectSettings(num_steps=1, batch_size=8, compile=mode)
    synthesize(teacher, settings=short_synthesis(0, 8, direct=direct), progress=reports.append)
    quantize(teacher, bank, settings=SHORT.model_copy(update={"compile": mode}), progress=reports.append)
    first = {each.stage: each.note for each in reports if each.step == 0 and each.stage != "ranges"}
    assert first == {"direct": note, "distillation": note}
    assert all(not each.note for each in reports if each.step)


@pytest.mark.parametrize(
    ("network", "name", "is_alone", "held_out"),
    [
        ("residual", "ptq", True, 128),
        ("transformer", "ptq", True, 0),
        ("transformer", None, True, 0),
        ("transformer", "ptq", False, 128),  # one of several, which are judged by them
        ("transformer", "images", True, 128),  # it has no others
    ],
)
def test_samples_are_held_out_where_there_is_an_estimate(
    network: str, name: str | None, is_alone: bool, held_out: int
) -> None:
    made = recipe_for(shared.teacher_of(network), name, is_alone=is_alone)
    assert made.synthesis.num_held_out == held_out
