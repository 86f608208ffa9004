import contextlib
import io
import os
import pickle
import random
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image

from qimera.assessment.data import ImageFiles, LabelledImages, load_labelled_images
from qimera.config.input_spec import InputSpec
from qimera.errors import ConfigError

GRAY = InputSpec(shape=(1, 8, 10), mean=(0.5,), std=(0.5,))
COLOUR = InputSpec(shape=(3, 8, 10), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def write_image(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def write_npz(folder: Path, **arrays: np.ndarray) -> Path:
    path = folder / "test.npz"
    np.savez_compressed(path, **arrays)
    return path


# --- .npz -------------------------------------------------------------------------------------------------------------


def test_arrays_come_back_as_they_were_saved(tmp_path: Path) -> None:
    images, labels = pixels(5, 8, 10, 3), np.array([0, 1, 2, 1, 0], dtype=np.uint8)
    data = load_labelled_images(write_npz(tmp_path, images=images, labels=labels), COLOUR, num_classes=3)
    np.testing.assert_array_equal(data.images[:], images)
    np.testing.assert_array_equal(data.labels, labels)
    assert data.labels.dtype == np.int64
    assert len(data) == 5


def test_gray_images_may_leave_out_the_channel_axis(tmp_path: Path) -> None:
    images = pixels(4, 8, 10)
    path = write_npz(tmp_path, images=images, labels=np.arange(4))
    np.testing.assert_array_equal(load_labelled_images(str(path), GRAY, 4).images[:], images[..., None])


@given(num_images=st.integers(1, 20), batch_size=st.integers(1, 25))
def test_batches_hold_every_image_once_and_in_order(num_images: int, batch_size: int) -> None:
    data = LabelledImages(pixels(num_images, 8, 10, 3), np.arange(num_images, dtype=np.int64))
    batches = list(data.batches(batch_size))
    assert all(len(images) == len(labels) == batch_size for images, labels in batches[:-1])
    np.testing.assert_array_equal(np.concatenate([images for images, _ in batches]), data.images[:])
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), data.labels)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            np.zeros((2, 8, 8, 1), np.float32),
            np.zeros(2, np.int64),
            r"uint8 \(n, height, .* given float32 of shape \(2, ",
        ),
        (np.zeros((2, 8, 8), np.uint8), np.zeros(2, np.int64), r"given uint8 of shape \(2, 8, 8\)"),
        (np.zeros((2, 8, 8, 1), np.uint8), [0, 1], r"labels: expected a NumPy array of whole numbers .* given list"),
        (np.zeros((2, 8, 8, 1), np.uint8), np.zeros(1, np.int64), "labels: 1 for 2 images; give one for each"),
        (np.zeros((2, 8, 8, 1), np.uint8), np.array([0, -1]), "labels: must not be negative, given -1; leave out"),
    ],
)
def test_arrays_that_would_be_scored_wrongly_are_refused(images: np.ndarray, labels: object, message: str) -> None:
    data = object.__new__(LabelledImages)  # its constructor is type-checked in tests, and nowhere else
    object.__setattr__(data, "images", images)
    object.__setattr__(data, "labels", labels)
    with pytest.raises(ConfigError, match=message):
        data.__post_init__()


def test_a_batch_size_below_one_is_refused() -> None:
    data = LabelledImages(pixels(2, 8, 10, 3), np.zeros(2, dtype=np.int64))
    with pytest.raises(ConfigError, match="batch_size: must be at least 1, given 0"):
        next(data.batches(0))


LABELS = np.zeros(2, dtype=np.int64)
REFUSED_ARRAYS = {
    "a missing array": ({"images": pixels(2, 8, 10, 3)}, r"array 'labels' missing, found \['images'\]"),
    "arrays of other names": ({"x": LABELS, "y": LABELS}, r"array 'images' and 'labels' missing, found \['x', 'y'\]"),
    "normalised images": ({"images": np.zeros((2, 8, 10, 3)), "labels": LABELS}, "images must be uint8 .* float64"),
    "another size": (
        {"images": pixels(2, 9, 9, 3), "labels": LABELS},
        r"shape \(n, 8, 10, 3\) for .* \(3, 8, 10\), given \(2, 9, 9, 3\); resize",
    ),
    "channels first": ({"images": pixels(2, 3, 8, 10), "labels": LABELS}, r"given \(2, 3, 8, 10\); channels go last"),
    "no channel axis in colour": ({"images": pixels(2, 8, 10), "labels": LABELS}, r"given \(2, 8, 10\)"),
    "a single value": ({"images": np.uint8(3), "labels": LABELS}, r"given \(\)"),
    "fractional labels": ({"images": pixels(2, 8, 10, 3), "labels": np.zeros(2)}, "labels must be integers, .*float64"),
    "too few labels": ({"images": pixels(3, 8, 10, 3), "labels": LABELS}, r"one for each of 3 images, given \(2,\)"),
    "a column of labels": ({"images": pixels(2, 8, 10, 3), "labels": LABELS[:, None]}, r"\(2,\), .* given \(2, 1\)"),
    "no images": ({"images": pixels(0, 8, 10, 3), "labels": LABELS[:0]}, "holds no images"),
    "unknown classes": (
        {"images": pixels(2, 8, 10, 3), "labels": np.array([3, 99])},
        "the evaluation file has classes up to 99, the model has 10 classes",
    ),
    "negative labels": ({"images": pixels(2, 8, 10, 3), "labels": np.array([-1, 0])}, "not be negative, given -1"),
    "Python objects": (
        {"images": np.array([None, {}]), "labels": LABELS},
        "images holds Python objects, which are not read, .* save images as uint8",
    ),
    "labels that are Python objects": (
        {"images": pixels(2, 8, 10, 3), "labels": np.array(["cat", 3], dtype=object)},
        "labels holds Python objects, which are not read, .* save labels as int64",
    ),
    "objects inside a structure": (
        {"images": pixels(2, 8, 10, 3), "labels": np.zeros(2, [("a", "i8"), ("b", "O")])},
        "labels holds Python objects",
    ),
}


@pytest.mark.parametrize("case", REFUSED_ARRAYS)
def test_arrays_that_do_not_fit_are_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    arrays, message = REFUSED_ARRAYS[case]
    path = write_npz(tmp_path, **arrays)
    with pytest.raises(ConfigError, match=message) as caught:
        load_labelled_images(path, COLOUR, num_classes=10)
    assert str(path) in str(caught.value)


@given(share=st.floats(0, 0.999))
def test_a_truncated_archive_is_refused(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    path = write_npz(tmp_path_factory.mktemp("npz"), images=pixels(2, 8, 10, 3), labels=LABELS)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ConfigError, match=r"cannot be read as an \.npz file"):
        load_labelled_images(path, COLOUR, num_classes=10)


def test_a_flipped_byte_in_the_pixels_is_noticed(tmp_path: Path) -> None:
    path = write_npz(tmp_path, images=pixels(20, 8, 10, 3), labels=np.zeros(20, dtype=np.int64))
    content = bytearray(path.read_bytes())
    content[2000] ^= 255
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="damaged"):
        load_labelled_images(path, COLOUR, num_classes=10)


def test_a_lone_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "test.npz"
    with path.open("wb") as file:
        np.save(file, pixels(2, 8, 10, 3))
    with pytest.raises(ConfigError, match="one array without a name"):
        load_labelled_images(path, COLOUR, num_classes=10)


class Payload:
    """Makes a folder in whoever unpickles it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["images", "labels", "more"])
def test_a_pickle_in_an_archive_is_not_executed(tmp_path: Path, name: str) -> None:
    arrays = {"images": pixels(2, 8, 10, 3), "labels": LABELS, name: np.array([Payload(tmp_path / "executed")])}
    path = write_npz(tmp_path, **arrays)
    if name == "more":
        assert len(load_labelled_images(path, COLOUR, num_classes=10)) == 2
    else:
        with pytest.raises(ConfigError, match=f"{name} holds Python objects"):
            load_labelled_images(path, COLOUR, num_classes=10)
    assert not (tmp_path / "executed").exists()


def test_a_bare_pickle_is_not_executed(tmp_path: Path) -> None:
    (tmp_path / "test.npz").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    with pytest.raises(ConfigError, match="is a pickle, which could execute code"):
        load_labelled_images(tmp_path / "test.npz", COLOUR, num_classes=10)
    assert not (tmp_path / "executed").exists()


def write_archive(path: Path, num_images: int, dtype: str = "|u1") -> Path:
    """Write an archive whose images are so many zeros, compressed as well as they can be."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({num_images}, 8, 10, 3)}}".encode()
    start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    labels = io.BytesIO()
    np.save(labels, np.broadcast_to(np.zeros((), np.uint8), min(num_images, 10**6)))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", start + bytes(10**6))
        archive.writestr("labels.npy", labels.getvalue())
    return path


@pytest.mark.parametrize(
    ("num_images", "dtype", "message"),
    [
        (10**12, "|u1", r"labels must have shape \(1000000000000,\)"),
        (10**12, "<f8", "images must be uint8"),
        (10**30, "|u1", "cannot be read as an .npz file"),
        (10**6, "|u1", "cannot be read as an .npz file"),  # fewer than it says
    ],
)
def test_an_archive_that_unpacks_to_more_than_it_should_takes_no_memory(
    tmp_path: Path, num_images: int, dtype: str, message: str
) -> None:
    tracemalloc.start()
    with pytest.raises(ConfigError, match=message):
        load_labelled_images(write_archive(tmp_path / "test.npz", num_images, dtype), COLOUR, num_classes=10)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < 3e8


def test_images_that_do_not_fit_into_memory_are_refused_before_they_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 10)
    path = write_npz(tmp_path, images=pixels(2, 8, 10, 3), labels=LABELS)
    with pytest.raises(ConfigError, match=r"would take 0 GB, more than this machine has; give fewer, or a folder"):
        load_labelled_images(path, COLOUR, num_classes=10)


def test_a_header_that_is_gigabytes_long_is_not_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "test.npz", "w") as archive:
        for name in ("images", "labels"):
            archive.writestr(f"{name}.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff")
    with pytest.raises(ConfigError, match="images is not a plain array"):
        load_labelled_images(tmp_path / "test.npz", COLOUR, num_classes=10)


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        load_labelled_images(tmp_path / "absent", COLOUR, num_classes=10)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    path.write_text("1,2,3")
    with pytest.raises(ConfigError, match=r"not a folder and not an \.npz file"):
        load_labelled_images(path, COLOUR, num_classes=10)


# --- folders ----------------------------------------------------------------------------------------------------------


def test_class_folders_are_counted_in_sorted_order(tmp_path: Path) -> None:
    images = pixels(3, 8, 10, 3)
    for name, image in zip(["dog/b.png", "cat/x.png", "dog/a.png"], images, strict=True):
        write_image(tmp_path / name, image)
    data = load_labelled_images(tmp_path, COLOUR, num_classes=2)
    np.testing.assert_array_equal(data.images[:], images[[1, 2, 0]])
    np.testing.assert_array_equal(data.labels, [0, 1, 1])


def test_files_are_decoded_only_when_their_batch_is_taken(tmp_path: Path) -> None:
    write_image(tmp_path / "0" / "a.png", pixels(8, 10, 3))
    broken = tmp_path / "0" / "b.png"
    broken.write_bytes(b"not an image")
    batches = load_labelled_images(tmp_path, COLOUR, num_classes=1).batches(1)
    next(batches)
    with pytest.raises(ConfigError, match=rf"{broken}: cannot be read as an image"):
        next(batches)


def test_a_truncated_image_is_refused_by_name(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png", pixels(8, 10, 3))
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ConfigError, match=r"a\.png: cannot be read as an image"):
        ImageFiles((path,), (3, 8, 10))[:]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tiff"])
def test_postscript_under_the_name_of_an_image_is_not_handed_to_a_program(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 8\n(executed) (w) file closefile showpage\n")
    with pytest.raises(ConfigError, match="cannot identify image file"):
        ImageFiles((path,), (3, 8, 10))[:]


@pytest.mark.parametrize("form", ["BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP"])
def test_images_are_known_by_their_content(tmp_path: Path, form: str) -> None:
    Image.fromarray(pixels(8, 10, 3)).save(tmp_path / "a.jpg", form)
    assert ImageFiles((tmp_path / "a.jpg",), (3, 8, 10))[:].shape == (1, 8, 10, 3)


@pytest.mark.parametrize("form", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
def test_a_damaged_image_is_read_or_refused_by_name(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(pixels(8, 10, 3)).save(path, form)
    content, chance = path.read_bytes(), random.Random(form)
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(min(len(damaged), 200))] = chance.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(ConfigError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of metadata
            assert ImageFiles((path,), (3, 8, 10))[:].shape == (1, 8, 10, 3)


def test_a_narrow_image_is_not_resized_to_gigabytes(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png", np.zeros((60000, 1), dtype=np.uint8))
    with pytest.raises(ConfigError, match="1 x 60000 pixels are too narrow for 224 x 224"):
        ImageFiles((path,), (3, 224, 224))[:]


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_levels_of_16_bits_become_the_nearest_of_256(tmp_path: Path, channels: int) -> None:
    levels = np.linspace(0, 65535, 80).round().astype(np.uint16).reshape(8, 10)
    (tmp_path / "a.pgm").write_bytes(b"P5 10 8 65535\n" + levels.astype(">u2").tobytes())
    paths = (write_image(tmp_path / "a.png", levels), tmp_path / "a.pgm")
    expected = np.floor(levels / 257 + 0.5).astype(np.uint8)
    for image in ImageFiles(paths, (channels, 8, 10))[:]:
        np.testing.assert_array_equal(image, np.repeat(expected[..., None], channels, axis=2))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_pixels_whose_white_is_unknown_are_refused_instead_of_clipped(tmp_path: Path, dtype: type) -> None:
    path = write_image(tmp_path / "a.tif", np.full((8, 10), 3000, dtype=dtype))
    with pytest.raises(ConfigError, match=r"a.tif: .*more than 8 bits, and nothing says which of them is white"):
        ImageFiles((path,), (1, 8, 10))[:]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_are_converted_to_the_channels_of_the_model(tmp_path: Path, channels: int) -> None:
    path = write_image(tmp_path / "a.png", pixels(8, 10, 3))
    assert ImageFiles((path,), (channels, 8, 10))[:].shape == (1, 8, 10, channels)


def test_another_size_is_resized_to_cover_and_cropped_to_the_centre(tmp_path: Path) -> None:
    # Twice as high and four times as wide as the model's input: the sides go, the middle stays.
    image = np.zeros((16, 40), dtype=np.uint8)
    image[:, 10:30] = 200
    path = write_image(tmp_path / "a.png", image)
    covered = ImageFiles((path,), (1, 8, 10))[:]
    assert covered.shape == (1, 8, 10, 1)
    assert (covered[:, :, 1:-1] == 200).all()


@given(height=st.integers(1, 60), width=st.integers(1, 60))
def test_every_size_is_brought_to_the_shape_without_a_border(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int
) -> None:
    path = write_image(tmp_path_factory.mktemp("size") / "a.png", np.full((height, width), 77, dtype=np.uint8))
    assert (ImageFiles((path,), (1, 8, 10))[:] == np.full((1, 8, 10, 1), 77)).all()
