"""Files of labelled images -> uint8 arrays, for evaluation alone; nothing here reaches training."""

import logging
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Integer, UInt8
from numpy.lib.npyio import NpzFile
from PIL import Image

from qimera.errors import ConfigError
from qimera.input_spec import InputSpec

logger = logging.getLogger(__name__)

_IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
IMAGE_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
# What NumPy and zipfile raise for damaged archives, by where the damage is.
_UNREADABLE = (
    OSError,
    EOFError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    SyntaxError,
    ValueError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
_INTEGER = re.compile(r"-?\d+")


@dataclass(frozen=True)
class ImageFiles:
    """Image files that look like one uint8 array (n, height, width, channel), decoded when a slice is taken."""

    paths: tuple[Path, ...]
    shape: tuple[int, int, int]
    """Channels, height and width that every image is brought to."""

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.paths)

    def __getitem__(self, part: slice) -> UInt8[np.ndarray, "batch height width channel"]:
        """Decode the files of ``part``; one that cannot be decoded raises ConfigError with its name."""
        return np.stack([_read_image(path, self.shape) for path in self.paths[part]])


@dataclass(frozen=True)
class LabelledImages:
    """Images in a fixed order, each with its class: arrays in memory, or files that are decoded batch by batch."""

    images: UInt8[np.ndarray, "batch height width channel"] | ImageFiles
    """Pixels, 0 darkest and 255 brightest."""

    labels: Int64[np.ndarray, " batch"]
    """Class indices."""

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def batches(
        self, batch_size: int
    ) -> Iterator[tuple[UInt8[np.ndarray, "batch height width channel"], Int64[np.ndarray, " batch"]]]:
        """Yield images and labels in order, ``batch_size`` at a time; the last batch may be smaller.

        Raises:
            ConfigError: ``batch_size`` is below 1, or an image file cannot be decoded.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size: must be at least 1, given {batch_size}")
        for start in range(0, len(self), batch_size):
            part = slice(start, start + batch_size)
            yield self.images[part], self.labels[part]


def load_labelled_images(path: Path | str, input_spec: InputSpec, num_classes: int) -> LabelledImages:
    """Return the labelled images that ``path`` holds, in the shape that the model expects.

    Args:
        path: An ``.npz`` file with ``images`` (uint8, (n, height, width, channel), or (n, height, width) for one
            channel) and ``labels`` (integers, (n,)); or a folder with one sub-folder of images per class, in
            sorted order. Sub-folders whose names are all integers say their class index themselves.
        input_spec: The shape of one image. Image files of another size are resized until they cover it and cropped
            to their centre; arrays are not resized.
        num_classes: Classes of the model.

    Raises:
        ConfigError: nothing readable is there, or it does not fit the model.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path, input_spec, num_classes)
    if not path.exists():
        raise ConfigError(
            f"{path}: no such file or folder; give an .npz file or a folder with one sub-folder per class"
        )
    if path.suffix.lower() != ".npz":
        raise ConfigError(
            f"{path}: not a folder and not an .npz file; give an .npz file with images and labels, "
            "or a folder with one sub-folder per class"
        )
    return _load_arrays(path, input_spec, num_classes)


def _load_arrays(path: Path, input_spec: InputSpec, num_classes: int) -> LabelledImages:
    arrays = _read_npz(path)
    images = _checked_images(path, arrays["images"], input_spec.shape)
    labels = arrays["labels"]
    if labels.dtype.kind not in "iu":
        raise ConfigError(f"{path}: labels must be integers, given {labels.dtype}; save them with .astype(numpy.int64)")
    if labels.shape != images.shape[:1]:
        raise ConfigError(
            f"{path}: labels must have shape {images.shape[:1]}, one for each of {len(images)} images, "
            f"given {labels.shape}"
        )
    if len(labels) == 0:
        raise ConfigError(f"{path}: holds no images; give at least one")
    _check_classes(path, labels, num_classes)
    return LabelledImages(images, labels.astype(np.int64))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        # Opened here, because np.load leaves a damaged file open.
        with path.open("rb") as file:
            return _named_arrays(path, np.load(file, allow_pickle=False))
    except _UNREADABLE as error:
        raise ConfigError(
            f"{path}: cannot be read as an .npz file of plain arrays ({error}); it is damaged, or holds Python objects"
        ) from error


def _named_arrays(path: Path, content: object) -> dict[str, np.ndarray]:
    if not isinstance(content, NpzFile):
        raise ConfigError(f"{path}: holds one array without a name; write it with numpy.savez_compressed")
    missing = {"images", "labels"} - set(content.files)
    if missing:
        raise ConfigError(
            f"{path}: array {' and '.join(map(repr, sorted(missing)))} missing, found {sorted(content.files)}; "
            "write it with numpy.savez_compressed(path, images=images, labels=labels)"
        )
    arrays = {name: content[name] for name in ("images", "labels")}
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):  # bytes, where a member is no .npy file
        raise ValueError("a member is not an array")
    return arrays


def _checked_images(
    path: Path, images: np.ndarray, shape: tuple[int, int, int]
) -> UInt8[np.ndarray, "batch height width channel"]:
    channels, height, width = shape
    if images.dtype != np.uint8:
        raise ConfigError(f"{path}: images must be uint8 pixels (0 to 255, not normalised), given {images.dtype}")
    if channels == 1 and images.ndim == 3:
        images = images[..., np.newaxis]
    if images.shape[1:] != (height, width, channels) or images.ndim != 4:
        advice = "resize the images, or give the model's input shape"
        if images.shape[1:] == shape:
            advice = "channels go last: images.transpose(0, 2, 3, 1)"
        raise ConfigError(
            f"{path}: images must have shape (n, {height}, {width}, {channels}) for a model with input shape {shape}, "
            f"given {images.shape}; {advice}"
        )
    return images


def _check_classes(path: Path, labels: Integer[np.ndarray, " batch"], num_classes: int) -> None:
    if labels.min() < 0:
        raise ConfigError(f"{path}: labels must not be negative, given {labels.min()}; leave out unlabelled images")
    if labels.max() >= num_classes:
        raise ConfigError(
            f"{path}: the evaluation file has classes up to {labels.max()}, the model has {num_classes} classes; "
            "give images of the classes that the model was trained on, counted from 0"
        )


def _load_folder(path: Path, input_spec: InputSpec, num_classes: int) -> LabelledImages:
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise ConfigError(f"{path}: holds no class folders; put the images into one sub-folder per class")
    files: list[Path] = []
    labels: list[int] = []
    for folder, index in zip(folders, _class_indices(path, folders, num_classes), strict=True):
        found = _image_files(folder)
        files += found
        labels += [index] * len(found)
    if not files:
        raise ConfigError(
            f"{path}: no images in its {len(folders)} class folders; known are {' '.join(sorted(_IMAGE_SUFFIXES))}"
        )
    return LabelledImages(ImageFiles(tuple(files), input_spec.shape), np.array(labels, dtype=np.int64))


def _class_indices(path: Path, folders: list[Path], num_classes: int) -> list[int]:
    if len(folders) > num_classes:
        raise ConfigError(
            f"{path}: {len(folders)} class folders, the model has {num_classes} classes; "
            "remove the folders of classes that the model does not know"
        )
    if all(_INTEGER.fullmatch(folder.name) for folder in folders):
        indices = [int(folder.name) for folder in folders]
        _check_classes(path, np.array(indices), num_classes)
        return indices
    if len(folders) < num_classes:
        logger.warning(
            "%s: %d class folders for %d classes are counted from 0 in sorted order; "
            "if classes are absent, name each folder by its class index",
            path,
            len(folders),
            num_classes,
        )
    return list(range(len(folders)))


def _image_files(folder: Path) -> list[Path]:
    visible = (file for file in folder.rglob("*") if not file.name.startswith("."))
    return sorted(file for file in visible if file.suffix.lower() in _IMAGE_SUFFIXES and file.is_file())


def _read_image(path: Path, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "height width channel"]:
    channels, height, width = shape
    try:
        with Image.open(path) as file:
            # Pillow would clip these to 255 and return an almost white image.
            if file.mode.startswith(("I", "F")):
                raise ValueError(f"pixels of mode {file.mode} have more than 8 bits")
            image = _cover_and_crop(file.convert(IMAGE_MODES[channels]), height, width)
    # Pillow reports damaged files by all of these.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(
            f"{path}: cannot be read as an image ({error}); save it with 8 bits per channel, replace or remove it"
        ) from error
    return np.asarray(image).reshape(height, width, channels)


def _cover_and_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    if image.size == (width, height):
        return image
    scale = max(height / image.height, width / image.width)
    # max(): rounding down must not leave a side one pixel short.
    covering = (max(width, int(image.width * scale)), max(height, int(image.height * scale)))
    image = image.resize(covering, Image.Resampling.BILINEAR)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
