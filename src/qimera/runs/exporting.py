"""A finished run -> an exported file, and the record of its verification in the run's directory."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from qimera.errors import ConfigError
from qimera.export.comparison import MIN_AGREEMENT, Verification
from qimera.export.coreml import export_coreml
from qimera.export.executorch import export_executorch
from qimera.export.onnx import export_onnx
from qimera.export.program import export_aotinductor, export_pt2
from qimera.litert.export import export_litert
from qimera.litert.micro import export_tflm
from qimera.machine.files import replacing
from qimera.report.model_card import FILE_NAME as CARD
from qimera.runs.directory import RunDirectory, is_run
from qimera.runs.execution import load_bank, load_student
from qimera.runs.model_card import record_of, write_model_card

ExportFormat = Literal["onnx", "pt2", "aotinductor", "executorch", "litert", "tflm", "coreml"]

FILE_NAMES: dict[ExportFormat, str] = {
    "onnx": "student.onnx",
    "pt2": "student.pt2",
    "aotinductor": "student-aotinductor.pt2",
    "executorch": "student.pte",
    "litert": "student.tflite",
    "tflm": "student-tflm.tflite",
    "coreml": "student.mlpackage",
}


_EXPORTS: dict[ExportFormat, Callable[..., Verification]] = {
    "onnx": export_onnx,
    "pt2": export_pt2,
    "aotinductor": export_aotinductor,
    "executorch": export_executorch,
    "litert": export_litert,
    "tflm": export_tflm,
}

_FORMATS_OF: dict[str, tuple[ExportFormat, ...]] = {
    "include_preprocessing": ("onnx", "litert", "tflm"),
    "labels": ("onnx", "litert"),
    "integer_logits": ("litert", "tflm"),
}
"""Which formats have an option."""

_SUFFIXES_OF_RUNS = {".html", ".json", ".jsonl", ".md", ".safetensors", ".txt"}
"""Of the files that runs consist of, which no exported file may replace."""


def export_run(
    run: RunDirectory,
    path: Path,
    form: ExportFormat = "onnx",
    *,
    include_preprocessing: bool = False,
    labels_file: Path | None = None,
    integer_logits: bool = False,
    min_agreement: float = MIN_AGREEMENT,
) -> Verification:
    """Write the student of ``run`` to ``path``, verified on the run's bank, with a record of that and a model card.

    Raises:
        ConfigError: no file can be written to ``path``, a run keeps something else in such a file, the labels cannot
            be read or do not fit, or an option is not for this format.
        UnsupportedModelError: something in the student has no counterpart in the format.
        VerificationError: the file disagrees with the student.
    """
    _check_place(run, path, form)
    given: dict[str, Any] = {
        "include_preprocessing": include_preprocessing,
        "labels": labels_file,
        "integer_logits": integer_logits,
    }
    for option, value in given.items():
        if value and form not in _FORMATS_OF[option]:
            *others, last = _FORMATS_OF[option]
            formats = f"{', '.join(others)} or {last}"
            raise ConfigError(f"--{option.replace('_', '-')} is for --format {formats}, given --format {form}")
    labels = _labels(labels_file, run.summary().num_classes)
    student, teacher = load_student(run)
    bank = load_bank(run, teacher)
    options: dict[str, Any] = {"time_full_precision": True} if form in ("onnx", "litert") else {}
    given["labels"] = labels
    options |= {option: value for option, value in given.items() if form in _FORMATS_OF[option]}
    if form == "coreml":
        verification = export_coreml(student, path)
    else:
        verification = _EXPORTS[form](student, path, bank, min_agreement=min_agreement, **options)
    with replacing(record_of(run, form, path, FILE_NAMES[form])) as temporary:
        temporary.write_text(json.dumps({"file": path.name, **asdict(verification)}, indent=2) + "\n", encoding="utf-8")
    write_model_card(run, path)
    return verification


def _check_place(run: RunDirectory, path: Path, form: ExportFormat) -> None:
    owner = next((folder for folder in path.resolve().parents if is_run(folder)), None)
    is_in_another = owner is not None and owner != run.path.resolve()
    usual_name = FILE_NAMES[form]
    is_taken = (owner and path.suffix in _SUFFIXES_OF_RUNS) or (is_in_another and path.name in FILE_NAMES.values())
    if path.name == CARD or is_taken:
        free_name = f"{run.path.resolve().name}{Path(usual_name).suffix}" if is_in_another else usual_name
        raise ConfigError(
            f"--output: {path} has the name of a file that qimera writes itself; give another name, such as {free_name}"
        )


def _labels(path: Path | None, num_classes: int) -> list[str]:
    if path is None:
        return []
    try:
        labels = path.read_text(encoding="utf-8-sig").splitlines()  # editors on Windows put a mark first
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--labels: {path} cannot be read as text: {error}") from error
    if len(labels) != num_classes:
        raise ConfigError(f"--labels: {path} has {len(labels)} lines, the model has {num_classes} classes")
    return labels
