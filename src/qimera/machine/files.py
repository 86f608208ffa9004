"""Files that are whole or absent, whenever the process ends."""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path; what is written there becomes ``path`` when the block ends without an error.

    Raises:
        OSError: writing failed, or ``path`` is a device or a pipe; it names ``path`` where it would name no file.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # /dev/null would become a file, for everyone
        raise FileExistsError(errno.EEXIST, "is a device or a pipe, and is not replaced by a file", str(path))
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
    """Write a safetensors file; unlike safetensors' own function, with an OSError if that fails."""
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    path.write_bytes(safetensors.torch.save(contiguous, metadata))


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
