"""A finished run -> the model card in its directory, and one beside a file that goes elsewhere."""

import re
from pathlib import Path

from qimera.machine.files import replacing
from qimera.report.content import Export
from qimera.report.model_card import FILE_NAME, belongs_to, model_card
from qimera.runs.directory import RunDirectory


def record_of(run: RunDirectory, form: str, file: Path, usual_name: str) -> Path:
    """Return where the run records an exported file: one place for each format and name."""
    name = re.sub(r"[^\w.]", "_", file.name)[:60]
    other = "" if file.name == usual_name else f"-{name}"
    return run.path / f"export-{form}{other}.json"


def exports_of(run: RunDirectory) -> tuple[Export, ...]:
    """Return what is recorded of every file that the run's student was written to."""
    return tuple(Export.load(path) for path in sorted(run.path.glob("export-*.json")))


def write_model_card(run: RunDirectory, file: Path | None = None) -> None:
    """Write the card into the run's directory, and beside ``file`` if that is elsewhere."""
    exports = exports_of(run)
    _write(run, run.path / FILE_NAME, exports)
    if file is not None and file.parent.resolve() != run.path.resolve():
        _write(run, card_beside(run, file), tuple(export for export in exports if _lies_beside(export, file)))


def card_beside(run: RunDirectory, file: Path) -> Path:
    """Return where the card beside ``file`` is; beside those of other models it gets the name of the file too."""
    place = file.with_name(FILE_NAME)
    if file.parent.resolve() == run.path.resolve():
        return place
    places = (place, *(file.with_name(f"{name}-{FILE_NAME}") for name in (file.stem, file.name)))
    return next((place for place in places if _is_free(run, place)), places[-1])


def _is_free(run: RunDirectory, place: Path) -> bool:
    if not place.is_file():
        return not place.exists()
    return belongs_to(place.read_text(encoding="utf-8", errors="replace"), run.summary())


def _lies_beside(export: Export, file: Path) -> bool:
    """Whether ``export`` is ``file``, or another of the run's files in the same folder, as it was written."""
    place = file.parent / Path(export.file).name
    parts = place.rglob("*") if place.is_dir() else [place]
    size = sum(part.stat().st_size for part in parts if part.is_file())
    return place == file or size == export.num_bytes


def _write(run: RunDirectory, place: Path, exports: tuple[Export, ...]) -> None:
    with replacing(place) as temporary:
        temporary.write_text(model_card(run.summary(), run.settings, run.measured, exports), encoding="utf-8")
