"""Whatever lies where qimera reads a file, reading it executes nothing, imports nothing and writes nothing."""

import contextlib
import os
import pickle
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qimera.errors import QimeraError
from qimera.teacher.teacher import Teacher
from tests.hostile.test_fuzz import originals, subjects

__all__ = ["originals"]

_watched: list[list[str]] = []


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if not _watched:
        return
    is_writing = event == "open" and str(arguments[1]) not in ("None", "r", "rb")
    is_acting = event in ("import", "pickle.find_class", "ctypes.dlopen", "shutil.rmtree")
    # But for the checks of types in these tests, and for the graphs of torch.fx.
    is_acting |= event == "exec" and not re.search(r"beartype|jaxtyping|torch.fx", sys._getframe(1).f_code.co_filename)
    if is_writing or is_acting or (event.startswith(("os.", "subprocess.", "socket.")) and event not in _HARMLESS):
        _watched[-1].append(f"{event} {arguments} in {sys._getframe(1).f_code.co_filename}")


_HARMLESS = ("os.listdir", "os.scandir", "os.fwalk", "os.walk")
Image.init()  # Pillow imports its own readers of formats at the first file that it does not know


@cache
def _listen() -> None:
    """Have ``_watch`` told of every event, from the first test here on: it can never be taken back, and takes time."""
    sys.addaudithook(_watch)


@contextmanager
def watching() -> Iterator[list[str]]:
    """Yield a list that fills with whatever does more than compute and read."""
    _listen()
    _watched.append([])
    try:
        yield _watched[-1]
    finally:
        _watched.pop()


class Payload:
    """Makes a folder in whoever unpickles it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


def write_payload(path: Path, form: str, folder: Path) -> None:
    payload = Payload(folder)
    if form == "pickle":
        path.write_bytes(pickle.dumps(payload))
    elif form in ("torch", "legacy"):
        torch.save({"state": payload}, path, _use_new_zipfile_serialization=form == "torch")
    elif form == "npz":
        with path.open("wb") as file:
            np.savez(file, images=np.array([payload]), labels=np.array([payload]))
    elif form == "npy":
        with path.open("wb") as file:
            np.save(file, np.array([payload]))
    elif form == "eps":
        path.write_bytes(f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({folder}) (w) file closefile\n".encode())
    else:
        path.write_text(f"__import__('os').mkdir({str(folder)!r})\n")


FORMS = ("pickle", "torch", "legacy", "npz", "npy", "eps", "python")


@pytest.mark.parametrize("form", FORMS)
def test_no_reader_executes_what_lies_in_place_of_its_file(
    tmp_path: Path, originals: Path, teacher: Teacher, form: str
) -> None:
    found = {name: subject for name, subject in subjects(teacher).items() if name != "teacher"}
    for name, subject in found.items():  # once before, so that nothing is left to be imported
        with contextlib.suppress(QimeraError):
            subject.read(originals)
        for file in subject.files:
            folder = tmp_path / f"{name}-{file.replace('/', '-')}"
            shutil.copytree(originals, folder)
            write_payload(folder / file, form, tmp_path / "executed")
            with watching() as events, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with contextlib.suppress(QimeraError):
                    subject.read(folder)
            assert not events
            assert not (tmp_path / "executed").exists()
