"""A file of weights -> what it holds, without executing anything that is in the file."""

import pickletools
import re
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from qimera.errors import ConfigError, enumerate_names

ADVICE = "save model.state_dict() with torch.save, or as .safetensors"


class _StandIn:
    """Takes the place of an object that is no tensor: it swallows whatever the file would make the object from."""

    def __new__(cls, *_: object) -> "_StandIn":
        return super().__new__(cls)

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def _empty_dict(*_: object) -> dict[object, object]:
    return {}


def _empty_list(*_: object) -> list[object]:
    return []


_NUMPY = (
    "dtype ndarray matrix ma.MaskedArray ma.core._mareconstruct core.multiarray._reconstruct core.multiarray.scalar "
    "_core.multiarray._reconstruct _core.multiarray.scalar bool bool_ str_ bytes_ object_ datetime64 timedelta64 "
    "int8 int16 int32 int64 uint8 uint16 uint32 uint64 longlong ulonglong "
    "float16 float32 float64 longdouble complex64 complex128 clongdouble"
)
_PATHS = "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath"
_STANDARD = (
    "argparse.Namespace datetime.date datetime.datetime datetime.time datetime.timedelta datetime.timezone "
    "decimal.Decimal fractions.Fraction types.SimpleNamespace uuid.UUID torch.torch_version.TorchVersion "
    "builtins.bool builtins.bytes builtins.dict builtins.float builtins.frozenset builtins.int builtins.list "
    "builtins.range builtins.slice builtins.str builtins.tuple"
)
_NAMES_OF_STAND_INS = [
    *(f"numpy.{name}" for name in _NUMPY.split()),
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS.split()),
    *_STANDARD.split(),
]
_SHOWN = {f"numpy.{module}.multiarray._reconstruct": "numpy.ndarray" for module in ("core", "_core")}
"""What messages call a stand-in, if not by its name."""

_ALLOWED: list[Callable[..., object] | tuple[Callable[..., object], str]] = [
    *((type(_SHOWN.get(name, name), (_StandIn,), {}), name) for name in _NAMES_OF_STAND_INS),
    (_empty_dict, "collections.defaultdict"),
    (_empty_list, "collections.deque"),
]
"""Names that training programs store beside the weights, each with what is called in its place.

None of the real objects is ever made, since nothing but tensors is used:

- A stand-in ignores its arguments and its state and cannot be called. So a ``numpy.dtype`` whose state claims object
  pointers, which would corrupt memory in NumPy's own ``__setstate__``, is never interpreted. The elements of an object
  array pass the same list as everything else. A path is of no operating system, and ``datetime`` parses nothing.
- ``defaultdict`` and ``deque`` become an empty dict and an empty list, which the file then fills. The factory of a
  ``defaultdict`` is dropped, so that a missing key calls nothing.
- The ``builtins`` are such factories and the types of small values. They are stand-ins, too.

torch itself allows its functions that rebuild tensors, ``OrderedDict``, ``Counter``, ``set``, ``complex``,
``bytearray`` and ``_codecs.encode``, by which pickles spell bytes. It finds codecs in Python's own ``encodings``.
"""


@contextmanager
def allowing_only(
    allowed: list[Callable[..., object] | tuple[Callable[..., object], str]],
) -> Iterator[None]:
    """Let ``torch.load`` read ``allowed`` beside tensors, and not what libraries allowed it in this process."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(allowed):
            yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def is_tape(path: Path) -> bool:
    """Whether a file is a tape archive, as PyTorch wrote before 0.2; torch makes a folder before it refuses one."""
    try:
        with tarfile.open(path, "r:"):
            return True
    except Exception:  # whatever a file that is none makes tarfile raise
        return False


def read_content(path: Path) -> object:
    """Return tensors, numbers and texts in dictionaries, lists and tuples as the file has them, and nothing else real.

    ``.safetensors`` files are read by safetensors, and all others by ``torch.load(weights_only=True)``.

    Raises:
        ConfigError: the file cannot be read, or holds what could execute something.
    """
    if not path.is_file():
        raise ConfigError(f"weights: no such file: {path}")
    if path.suffix.lower() == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ConfigError(f"{path}: not a safetensors file, or damaged ({error}); save or copy it again") from error
    if is_tape(path):
        raise ConfigError(f"{path}: in the format that PyTorch wrote before 0.2; {ADVICE} by a newer one")
    with path.open("rb") as file:
        try:
            with allowing_only(_ALLOWED), warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # of old protocols and kinds of tensors, which are refused by name later
                return torch.load(file, map_location="cpu", weights_only=True)
        # A damaged pickle can fail in any way.
        except Exception as error:
            raise ConfigError(f"{path}: {_explain_refusal(file, error)}") from error


# --- refusals ---------------------------------------------------------------------------------------------------------

_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""A pickled number, with which files of torch.save began until 2020, and do if they are told to."""

_FOREIGN_STARTS = {
    b"\x80": "a pickle of another program, or of a protocol that torch does not read",
    b"\x89HDF": "an HDF5 file, as Keras writes",
    b"\x1f\x8b": "a file that gzip compressed; unpack it first",
    b"version https://git-lfs": "what Git LFS leaves in place of the file; fetch it with git lfs pull",
    b"<": "a web page; download the file itself",
    b"\x93NUMPY": "an array of NumPy",
    b"GGUF": "a GGUF file",
}


def _explain_refusal(file: BinaryIO, error: Exception) -> str:
    """Say what is wrong with ``file``, which was read up to the place that made ``error``."""
    advice = f"{ADVICE}, on a machine where you trust it"
    reason, at_end = _refused_object(str(error)), not file.read(1)
    file.seek(0)
    start = file.read(64)
    damaged = f"not a file of torch.save, or damaged ({type(error).__name__}); save or copy it again, or {advice}"
    is_archive = _is_archive(file)
    if is_archive or start.startswith(_LEGACY_START):
        # Without a table of contents at its end, a file can end inside the name of an object.
        if reason and (is_archive or not at_end):
            return f"holds more than tensors ({reason}) and was not executed; {advice}"
        foreign = _foreign_archive(file) if is_archive else None
    elif _LEGACY_START.startswith(start):
        return damaged
    else:
        foreign = next((kind for known, kind in _FOREIGN_STARTS.items() if start.startswith(known)), None)
        if start[8:9] == b"{":
            foreign = "a safetensors file; let its name end in .safetensors"
    return f"not a file of torch.save, but {foreign}; {advice}" if foreign else damaged


def _refused_object(message: str) -> str | None:
    """Return what torch refused to read, if that is what its message tells."""
    if "TorchScript" in message:
        return "a TorchScript program"
    name = re.search(r"GLOBAL ([\w.]+)", message) or re.search(r"but got <class '([\w.]+)'>", message)
    if name:
        return name[1]
    operation = re.search(r"Unsupported operand (\d+)", message)
    known = {ord(each.code): each.name for each in pickletools.opcodes}
    if operation and int(operation[1]) in known:
        return f"the pickle instruction {known[int(operation[1])]}"
    return None


def _is_archive(file: BinaryIO) -> bool:
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:  # of an archive on several disks, of which this would be one
        return True


def _foreign_archive(file: BinaryIO) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return None
    is_ours = not names or any(name.endswith("data.pkl") for name in names)
    if any(name.endswith("archive_format") for name in names):
        return "a program of torch.export; give it as the model, under a name that ends in .pt2"
    return None if is_ours else f"an archive of {enumerate_names(names)}"
