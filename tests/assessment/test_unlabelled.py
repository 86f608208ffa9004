import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qimera.assessment.unlabelled import load_images
from qimera.config.input_spec import InputSpec
from qimera.errors import ConfigError

GRAY = InputSpec(shape=(1, 8, 10), mean=(0.5,), std=(0.5,))
COLOUR = InputSpec(shape=(3, 8, 10), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.tensor(images).permute(0, 3, 1, 2)


def write_image(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def test_images_of_a_folder_are_found_beside_each_other_and_below(tmp_path: Path) -> None:
    images = pixels(3, 8, 10, 3)
    for name, image in zip(("a.png", "b/c/d.PNG", "e.bmp"), images, strict=True):
        write_image(tmp_path / name, image)
    write_image(tmp_path / ".thumbnails" / "a.png", images[0])
    (tmp_path / "notes.txt").write_text("no image")
    assert torch.equal(load_images(tmp_path, COLOUR), channels_first(images))


def test_one_image_file_is_enough(tmp_path: Path) -> None:
    image = pixels(8, 10, 3)
    found = load_images(str(write_image(tmp_path / "one.png", image)), COLOUR)
    assert torch.equal(found, channels_first(image[None]))
    assert found.is_contiguous()


def test_images_of_another_size_and_colour_are_brought_to_that_of_the_model(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", pixels(30, 20, 3))
    write_image(tmp_path / "b.png", pixels(8, 10))
    assert load_images(tmp_path, GRAY).shape == (2, 1, 8, 10)
    assert load_images(tmp_path, COLOUR).shape == (2, 3, 8, 10)


def test_arrays_are_read_with_and_without_names_and_labels_are_not(tmp_path: Path) -> None:
    images = pixels(5, 8, 10, 3)
    np.savez(tmp_path / "alone.npz", images=images)
    np.savez(tmp_path / "labelled.npz", images=images, labels=np.array([{"any": "thing"}]))
    np.save(tmp_path / "array.npy", images)
    np.save(tmp_path / "columns.npy", np.asfortranarray(images))
    for name in ("alone.npz", "labelled.npz", "array.npy", "columns.npy"):
        assert torch.equal(load_images(tmp_path / name, COLOUR), channels_first(images)), name


def test_gray_arrays_may_leave_out_the_channel_axis(tmp_path: Path) -> None:
    images = pixels(4, 8, 10)
    np.save(tmp_path / "gray.npy", images)
    assert torch.equal(load_images(tmp_path / "gray.npy", GRAY), torch.tensor(images)[:, None])


def _nothing(folder: Path) -> Path:
    return folder / "missing"


def _empty_folder(folder: Path) -> Path:
    (folder / "empty" / "below").mkdir(parents=True)
    return folder / "empty"


def _text(folder: Path) -> Path:
    (folder / "notes.txt").write_text("no image")
    return folder / "notes.txt"


def _damaged_image(folder: Path) -> Path:
    path = write_image(folder / "folder" / "damaged.png", pixels(8, 10, 3))
    path.write_bytes(path.read_bytes()[:60])
    return path.parent


def _array(name: str, array: np.ndarray, cut: int = 0) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.save(folder / "array.npy", array)
        content = (folder / "array.npy").read_bytes()
        (folder / name).write_bytes(content[: len(content) - cut])
        return folder / name

    return write


def _pickle(folder: Path) -> Path:
    (folder / "payload.npy").write_bytes(pickle.dumps(np.zeros(3)))
    return folder / "payload.npy"


def _pipe(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        os.mkfifo(folder / name)
        return folder / name

    return make


def _entry(name: str, content: bytes, compression: int = zipfile.ZIP_STORED) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "a.npz", "w", compression) as archive:
            archive.writestr(name, content)
        return folder / "a.npz"

    return write


def _damaged_lzma(folder: Path) -> Path:
    path = _entry("images.npy", _saved(pixels(2, 8, 10, 3)), zipfile.ZIP_LZMA)(folder)
    content = bytearray(path.read_bytes())
    content[60:90] = bytes(30)
    path.write_bytes(content)
    return path


def _saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


_LONG_HEADER = b"\x93NUMPY\x01\x00" + (60_000).to_bytes(2, "little") + b"(" * 60_000


def _without_images(folder: Path) -> Path:
    np.savez(folder / "other.npz", photos=pixels(2, 8, 10, 3))
    return folder / "other.npz"


REFUSED = {
    "nothing there": (_nothing, "no such file or folder; give a folder of images, or an .npz or .npy file"),
    "an empty folder": (_empty_folder, r"no images in it; known are .*\.png"),
    "a text file": (_text, "not a folder, an image, an .npz or an .npy file"),
    "a damaged image": (_damaged_image, "damaged.png: cannot be read as an image"),
    "normalised images": (_array("a.npy", np.zeros((2, 8, 10, 3), np.float32)), "must be uint8 pixels .* float32"),
    "another size": (_array("a.npy", pixels(2, 9, 9, 3)), r"given \(2, 9, 9, 3\); resize the images"),
    "channels first": (_array("a.npy", pixels(2, 3, 8, 10)), r"channels go last: images.transpose\(0, 2, 3, 1\)"),
    "no images at all": (_array("a.npy", pixels(0, 8, 10, 3)), "holds no images; give at least one"),
    "a damaged array": (_array("a.npy", pixels(2, 8, 10, 3), cut=9), "cannot be read as a file of plain arrays"),
    "objects": (_array("a.npy", np.array([{}])), "holds Python objects, which are not read"),
    "a pickle": (_pickle, "is a pickle, which could execute code, and not an .npy file"),
    "an array under the wrong name": (_array("a.npz", pixels(2, 8, 10, 3)), "holds one array without a name"),
    "an entry without the ending of an array": (
        _entry("images", _saved(pixels(2, 8, 10, 3))),
        r"array 'images' missing, found \[\]",
    ),
    "a damaged entry, compressed in a rare way": (_damaged_lzma, "cannot be read as a file of plain arrays"),
    "a header without end": (_entry("images.npy", _LONG_HEADER), "cannot be read as a file of plain arrays"),
    "a pipe called an image": (_pipe("a.png"), "not a folder, an image, an .npz or an .npy file"),
    "a pipe called an archive": (_pipe("a.npz"), "not a folder, an image, an .npz or an .npy file"),
    "other arrays": (_without_images, r"array 'images' missing, found \['photos'\].*\(path, images=images\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_holds_no_images_of_the_model_is_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    write, message = REFUSED[case]
    path = write(tmp_path)
    with pytest.raises(ConfigError, match=message) as refusal:
        load_images(path, COLOUR)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert "allow_pickle" not in str(refusal.value)


def test_more_images_than_memory_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        write_image(tmp_path / f"{number}.png", pixels(8, 10, 3))
    np.save(tmp_path / "array.npy", pixels(5, 8, 10, 3))
    monkeypatch.setattr("qimera.assessment.data._memory_bytes", lambda: 1000)
    for path in (tmp_path, tmp_path / "array.npy"):
        with pytest.raises(ConfigError, match=r"more than this machine has; give fewer$"):
            load_images(path, COLOUR)
