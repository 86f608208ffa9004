"""A finished run -> its report on disk."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from qimera.assessment.data import LabelledImages
from qimera.assessment.diagnostics import diagnose
from qimera.assessment.evaluation import Evaluation
from qimera.config.run_settings import RunSettings
from qimera.errors import ConfigError
from qimera.graph.costs import total_multiply_adds
from qimera.machine.files import replacing
from qimera.mixed_precision.budget import bit_operations
from qimera.report.content import Measured, Report, curves, shown_images
from qimera.report.layers import layer_reports
from qimera.report.page import write_page
from qimera.report.plane import places_of, view_of
from qimera.runs.directory import RunDirectory
from qimera.runs.execution import load_bank, load_student
from qimera.runs.model_card import exports_of, write_model_card
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank
from qimera.teacher.sources import short_source
from qimera.teacher.teacher import Teacher

logger = logging.getLogger(__name__)

_MAX_REAL = 100
"""Real images in the plot of features."""


def keep_evaluation(run: RunDirectory, path: Path, images: LabelledImages, result: Evaluation) -> None:
    """Put what was measured on labelled images into the run's report; one that cannot be written stays as it is."""
    assert result.teacher_top1 is not None
    assert result.agreement is not None
    measured = Measured(
        data=path.resolve().name,
        num_images=result.num_images,
        student_top1=result.top1,
        teacher_top1=result.teacher_top1,
        student_top5=result.top5,
        teacher_top5=result.teacher_top5,
        agreement=result.agreement,
        drop_low=result.drop_low,
        drop_high=result.drop_high,
        warnings=result.warnings,
    )
    some = next(images.batches(_MAX_REAL))[0]
    real = run.settings.input.normalize(torch.tensor(some).permute(0, 3, 1, 2).contiguous())
    try:
        _keep(run, measured)
        report_run(run, real)
    except (OSError, ConfigError) as error:  # the second where the bank is gone
        reason = error.strerror if isinstance(error, OSError) else error
        logger.warning("%s: the report stays as it is (%s)", run.path, reason)


def _keep(run: RunDirectory, measured: Measured) -> None:
    with replacing(run.evaluation_file) as temporary:
        measured.save(temporary)


def report_run(run: RunDirectory, real: Tensor | None = None) -> Report:
    """Write ``report.json`` and ``report.html`` into the run's directory, and return what they say.

    The model card is written again too, if there are exported files.

    Args:
        run: Finished.
        real: Normalised images that the run was evaluated on. Where they lie in the plot of features is kept for later
            reports; the images are not.
    """
    student, teacher = load_student(run)
    bank = load_bank(run, teacher)
    view = view_of(teacher, bank.synthetic)
    if real is not None and run.measured and view:
        _keep(run, run.measured.replace(places=places_of(real, view, teacher)))
    report = collect(run, student, teacher, bank)
    with replacing(run.report_data_file) as temporary:
        report.save(temporary)
    with replacing(run.report_page_file) as temporary:
        temporary.write_text(write_page(report, teacher, bank, view), encoding="utf-8")
    if report.exports:
        write_model_card(run)
    return report


def collect(run: RunDirectory, student: Student, teacher: Teacher, bank: SampleBank) -> Report:
    """Return what the report of a finished run says; nothing of layers where no sample is left to look at them with."""
    images = shown_images(bank)
    return Report(
        summary=run.summary(),
        settings=_without_directories(run.settings),
        measured=run.measured,
        multiply_adds=total_multiply_adds(teacher.module),
        bit_operations=bit_operations(teacher, student.settings),
        bank=diagnose(bank, teacher),
        layers=tuple(layer_reports(student, images) if len(images) else ()),
        curves=tuple(curves(run.metrics.lines())),
        exports=exports_of(run),
    )


def _without_directories(settings: RunSettings) -> RunSettings:
    names = {"weights": Path(settings.weights).name, "bank": Path(settings.bank).name}
    return settings.replace(model=short_source(settings.model), **names)
