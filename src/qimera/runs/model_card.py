"""A finished run -> the model card in its directory, and one beside a file that goes elsewhere."""

from pathlib import Path

from qimera.machine.files import replacing
from qimera.report.content import Export
from qimera.report.model_card import FILE_NAME, belongs_to, model_card
from qimera.runs.directory import RunDirectory


def exports_of(run: RunDirectory) -> tuple[Export, ...]:
    """Return what is recorded of every file that the run's student was written to."""
    return tuple(Export.load(path) for path in sorted(run.path.glob("export-*.json")))


def write_model_card(run: RunDirectory, file: Path | None = None) -> None:
    """Write the card into the run's directory, and beside ``file`` if that is elsewhere."""
    exports = exports_of(run)
    _write(run, run.path / FILE_NAME, exports)
    if file is not None and file.parent.resolve() != run.path.resolve():
        _write(run, card_beside(run, file), tuple(export for export in exports if export.file == file.name))


def card_beside(run: RunDirectory, file: Path) -> Path:
    """Return where the card beside ``file`` is; beside one of another model it gets the name of the file too."""
    place = file.with_name(FILE_NAME)
    is_own = file.parent.resolve() == run.path.resolve() or not place.exists()
    if is_own or belongs_to(place.read_text(encoding="utf-8", errors="replace"), run.summary()):
        return place
    return file.with_name(f"{file.stem}-{FILE_NAME}")


def _write(run: RunDirectory, place: Path, exports: tuple[Export, ...]) -> None:
    with replacing(place) as temporary:
        temporary.write_text(model_card(run.summary(), run.settings, run.measured, exports), encoding="utf-8")
