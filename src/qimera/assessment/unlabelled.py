"""Unlabelled images of the user's -> uint8 pixels that may join a bank."""

import math
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from qimera.assessment import data
from qimera.assessment.class_folders import IMAGE_SUFFIXES, image_files
from qimera.config.input_spec import InputSpec
from qimera.errors import ConfigError


def load_images(path: Path | str, input_spec: InputSpec) -> UInt8[Tensor, "image channel height width"]:
    """Return the images that ``path`` holds as pixels, in the shape that the model expects.

    Args:
        path: A folder with image files in it or anywhere below; one image file; an ``.npz`` file with ``images``, of
            which labels and other arrays are not read; or an ``.npy`` file of them. Arrays are uint8, (n, height,
            width, channel), or (n, height, width) for one channel.
        input_spec: The shape of one image. Image files of another size are resized until they cover it and cropped to
            their centre; arrays are not resized.

    Raises:
        ConfigError: nothing readable is there, or it does not fit the model.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if path.is_dir():
        pixels = _decoded(path, image_files(path), input_spec)
    elif not path.exists():
        raise ConfigError(f"{path}: no such file or folder; {_ADVICE}")
    elif path.is_file() and suffix in IMAGE_SUFFIXES:  # a pipe would be waited for without end
        pixels = _decoded(path, [path], input_spec)
    elif path.is_file() and suffix in (".npz", ".npy"):
        pixels = data.read_images(path, input_spec)
    else:
        raise ConfigError(f"{path}: not a folder, an image, an .npz or an .npy file; {_ADVICE}")
    return torch.tensor(pixels).permute(0, 3, 1, 2).contiguous()


_ADVICE = "give a folder of images, or an .npz or .npy file of uint8 images"


def _decoded(path: Path, files: list[Path], input_spec: InputSpec) -> UInt8[np.ndarray, "batch height width channel"]:
    if not files:
        raise ConfigError(f"{path}: no images in it; known are {' '.join(sorted(IMAGE_SUFFIXES))}")
    data.check_memory(path, len(files) * math.prod(input_spec.shape))
    return data.ImageFiles(tuple(files), input_spec.shape)[:]
