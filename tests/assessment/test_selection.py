import copy
import math
from pathlib import Path

import pytest
import torch

from qimera.assessment.estimation import Estimate, estimate_on_held_out
from qimera.assessment.selection import BestState, choose
from qimera.config.settings import DistillationSettings, QuantizationSettings
from qimera.errors import ConfigError
from qimera.machine.checkpoint import Checkpoints
from qimera.machine.progress import Progress
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank
from qimera.teacher.teacher import Teacher
from qimera.training.distillation import distill_
from tests import shared


def student_of(teacher: Teacher, bank: SampleBank, bits: int = 3) -> Student:
    settings = QuantizationSettings(weight_bits=bits, activation_bits=bits)
    return shared.fitted(teacher, bank.take(slice(bank.num_training)).images, settings)


def state(student: Student) -> dict[str, torch.Tensor]:
    return copy.deepcopy(student.module.state_dict())


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


# --- several students -------------------------------------------------------------------------------------------------


def test_the_best_of_several_students_is_the_one_of_most_bits(teacher: Teacher, split_bank: SampleBank) -> None:
    students = [student_of(teacher, split_bank, bits) for bits in (2, 8, 3)]
    assert choose(students, teacher, split_bank) == 1
    assert choose([students[0], students[0]], teacher, split_bank) == 0


def test_a_student_without_an_estimate_is_never_the_best(teacher: Teacher, split_bank: SampleBank) -> None:
    broken, sound = (student_of(teacher, split_bank) for _ in range(2))
    with torch.no_grad():
        for step in broken.steps:
            step.fill_(torch.nan)
    assert math.isnan(estimate_on_held_out(broken, teacher, split_bank).drop)
    assert [choose(each, teacher, split_bank) for each in ([broken, sound], [sound, broken])] == [1, 0]


def test_without_held_out_samples_nothing_can_be_judged(teacher: Teacher, bank: SampleBank) -> None:
    with pytest.raises(ConfigError, match="holds no held-out samples"):
        choose([student_of(teacher, bank)], teacher, bank)


# --- the best state of a training -------------------------------------------------------------------------------------


def test_the_best_state_is_restored(teacher: Teacher, split_bank: SampleBank) -> None:
    """States of a student that gets worse, better and worse again; the better one is kept whole."""
    student = student_of(teacher, split_bank, bits=8)
    good = state(student)
    settings = DistillationSettings(num_steps=3, select_every=1)

    def spoil(factor: float) -> None:
        with torch.no_grad():
            for weight, _ in student.weight_steps():
                weight.mul_(factor)

    spoil(0.5)
    best = BestState(student, teacher, split_bank, settings)
    best.consider(0)
    spoil(0.5)
    best.consider(1)
    student.module.load_state_dict(good)
    best.consider(2)
    spoil(0.3)
    best.consider(3)
    best.restore_()
    assert best.step == 2
    assert same(state(student), good)


@pytest.mark.parametrize(("every", "looked_at"), [(0, []), (2, [0, 2, 4, 5]), (5, [0, 5]), (9, [0, 5])])
def test_it_looks_every_so_many_steps_and_at_the_last(
    teacher: Teacher, split_bank: SampleBank, every: int, looked_at: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    student = student_of(teacher, split_bank)
    seen: list[int] = []
    now = 0

    def look(*_: object) -> Estimate:
        seen.append(now)
        return Estimate(1.0, 0.0, 2.0, 90.0, 8)

    monkeypatch.setattr("qimera.assessment.selection.estimate_on_held_out", look)
    best = BestState(student, teacher, split_bank, DistillationSettings(num_steps=5, select_every=every))
    for now in range(6):
        best.consider(now)
    assert seen == looked_at


def test_a_training_that_makes_the_student_worse_is_undone(teacher: Teacher, split_bank: SampleBank) -> None:
    settings = DistillationSettings(num_steps=6, batch_size=8, weight_learning_rate=3.0, select_every=2)
    student = student_of(teacher, split_bank, bits=8)
    before = state(student)
    distill_(student, teacher, split_bank, settings, torch.Generator().manual_seed(0))
    assert same(state(student), before)


def test_looking_at_a_training_does_not_change_its_course(teacher: Teacher, split_bank: SampleBank) -> None:
    courses = []
    for every in (0, 1):
        student, course = student_of(teacher, split_bank), []

        def keep(_: Progress, student: Student = student, course: list[dict[str, torch.Tensor]] = course) -> None:
            course.append(state(student))

        settings = DistillationSettings(num_steps=12, batch_size=16, select_every=every)
        distill_(student, teacher, split_bank, settings, torch.Generator().manual_seed(0), progress=keep)
        courses.append(course)
    assert all(same(one, two) for one, two in zip(*courses, strict=True))


def test_a_training_that_goes_on_does_not_judge_a_student_before_its_state_is_read(
    tmp_path: Path, teacher: Teacher, split_bank: SampleBank, caplog: pytest.LogCaptureFixture
) -> None:
    settings = DistillationSettings(num_steps=4, batch_size=8, select_every=2)
    kept = Checkpoints(tmp_path).of("student")
    found = []
    for student in (student_of(teacher, split_bank), Student(teacher, student_of(teacher, split_bank).settings)):
        caplog.clear()
        with caplog.at_level("DEBUG", logger="qimera.assessment.selection"):
            distill_(student, teacher, split_bank, settings, torch.Generator().manual_seed(0), checkpoint=kept)
        found.append([record.message for record in caplog.records if record.message.startswith("step")])
    assert [len(messages) for messages in found] == [3, 0]


def test_selection_without_held_out_samples_is_refused(teacher: Teacher, bank: SampleBank) -> None:
    with pytest.raises(ConfigError, match="holds no held-out samples"):
        distill_(
            student_of(teacher, bank),
            teacher,
            bank,
            DistillationSettings(num_steps=2, select_every=1),
            torch.Generator().manual_seed(0),
        )
