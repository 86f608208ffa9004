"""One run on disk: settings, metrics, bank, bits, student and summary; each file is complete or absent."""

import errno
import filecmp
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from qimera.config.bits import spell_layer_bits
from qimera.config.run_settings import RunSettings
from qimera.config.settings import LayerBits
from qimera.errors import ConfigError, enumerate_names
from qimera.machine.checkpoint import Checkpoints
from qimera.machine.distributed import from_main, is_main
from qimera.machine.files import make_folder, replacing
from qimera.machine.metrics import Metrics
from qimera.machine.progress import ProgressCallback, silent
from qimera.mixed_precision.allocation import Allocation
from qimera.report.content import Measured
from qimera.report.summary import Summary
from qimera.teacher.sources import short_source
from qimera.teacher.teacher import Teacher

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

BANK, ALLOCATION, STUDENT = "bank", "allocation", "student"
"""The parts of a run, in this order. Each of several students is a part of its own, ``student NAME``. An interrupted
run continues with the first part that is missing."""

_MAX_LISTED = 4
_UNFINISHED = ".*.partial*"
"""Names of files that are being written."""


class RunDirectory:
    """The files of one run.

    ``settings.json`` is there from the start and ``summary.json`` from the end, so a directory with the first alone
    is a run that was interrupted.
    """

    def __init__(self, path: Path, settings: RunSettings) -> None:
        self.path = path
        self.settings = settings
        self.metrics = Metrics(path / "metrics.jsonl")
        self.teacher_file = path / "teacher.safetensors"
        self.bank_directory = path / "bank"
        self.checkpoints_directory = path / "checkpoints"
        self.allocation_file = path / "allocation.json"
        self.student_file = path / "student.safetensors"
        self.text_file = path / "summary.txt"
        self.evaluation_file = path / "evaluation.json"
        self.report_data_file = path / "report.json"
        self.report_page_file = path / "report.html"
        self._summary_file = path / "summary.json"
        self._locked: int | None = None

    @classmethod
    def start(cls, path: Path, settings: RunSettings, teacher_hash: str = "") -> "RunDirectory":
        """Make the directory, or take up the run of the same settings that is in it.

        Args:
            path: Where it is, or is made.
            settings: Of the run that is asked for.
            teacher_hash: Of its model. If that is the model of the run in the directory, their files may have moved.

        Raises:
            ConfigError: something else is there.
        """
        refuse_other_content(path)
        settings_file = _settings_file(path)
        if not settings_file.exists():
            make_folder(path)
            with _beginning(path) as is_first:
                if is_first:
                    with replacing(settings_file) as temporary:
                        settings.save(temporary)
                    return cls(path, settings)
        run = cls(path, RunSettings.load(settings_file))
        there = run._settings_as_given()
        settings = run._with_places_of(there, settings, teacher_hash)
        before, now = (each.images and each.images.sha256 for each in (there, settings))
        if before != now:
            then, given = (each.images.text() if each.images else "no images of yours" for each in (there, settings))
            raise ConfigError(
                f"{path}: holds a run that learns from {then}, given {given}; give the same --images, or choose "
                "another --output"
            )
        differences = _differences(there, settings)
        if differences and settings != run.settings:
            listed = "; ".join(differences[:_MAX_LISTED])
            rest = f"; and {len(differences) - _MAX_LISTED} more" if len(differences) > _MAX_LISTED else ""
            raise ConfigError(f"{path}: holds a run with other settings ({listed}{rest}); choose another --output")
        return run

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Return the finished run in ``path``.

        Raises:
            ConfigError: no run is there, or one that is not finished.
        """
        if not _settings_file(path).is_file():
            inside = [str(each.parent) for each in sorted(path.glob("*/settings.json"))]
            meant = f"; did you mean {enumerate_names(inside)}?" if inside else ""
            raise ConfigError(
                f"{path}: not a run (no settings.json in it); give the --output of `qimera quantize`{meant}"
            )
        run = cls(path, RunSettings.load(_settings_file(path)))
        if not run.is_finished and run._is_occupied():
            raise ConfigError(f"{path}: the run is not finished, and a process is at work in it; wait for its end")
        if not run.is_finished:
            raise ConfigError(f"{path}: the run was interrupted; give the command that started it again to continue")
        return run

    def _with_places_of(self, there: RunSettings, asked: RunSettings, teacher_hash: str) -> RunSettings:
        """Return ``asked`` with the paths in ``there`` of files that lie elsewhere now, and are the same."""
        places: dict[str, object] = {}
        if there.bank and asked.bank and _is_same_bank(Path(asked.bank), self.bank_place):
            places["bank"] = there.bank
        has_moved = (asked.model, asked.weights) != (there.model, there.weights) and self.teacher_file.exists()
        is_named_alike = short_source(asked.model) == short_source(there.model)
        if has_moved and is_named_alike and Teacher.load(self.teacher_file, there.input).hash == teacher_hash:
            places |= {"model": there.model, "weights": there.weights}
        return asked.model_copy(update=places)

    @property
    def bank_place(self) -> Path:
        """Where the bank of the student is; runs of several bits, which share one, may have been moved together."""
        if not self.settings.bank:
            return self.bank_directory
        place = Path(self.settings.bank)
        moved = self.path.resolve().parent / place.parent.name / place.name
        return moved if moved.exists() and not place.exists() else place

    @contextmanager
    def occupied(self) -> Iterator[None]:
        """Keep other processes out while this one works here; no effect if the file system has no locks.

        Raises:
            ConfigError: another process is working here.
        """
        try:
            from_main(self._lock)
            if is_main():
                self._forget_unfinished_files()
            yield
        finally:
            self._unlock()

    def _is_occupied(self) -> bool:
        """Whether another process is working here."""
        try:
            self._lock()
        except ConfigError:
            return True
        self._unlock()
        return False

    def _unlock(self) -> None:
        if self._locked is not None:
            os.close(self._locked)
            self._locked = None

    def _lock(self) -> None:
        if fcntl is None:
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._locked = descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ConfigError(
                    f"{self.path}: another run is at work in it; wait for its end, or choose another --output"
                ) from None

    @property
    def is_finished(self) -> bool:
        """Whether the student and its summary are there."""
        return self._summary_file.exists()

    @property
    def has_bank(self) -> bool:
        """Whether the run's own bank is complete."""
        return self.bank_directory.exists()

    @property
    def allocation(self) -> Allocation | None:
        """The bits chosen for a budget; None until they are."""
        return Allocation.load(self.allocation_file) if self.allocation_file.exists() else None

    @property
    def measured(self) -> Measured | None:
        """What `qimera evaluate` measured; None if it has not run."""
        return Measured.load(self.evaluation_file) if self.evaluation_file.exists() else None

    def settle(self, allocation: Allocation) -> None:
        """Write the bits chosen for a budget, and add them to the settings."""
        self.settings = _with_rules(self.settings, allocation.all_rules)
        if is_main():
            with replacing(self.allocation_file) as temporary:
                allocation.save(temporary)
            with replacing(_settings_file(self.path)) as temporary:
                self.settings.save(temporary)

    def _settings_as_given(self) -> RunSettings:
        """Return the settings without the bits chosen for a budget."""
        allocation = self.allocation
        return self.settings if allocation is None else _with_rules(self.settings, allocation.rules)

    def recording(self, part: str, also: ProgressCallback) -> AbstractContextManager[ProgressCallback]:
        """Return a callback that records the steps of a part and passes them on; silent in all but the main process."""
        return self.metrics.recording(part, also) if is_main() else nullcontext(silent)

    def seconds(self, part: str) -> float | None:
        """Return how long a part took, or all parts called ``part NAME``; None if this run has no such part."""
        parts = {line["part"] for line in self.metrics.lines()}
        found = [self.metrics.seconds(each) or 0.0 for each in parts if each.partition(" ")[0] == part]
        return sum(found) if found else None

    def so_far(self) -> str:
        """Return what an interrupted run has done already, for a person; empty if there is nothing."""
        checkpoints = self.checkpoints_directory
        bank = "its bank is complete" if self.has_bank else "a part of its bank is made"
        facts = {
            bank: self.has_bank or any(checkpoints.glob(f"{BANK}/*")),
            "its bits are found": self.allocation_file.exists(),
            "its student is in training": any(checkpoints.glob(f"{STUDENT}-*/*")),
        }
        return ", ".join(fact for fact, is_true in facts.items() if is_true)

    def finish(self, summary: Summary) -> None:
        """Write the summary; from then on the run is finished."""
        with replacing(self.text_file) as temporary:
            temporary.write_text(summary.text(), encoding="utf-8")
        with replacing(self._summary_file) as temporary:
            summary.save(temporary)
        Checkpoints(self.checkpoints_directory).forget()

    def summary(self) -> Summary:
        """Read the summary of a finished run."""
        return Summary.load(self._summary_file)

    def _forget_unfinished_files(self) -> None:
        """Remove files that were being written when the process ended."""
        for left_over in self.path.glob(_UNFINISHED):
            if left_over.is_dir():
                shutil.rmtree(left_over)
            else:
                left_over.unlink()


@contextmanager
def _beginning(path: Path) -> Iterator[bool]:
    """Yield whether there is a run to begin in ``path``; no other process begins one meanwhile."""
    descriptor = os.open(path, os.O_RDONLY) if fcntl is not None else None
    try:
        while descriptor is not None and not _settings_file(path).exists():
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # another process is beginning
                time.sleep(0.01)
            except OSError:  # the file system cannot lock
                break
        yield not _settings_file(path).exists()
    finally:
        if descriptor is not None:
            os.close(descriptor)


def is_run(path: Path) -> bool:
    """Return whether ``path`` is the directory of a run, finished or not."""
    return _settings_file(path).is_file()


def refuse_other_content(path: Path) -> None:
    """Raise ConfigError if ``path`` is a file, or a directory that holds anything but a run."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path}: is a file; --output names a directory")
    others = [each for each in path.iterdir() if not each.match(_UNFINISHED)] if path.is_dir() else []
    if others and not _settings_file(path).is_file():
        raise ConfigError(f"{path}: is not empty and holds no run; choose another --output")


def _is_same_bank(one: Path, other: Path) -> bool:
    """Whether two banks have the same files, as those have of a folder and its copy."""
    names = sorted({file.name for bank in (one, other) for file in bank.glob("[!.]*")})
    return one == other or (bool(names) and filecmp.cmpfiles(one, other, names, shallow=False)[0] == names)


def _settings_file(path: Path) -> Path:
    return path / "settings.json"


def _with_rules(settings: RunSettings, rules: tuple[LayerBits, ...]) -> RunSettings:
    quantization = settings.quantization.model_copy(update={"layer_bits": rules})
    return settings.model_copy(update={"quantization": quantization})


def _differences(there: RunSettings, asked: RunSettings) -> list[str]:
    """Return one line for each setting in which two runs differ, with values as a command line spells them."""
    old, new = (_flat(settings) for settings in (there, asked))
    names = [name for name in {**new, **old} if old.get(name) != new.get(name)]
    return [f"{name}: {_spelled(old.get(name))} there, {_spelled(new.get(name))} now" for name in names]


def _flat(settings: RunSettings) -> dict[str, object]:
    """Return every setting by its dotted name."""
    values = settings.model_dump(mode="json")
    values["quantization"]["layer_bits"] = spell_layer_bits(settings.quantization.layer_bits)
    values["alternatives"] = {str(number): each for number, each in enumerate(values["alternatives"])}
    return dict(_flattened(values))


def _flattened(values: dict[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _spelled(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    return repr(value)
