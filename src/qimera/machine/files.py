"""Files that are whole or absent, whenever the process ends."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from qimera.errors import ConfigError


def place_for(path: Path | str) -> Path:
    """Return ``path`` as the place of a file; its folder need not be there yet.

    Raises:
        ConfigError: no file can be written there.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; give the name of a file")
    if path.exists() and not path.is_file():  # /dev/null would become a file, for everyone
        raise ConfigError(f"{path}: is a device or a pipe, and is not replaced by a file; give another name")
    check_folder(path.parent)
    return path


def check_folder(folder: Path) -> None:
    """Refuse a folder that files cannot be written to, or that cannot be made.

    Raises:
        ConfigError: a part of its path is no folder, or may not be written to.
    """
    nearest = next((each for each in (folder, *folder.parents) if each.exists()), folder)
    if not nearest.is_dir():
        raise ConfigError(f"{nearest}: is no folder, and files cannot go below it; give another place")
    if not os.access(nearest, os.W_OK):
        raise ConfigError(
            f"{nearest}: you may not write into this folder; give another place, or change its permissions"
        )


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, unless they are there.

    Raises:
        ConfigError: as ``check_folder``.
    """
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path; what is written there becomes ``path`` when the block ends without an error.

    The folder is made if it is not there.

    Raises:
        ConfigError: as ``place_for``.
        OSError: writing failed; it names ``path`` where it would name no file.
    """
    make_folder(place_for(path).parent)
    temporary = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        with naming(path):
            yield temporary
            sync_tree(temporary)
            temporary.replace(path)
            sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def replace_directory(temporary: Path, path: Path) -> None:
    """Rename a directory to ``path``; the directory or link that is there is removed only afterwards.

    What a link points to stays as it is.

    If the process is killed between the two renamings, the old directory is still beside ``path``, under a name that
    begins with a dot.
    """
    old = path.with_name(f".{path.stem}.replaced-{os.getpid()}{path.suffix}")
    try:
        if os.path.lexists(path):
            path.rename(old)
        temporary.rename(path)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(path):
            old.rename(path)
        raise
    sync_directory(path.parent)
    if old.is_symlink():
        old.unlink()
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of writing, which does not say in which file, say ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:  # without a number it would say nothing else any more
            error.filename = str(path)
        raise


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file and make its folder; if that fails with an OSError, as safetensors itself would not."""
    make_folder(path.parent)
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    path.write_bytes(safetensors.torch.save(contiguous, metadata))


def check_types(path: Path | str, tensors: Mapping[str, Tensor], types: Mapping[str, torch.dtype]) -> None:
    """Refuse tensors of a file that are of other types than those that are written.

    Raises:
        ConfigError: one is; the message names the file and the tensor.
    """
    for name, tensor in tensors.items():
        if tensor.dtype != types.get(name, tensor.dtype):
            raise ConfigError(
                f"{path}: damaged ({name} is of type {tensor.dtype}, and {types[name]} was written); make it again"
            )


def sync_tree(path: Path) -> None:
    """Bring a file, or a directory with everything in it, to the disk itself."""
    if path.is_dir():
        for inner in path.iterdir():
            sync_tree(inner)
        sync_directory(path)
    else:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Bring new and renamed files of ``directory`` to the disk itself."""
    if os.name == "posix":  # elsewhere a directory cannot be opened
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
