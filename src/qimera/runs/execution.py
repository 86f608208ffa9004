"""Resolved settings and a run directory -> a finished run, continued from what the directory holds."""

import torch
from torch import Tensor

from qimera import pipeline
from qimera.assessment.data import LabelledImages
from qimera.assessment.diagnostics import diagnose
from qimera.assessment.estimation import estimate_on_held_out
from qimera.assessment.evaluation import Evaluation, evaluate
from qimera.assessment.selection import choose
from qimera.config.bits import check_layer_bits
from qimera.config.run_settings import RunSettings
from qimera.config.settings import check_start
from qimera.errors import ConfigError
from qimera.machine.acceleration import exact_convolutions, find_device
from qimera.machine.checkpoint import Checkpoints
from qimera.machine.distributed import from_main, is_main
from qimera.machine.files import replacing
from qimera.machine.progress import Progress, ProgressCallback
from qimera.mixed_precision.allocation import Allocation, allocate
from qimera.mixed_precision.budget import check_budget
from qimera.report.summary import Summary
from qimera.runs.directory import ALLOCATION, BANK, STUDENT, RunDirectory
from qimera.student.student import Student
from qimera.synthesis.bank import NOTHING_TO_LEARN_FROM, SampleBank, check_bank
from qimera.synthesis.parts import needs_generator
from qimera.teacher.teacher import Teacher


def check_run(settings: RunSettings, teacher: Teacher, bank: SampleBank | None) -> None:
    """Refuse settings that would fail only after the run directory was made.

    Raises:
        ConfigError: bits for an unknown layer, a budget out of reach, a start that the scheme lacks, fresh samples or
            training without a generator, a choice without held-out samples, or nothing to make a student from.
    """
    if bank is not None:
        check_bank(bank, teacher)
    elif not settings.images and not settings.synthesis.num_generated + settings.synthesis.num_optimized:
        raise ConfigError(NOTHING_TO_LEARN_FROM)
    check_layer_bits(settings.quantization.layer_bits, [layer.name for layer in teacher.layers])
    check_budget(teacher, settings.quantization)
    ways = (settings.distillation, *settings.alternatives)
    for way in ways:
        check_start(settings.quantization, way)
    fresh_share = max(way.fresh_share for way in ways)
    steps = max(way.generator_steps_per_step for way in ways)
    if steps and not fresh_share and not _has_generator(settings, bank):
        raise ConfigError(
            f"generator_steps_per_step: {steps}, but the bank {settings.bank or 'of these settings'} has no generator "
            "to train; set it to 0, or synthesise one with generated samples"
        )
    if fresh_share and not _has_generator(settings, bank):
        raise ConfigError(
            f"fresh_share: {fresh_share} of each batch should come from the generator, "
            f"but the bank {settings.bank or 'of these settings'} has none; synthesise one with generated samples"
        )
    synthesis = settings.synthesis if bank is None else bank.settings
    if (settings.alternatives or any(way.select_every for way in ways)) and not synthesis.num_held_out:
        raise ConfigError(
            f"num_held_out: 0, but something is to be chosen ({settings.recipe}), and the bank "
            f"{settings.bank or 'of these settings'} holds no held-out samples to judge by; synthesise one that does"
        )


def carry_out(
    run: RunDirectory,
    teacher: Teacher,
    bank: SampleBank | None,
    progress: ProgressCallback,
    device: torch.device | str = "cpu",
    images: Tensor | None = None,
) -> Summary:
    """Make what is missing in the run directory, and return its summary.

    Args:
        run: Started with settings that ``check_run`` accepts.
        teacher: The captured model of the settings.
        bank: The bank that the settings name; None for one of the run's own.
        progress: Called after every step.
        device: Where to train.
        images: Pixels of the user's images that the settings remember, for a bank of the run's own.

    Raises:
        ConfigError: the run is finished, but its model had other weights then; another process is at work in it; or
            the user's images are needed and not given.
        DivergenceError: a loss became NaN or infinite.
    """
    with run.occupied():
        return _carry_out(run, teacher, bank, progress, find_device(device), images)


def _carry_out(
    run: RunDirectory,
    teacher: Teacher,
    bank: SampleBank | None,
    progress: ProgressCallback,
    device: torch.device,
    images: Tensor | None,
) -> Summary:
    if from_main(lambda: run.is_finished):
        return from_main(_summary_of, run, teacher)
    if is_main():
        with replacing(run.teacher_file) as temporary:
            teacher.save(temporary)
    samples = bank if bank is not None else _own_bank(run, teacher, progress, device, images)
    if run.settings.quantization.budget:
        _find_bits(run, teacher, samples, progress)
    student, chosen = _make_student(run, teacher, samples, progress, device)
    return from_main(_finish, run, student, teacher, samples, chosen)


def _finish(run: RunDirectory, student: Student, teacher: Teacher, bank: SampleBank, settings: RunSettings) -> Summary:
    """Write the student and the summary."""
    with replacing(run.student_file) as temporary:
        student.save_state(temporary)
    diagnosis = diagnose(bank, teacher)
    is_told = bank.settings.num_held_out and not diagnosis.doubts
    summary = Summary.of_run(
        settings,
        teacher,
        bank=bank,
        warnings=diagnosis.warnings,
        estimate=estimate_on_held_out(student, teacher, bank) if is_told else None,
        allocation=run.allocation.lines() if run.allocation else (),
        bank_seconds=run.seconds(BANK),
        student_seconds=run.seconds(STUDENT),
    )
    run.finish(summary)
    return summary


def evaluate_run(
    run: RunDirectory, images: LabelledImages, progress: ProgressCallback, device: torch.device
) -> Evaluation:
    """Return how the student of a finished run and its teacher do on labelled images, computed on ``device``."""
    student, teacher = load_student(run)
    student.to(device)
    with exact_convolutions(device):
        return evaluate(
            student,
            images,
            run.settings.input,
            teacher=teacher.on(device),
            progress=lambda done, total: progress(Progress("evaluation", done, total)),
        )


def load_student(run: RunDirectory) -> tuple[Student, Teacher]:
    """Return the student of a finished run, and its teacher."""
    teacher = Teacher.load(run.teacher_file, run.settings.input)
    return Student.load_state(run.student_file, teacher, run.settings.quantization), teacher


def load_bank(run: RunDirectory, teacher: Teacher) -> SampleBank:
    """Return the bank that the run's student was trained on, without images of the user's that it does not hold."""
    return SampleBank.load(run.bank_place, teacher)


def _summary_of(run: RunDirectory, teacher: Teacher) -> Summary:
    summary = run.summary()
    if summary.teacher_hash != teacher.hash:
        raise ConfigError(
            f"{run.path}: holds a run of the same settings, but {run.settings.model} had other weights then "
            f"(hash {summary.teacher_hash[:12]}, now {teacher.hash[:12]}); choose another --output"
        )
    return summary


def _own_bank(
    run: RunDirectory, teacher: Teacher, progress: ProgressCallback, device: torch.device, images: Tensor | None
) -> SampleBank:
    settings, checkpoints, given = run.settings, run.checkpoints_directory / BANK, run.settings.images
    has_bank = from_main(lambda: run.has_bank)
    if given and images is None and not (has_bank and given.kept):
        raise ConfigError(f"--images: the run learns from {given.text()}, which it has not kept; give them again")
    if not has_bank:
        with run.recording(BANK, progress) as record:
            bank = pipeline.synthesize(
                teacher,
                settings=settings.synthesis,
                images=images,
                keep_images=given is not None and given.kept,
                seed=settings.seed,
                device=device,
                checkpoints=checkpoints,
                progress=record,
            )
        if is_main():
            bank.save(run.bank_directory)
            Checkpoints(checkpoints).forget()
    # Read back: a run that is interrupted here and continued must see the same samples.
    bank = from_main(SampleBank.load, run.bank_directory, teacher)
    return bank if images is None else from_main(bank.with_images, images, teacher)


def _find_bits(run: RunDirectory, teacher: Teacher, bank: SampleBank, progress: ProgressCallback) -> None:
    """Choose bits for the budget and add them to the run's settings."""
    settings = run.settings

    def find() -> Allocation:
        if found := run.allocation:
            return found
        with run.recording(ALLOCATION, progress) as record:
            return allocate(teacher, bank, settings.quantization, seed=settings.seed, progress=record)

    run.settle(from_main(find))


def _make_student(
    run: RunDirectory, teacher: Teacher, bank: SampleBank, progress: ProgressCallback, device: torch.device
) -> tuple[Student, RunSettings]:
    """Return the student, of several the one with the lowest estimated drop, and the settings of it alone."""
    settings, students = run.settings, []
    ways, names = (settings.distillation, *settings.alternatives), settings.recipe.split(",")
    for number, way in enumerate(ways):
        part = f"{STUDENT} {names[number]}" if len(ways) > 1 else STUDENT
        with run.recording(part, progress) as record:
            student = pipeline.quantize_with(
                teacher,
                bank,
                settings.quantization,
                way,
                seed=settings.seed,
                device=device,
                checkpoints=run.checkpoints_directory / f"{STUDENT}-{number}",
                progress=record,
            )
        students.append(student)
    best = from_main(choose, students, teacher, bank) if len(students) > 1 else 0
    alone = {"recipe": names[best], "distillation": ways[best], "alternatives": ()}
    return students[best], settings.model_copy(update=alone)


def _has_generator(settings: RunSettings, bank: SampleBank | None) -> bool:
    if bank is not None:
        return bank.synthesizer is not None
    return needs_generator(settings.synthesis)
