"""Files of images -> uint8 arrays: labelled ones for evaluation alone, and the user's own for a bank."""

import io
import math
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Integer, UInt8
from numpy.lib import format as npy
from PIL import Image

from qimera.assessment.class_folders import find_class_files
from qimera.config.input_spec import IMAGE_MODES, InputSpec
from qimera.errors import ConfigError, first_line

_IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What Pillow may take a file for, whatever its name: for others, such as EPS, it starts programs."""

_KNOWN_WHITE = ("PNG", "PPM")
"""Formats whose grey levels of 16 bits Pillow returns with white at 65535. Cameras with TIFF often use fewer bits."""

_MOST_PIXELS = 1 << 27
"""Of one image in any step of its preparation, so that a small file cannot take all memory."""


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

    labels: Integer[np.ndarray, " batch"]
    """Class indices."""

    def __post_init__(self) -> None:
        """Refuse arrays that would be scored wrongly.

        Raises:
            ConfigError: pixels that are not uint8, labels that are not whole numbers from 0, or another number of them.
        """
        if not isinstance(self.images, ImageFiles):
            _check_array("images", self.images, "uint8", "a NumPy array of uint8 (n, height, width, channel)", 4)
        _check_array("labels", self.labels, r"u?int\d+", "a NumPy array of whole numbers (n,)", 1)
        if len(self.images) != len(self.labels):
            raise ConfigError(f"labels: {len(self.labels)} for {len(self.images)} images; give one for each")
        if len(self.labels) and self.labels.min() < 0:
            raise ConfigError(f"labels: must not be negative, given {self.labels.min()}; leave out unlabelled images")

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def batches(
        self, batch_size: int
    ) -> Iterator[tuple[UInt8[np.ndarray, "batch height width channel"], Integer[np.ndarray, " batch"]]]:
        """Yield images and labels in order, ``batch_size`` at a time; the last batch may be smaller.

        Raises:
            ConfigError: ``batch_size`` is below 1, or an image file cannot be decoded.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size: must be at least 1, given {batch_size}")
        for start in range(0, len(self), batch_size):
            part = slice(start, start + batch_size)
            yield self.images[part], self.labels[part]


def _check_array(name: str, given: object, dtype: str, expected: str, num_axes: int) -> None:
    if isinstance(given, np.ndarray) and re.fullmatch(dtype, given.dtype.name) and given.ndim == num_axes:
        return
    found = f"{given.dtype} of shape {given.shape}" if isinstance(given, np.ndarray) else type(given).__name__
    raise ConfigError(f"{name}: expected {expected}, given {found}")


def load_labelled_images(path: Path | str, input_spec: InputSpec, num_classes: int) -> LabelledImages:
    """Return the labelled images that ``path`` holds, in the shape that the model expects.

    Args:
        path: An ``.npz`` file with ``images`` (uint8, (n, height, width, channel), or (n, height, width) for one
            channel) and ``labels`` (integers, (n,)); or a folder with one sub-folder of images per class. Classes
            are counted in the order of the names as text, as torchvision's ``ImageFolder`` counts them.
        input_spec: The shape of one image. Image files of another size are resized until they cover it and cropped
            to their centre; arrays are not resized.
        num_classes: Classes of the model.

    Raises:
        ConfigError: nothing readable is there, or it does not fit the model.
    """
    path = Path(path)
    if path.is_dir():
        files, classes = find_class_files(path, num_classes)
        return LabelledImages(ImageFiles(tuple(files), input_spec.shape), np.array(classes, dtype=np.int64))
    if not path.exists():
        raise ConfigError(
            f"{path}: no such file or folder; give an .npz file or a folder with one sub-folder per class"
        )
    if path.suffix.lower() != ".npz" or not path.is_file():  # a pipe would be waited for without end
        raise ConfigError(
            f"{path}: not a folder and not an .npz file; give an .npz file with images and labels, "
            "or a folder with one sub-folder per class"
        )
    return _load_arrays(path, input_spec, num_classes)


def _load_arrays(path: Path, input_spec: InputSpec, num_classes: int) -> LabelledImages:
    try:
        with path.open("rb") as file:
            _refuse_other_files(path, file.read(6))
            with zipfile.ZipFile(file) as archive:
                _check_headers(path, _headers(path, archive, ("images", "labels")), input_spec.shape)
                arrays = {name: _read_array(archive, name) for name in ("images", "labels")}
    except ConfigError:
        raise
    # A damaged archive can make NumPy and zipfile fail in any way.
    except Exception as error:
        raise _unreadable(path, "an .npz file", error) from error
    _check_classes(path, arrays["labels"], num_classes)
    return LabelledImages(_with_channels(arrays["images"]), arrays["labels"].astype(np.int64))


def read_images(path: Path, input_spec: InputSpec) -> UInt8[np.ndarray, "batch height width channel"]:
    """Return array ``images`` of an ``.npz`` file, or the array of an ``.npy`` file; nothing else of it is read.

    Raises:
        ConfigError: it is damaged, or does not fit the model.
    """
    try:
        with path.open("rb") as file:
            is_array = path.suffix.lower() == ".npy"
            _refuse_other_files(path, file.read(6), is_array=is_array)
            if is_array:
                file.seek(0)
                _check_alone(path, _header(path, "the array", file.read(_LONGEST_HEADER)), input_spec.shape)
                file.seek(0)
                return _with_channels(npy.read_array(file, allow_pickle=False))
            with zipfile.ZipFile(file) as archive:
                _check_alone(path, _headers(path, archive, ("images",))["images"], input_spec.shape)
                return _with_channels(_read_array(archive, "images"))
    except ConfigError:
        raise
    # As above.
    except Exception as error:
        raise _unreadable(path, "a file", error) from error


def _unreadable(path: Path, kind: str, error: Exception) -> ConfigError:
    # The first line alone: NumPy's next ones advise to trust the file, and to let it execute code.
    reason = first_line(error)
    return ConfigError(
        f"{path}: cannot be read as {kind} of plain arrays ({reason}); it is damaged, or another kind of file"
    )


def _check_alone(path: Path, images: np.ndarray, shape: tuple[int, int, int]) -> None:
    _check_images(path, images, shape)
    _check_amount(path, images)


def _with_channels(images: np.ndarray) -> UInt8[np.ndarray, "batch height width channel"]:
    return images[..., np.newaxis] if images.ndim == 3 else images


def _refuse_other_files(path: Path, start: bytes, *, is_array: bool = False) -> None:
    if start == b"\x93NUMPY" and not is_array:
        raise ConfigError(f"{path}: holds one array without a name; write it with numpy.savez_compressed")
    if start[:1] == b"\x80":
        raise ConfigError(
            f"{path}: is a pickle, which could execute code, and not an .np{'y' if is_array else 'z'} file; "
            f"write the arrays with numpy.{'save' if is_array else 'savez_compressed'}"
        )


def _headers(path: Path, archive: zipfile.ZipFile, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return arrays of the right shapes and types that take no memory, whatever the archive would unpack to."""
    found = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    missing = set(names) - set(found)
    if missing:
        raise ConfigError(
            f"{path}: array {' and '.join(map(repr, sorted(missing)))} missing, found {sorted(found)}; "
            f"write it with numpy.savez_compressed(path, {', '.join(f'{name}={name}' for name in names)})"
        )
    headers = {}
    for name in names:
        with archive.open(f"{name}.npy") as member:
            headers[name] = _header(path, name, member.read(_LONGEST_HEADER))
    return headers


_LONGEST_HEADER = 10 + 65535
"""Bytes. Headers of later versions can be gigabytes long, and plain arrays never have them."""


def _header(path: Path, name: str, start: bytes) -> np.ndarray:
    file = io.BytesIO(start)
    if npy.read_magic(file) != (1, 0):
        raise ValueError(f"{name} is not a plain array")
    shape, _, dtype = npy.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ConfigError(
            f"{path}: {name} holds Python objects, which are not read, since reading them could execute code; "
            f"save {name} as {'int64' if name == 'labels' else 'uint8'}"
        )
    return np.broadcast_to(np.zeros((), dtype), shape)


def _check_headers(path: Path, headers: dict[str, np.ndarray], shape: tuple[int, int, int]) -> None:
    images, labels = headers["images"], headers["labels"]
    _check_images(path, images, shape)
    if labels.dtype.kind not in "iu":
        raise ConfigError(f"{path}: labels must be integers, given {labels.dtype}; save them with .astype(numpy.int64)")
    if labels.shape != images.shape[:1]:
        raise ConfigError(
            f"{path}: labels must have shape {images.shape[:1]}, one for each of {len(images)} images, "
            f"given {labels.shape}"
        )
    _check_amount(path, images, ", or a folder of image files, which are read batch by batch")


def _check_amount(path: Path, images: np.ndarray, if_too_many: str = "") -> None:
    if len(images) == 0:
        raise ConfigError(f"{path}: holds no images; give at least one")
    check_memory(path, math.prod(images.shape), if_too_many)


def check_memory(path: Path, num_bytes: int, advice: str = "") -> None:
    """Refuse images that take more memory than this machine has.

    Raises:
        ConfigError: they do.
    """
    if num_bytes > _memory_bytes():
        raise ConfigError(
            f"{path}: its images would take {num_bytes / 1e9:.0f} GB, more than this machine has; give fewer{advice}"
        )


def _memory_bytes() -> float:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return math.inf
    return float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as member:
        array = npy.read_array(member, allow_pickle=False)
        assert isinstance(array, np.ndarray)
        return array


def _check_images(path: Path, images: np.ndarray, shape: tuple[int, int, int]) -> None:
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


def _check_classes(path: Path, labels: Integer[np.ndarray, " batch"], num_classes: int) -> None:
    if labels.min() < 0:
        raise ConfigError(f"{path}: labels must not be negative, given {labels.min()}; leave out unlabelled images")
    if labels.max() >= num_classes:
        raise ConfigError(
            f"{path}: the evaluation file has classes up to {labels.max()}, the model has {num_classes} classes; "
            "give images of the classes that the model was trained on, counted from 0"
        )


def _read_image(path: Path, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "height width channel"]:
    channels, height, width = shape
    try:
        with Image.open(path, formats=_IMAGE_FORMATS) as file:
            image = _cover_and_crop(_of_8_bits(file).convert(IMAGE_MODES[channels]), height, width)
    # A damaged file can make Pillow fail in any way.
    except Exception as error:
        raise ConfigError(
            f"{path}: cannot be read as an image ({error}); save it with 8 bits per channel, replace or remove it"
        ) from error
    return np.asarray(image).reshape(height, width, channels)


def _of_8_bits(image: Image.Image) -> Image.Image:
    """Return grey levels of more bits as the nearest of 256, for Pillow would clip them and return almost white."""
    if not image.mode.startswith(("I", "F")):
        return image
    if image.format not in _KNOWN_WHITE or image.mode == "F":
        raise ValueError(f"pixels of mode {image.mode} have more than 8 bits, and nothing says which of them is white")
    levels = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))


def _cover_and_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    if image.size == (width, height):
        return image
    scale = max(height / image.height, width / image.width)
    # max(): rounding down must not leave a side one pixel short.
    covering = (max(width, int(image.width * scale)), max(height, int(image.height * scale)))
    if math.prod(covering) > _MOST_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too narrow for {width} x {height}")
    image = image.resize(covering, Image.Resampling.BILINEAR)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
