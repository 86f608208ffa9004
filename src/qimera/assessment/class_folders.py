"""A folder with one sub-folder of images per class -> the image files, each with its class."""

import logging
import re
from pathlib import Path

from qimera.errors import ConfigError, enumerate_names

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

_SPLITS = ("val", "valid", "validation", "test", "testing", "eval", "dev", "train", "training")
"""Names of parts of a data set, those to evaluate on first."""

_OF_SYSTEMS = frozenset({"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"})
_INTEGER = re.compile(r"-?\d+")


def find_class_files(path: Path, num_classes: int) -> tuple[list[Path], list[int]]:
    """Return the image files of all class folders, and the class of each.

    Classes are counted in the order of the folders' names as text, as torchvision's ``ImageFolder`` counts them.

    Raises:
        ConfigError: there are no class folders, no images, or it is not known which class a folder is.
    """
    # By name: paths are sorted without regard to case where the system has none.
    names = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not _is_foreign(entry.name))
    if not names:
        raise ConfigError(f"{path}: holds no class folders; put the images into one sub-folder per class")
    _refuse_splits(path, names)
    found = {name: image_files(path / name) for name in names}
    if not any(found.values()):
        raise ConfigError(
            f"{path}: no images in its {len(names)} class folders; known are {' '.join(sorted(IMAGE_SUFFIXES))}"
        )
    indices = _class_indices(path, names, num_classes)
    empty = [name for name, files in found.items() if not files]
    if empty:
        logger.warning("%s: no images in %d class folders: %s", path, len(empty), enumerate_names(empty))
    labels = [index for name, index in zip(names, indices, strict=True) for _ in found[name]]
    return [file for files in found.values() for file in files], labels


def _is_foreign(name: str) -> bool:
    return name.startswith(".") or name in _OF_SYSTEMS


def image_files(folder: Path) -> list[Path]:
    """Return the image files in ``folder`` and everywhere below it, in the order of their paths."""
    files = (file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(
        file
        for file in files
        if not any(_is_foreign(part) for part in file.relative_to(folder).parts) and file.is_file()
    )


def _refuse_splits(path: Path, names: list[str]) -> None:
    """Refuse a data set whose parts, such as train and val, lie beside each other."""
    splits = [name for name in names if name.lower() in _SPLITS]
    with_classes = [name for name in splits if _holds_class_folders(path / name)]
    if with_classes:
        best = min(with_classes, key=lambda name: _SPLITS.index(name.lower()))
        raise ConfigError(
            f"{path}: {enumerate_names(with_classes)} in it hold class folders and are no classes themselves; "
            f"give one of them, such as {path / best}"
        )
    if len(splits) == len(names):
        raise ConfigError(
            f"{path}: holds {enumerate_names(splits)}, which are no classes, and no class folders in them; "
            "give a folder with one sub-folder of images per class"
        )


def _holds_class_folders(folder: Path) -> bool:
    entries = [entry for entry in folder.iterdir() if not _is_foreign(entry.name)]
    has_images = any(entry.suffix.lower() in IMAGE_SUFFIXES and entry.is_file() for entry in entries)
    return not has_images and any(entry.is_dir() for entry in entries)


def _class_indices(path: Path, names: list[str], num_classes: int) -> list[int]:
    if len(names) > num_classes:
        raise ConfigError(
            f"{path}: {len(names)} class folders, the model has {num_classes} classes; "
            "remove the folders of classes that the model does not know"
        )
    are_integers = all(_INTEGER.fullmatch(name) for name in names)
    if are_integers and len(names) < num_classes:
        return _given_indices(path, names, num_classes)
    if len(names) < num_classes:
        logger.warning(
            "%s: %d class folders for %d classes are counted from 0 in sorted order; "
            "if classes are absent, add an empty folder for each of them",
            path,
            len(names),
            num_classes,
        )
    if are_integers and names != sorted(names, key=int):
        changed = next(index for index, name in enumerate(names) if int(name) != int(sorted(names, key=int)[index]))
        logger.warning(
            "%s: folders are counted in the order of text, as torchvision's ImageFolder does: folder %s is class %d; "
            "if the model counts classes otherwise, name the folders with leading zeros",
            path,
            names[changed],
            changed,
        )
    return list(range(len(names)))


def _given_indices(path: Path, names: list[str], num_classes: int) -> list[int]:
    """Return the numbers that are the names of some classes' folders, where both orders of all names agree."""
    indices = [int(name) for name in names]
    if min(indices) < 0:
        raise ConfigError(f"{path}: class folders must not be negative numbers, given {min(indices)}")
    if max(indices) >= num_classes:
        raise ConfigError(
            f"{path}: the evaluation folder has classes up to {max(indices)}, the model has {num_classes} classes; "
            "give images of the classes that the model was trained on, counted from 0"
        )
    have_zeros = len({len(name) for name in names}) == 1 and any(len(name) > 1 and name[0] == "0" for name in names)
    if num_classes > 10 and not have_zeros:
        raise ConfigError(
            f"{path}: {len(names)} folders named by numbers ({enumerate_names(names)}) for {num_classes} classes; "
            "torchvision's ImageFolder sorts all of them as text, where 10 comes before 2. Add an empty folder for "
            "each absent class, or, if the numbers are the classes, name all folders with leading zeros"
        )
    return indices
