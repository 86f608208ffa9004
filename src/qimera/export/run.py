"""A finished run -> an exported file, and the record of its verification in the run's directory."""

import json
from dataclasses import asdict
from pathlib import Path

from qimera.errors import ConfigError
from qimera.export.onnx import MIN_AGREEMENT, export_onnx
from qimera.export.verification import Verification
from qimera.run import load_student
from qimera.run_directory import RunDirectory, replacing
from qimera.synthesis.bank import SampleBank


def export_run(
    run: RunDirectory,
    path: Path,
    *,
    include_preprocessing: bool,
    labels_file: Path | None,
    min_agreement: float | None,
) -> Verification:
    """Write the student of ``run`` to ``path``, verified on the run's bank, and record the verification.

    Raises:
        ConfigError: the folder of ``path`` is not there, or the labels cannot be read or do not fit.
        UnsupportedModelError: something in the student has no ONNX counterpart.
        VerificationError: the file disagrees with the student.
    """
    if not path.parent.is_dir() or path.is_dir():
        raise ConfigError(f"--output: {path} must be a file in a folder that exists")
    labels = _labels(labels_file, run.summary().num_classes)
    student, teacher = load_student(run)
    bank = SampleBank.load(Path(run.settings.bank) if run.settings.bank else run.bank_directory, teacher)
    verification = export_onnx(
        student,
        path,
        bank,
        include_preprocessing=include_preprocessing,
        labels=labels,
        min_agreement=MIN_AGREEMENT if min_agreement is None else min_agreement,
    )
    with replacing(run.path / "export.json") as temporary:
        temporary.write_text(json.dumps({"file": str(path), **asdict(verification)}, indent=2) + "\n", encoding="utf-8")
    return verification


def _labels(path: Path | None, num_classes: int) -> list[str]:
    if path is None:
        return []
    try:
        labels = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--labels: {path} cannot be read as text: {error}") from error
    if len(labels) != num_classes:
        raise ConfigError(f"--labels: {path} has {len(labels)} lines, the model has {num_classes} classes")
    return labels
