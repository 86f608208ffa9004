"""A finished run on disk -> its models, its bank and what it came to, for Python."""

from dataclasses import dataclass
from pathlib import Path

from qimera.config.run_settings import RunSettings
from qimera.report.summary import Summary
from qimera.runs.directory import RunDirectory
from qimera.runs.execution import load_bank, load_student
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank
from qimera.teacher.teacher import Teacher


@dataclass(frozen=True)
class LoadedRun:
    """What a finished run left behind."""

    teacher: Teacher
    student: Student
    bank: SampleBank
    settings: RunSettings
    summary: Summary


def load(path: Path | str) -> LoadedRun:
    """Return the models, the bank, the settings and the summary of the run in the directory ``path``.

    Raises:
        ConfigError: no run is there, it was interrupted, or one of its files is damaged.
    """
    run = RunDirectory.open(Path(path))
    student, teacher = load_student(run)
    return LoadedRun(teacher, student, load_bank(run, teacher), run.settings, run.summary())
