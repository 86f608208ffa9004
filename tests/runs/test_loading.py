from pathlib import Path

import pytest
import torch

import qimera
from qimera.errors import ConfigError
from qimera.machine.progress import silent
from qimera.runs.directory import RunDirectory
from qimera.runs.execution import carry_out, load_student
from qimera.teacher.teacher import Teacher
from tests.command_line import tiny_settings


def test_a_run_comes_back_with_its_models_its_bank_and_its_summary(tmp_path: Path, small_teacher: Teacher) -> None:
    run = RunDirectory.start(tmp_path / "run", tiny_settings())
    carry_out(run, small_teacher, None, silent)
    found = qimera.load(tmp_path / "run")
    student, teacher = load_student(run)
    images = found.bank.take(slice(None)).images
    assert found.teacher.hash == teacher.hash == found.bank.teacher_hash
    assert torch.equal(found.student(images), student(images))
    assert found.settings.quantization == found.student.settings
    assert found.summary.num_classes == teacher.num_classes


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run"):
        qimera.load(str(tmp_path))
