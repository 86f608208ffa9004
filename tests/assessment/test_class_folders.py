import importlib.util
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qimera.assessment.class_folders import find_class_files
from qimera.errors import ConfigError
from qimera.teacher import libraries


def make_folders(root: Path, *names: str, image: str = "a.png") -> Path:
    """Write an image into each of some folders."""
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(root / name / image)
    return root


def class_of_folders(root: Path, num_classes: int) -> dict[str, int]:
    files, labels = find_class_files(root, num_classes)
    return {file.relative_to(root).parts[0]: label for file, label in zip(files, labels, strict=True)}


NAMES = {
    "integers": [str(index) for index in range(12)],
    "integers from 1": [str(index) for index in range(1, 13)],
    "leading zeros": [f"{index:02}" for index in range(12)],
    "capitals": ["b", "A", "a", "B", "_", "Z9", "z10"],
    "WordNet": ["n02", "n01", "n10"],
}


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
@pytest.mark.filterwarnings("ignore")  # of torchvision
@pytest.mark.parametrize("case", NAMES)
def test_classes_are_those_of_torchvisions_imagefolder(tmp_path: Path, case: str) -> None:
    make_folders(tmp_path, *NAMES[case])
    expected = libraries._import("torchvision.datasets").ImageFolder(tmp_path).class_to_idx
    assert class_of_folders(tmp_path, len(NAMES[case])) == expected


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (NAMES["integers"], "order of text, as torchvision's ImageFolder does: folder 10 is class 2; .* leading zeros"),
        (NAMES["integers from 1"], "folder 10 is class 1;"),
        (NAMES["integers"][:10], ""),
        (NAMES["leading zeros"], ""),
        (NAMES["WordNet"], ""),
        (["n1", "n10", "n2"], ""),
    ],
)
def test_it_is_said_where_the_order_of_text_is_not_that_of_numbers(
    tmp_path: Path, names: list[str], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        find_class_files(make_folders(tmp_path, *names), len(names))
    assert bool(caplog.text) == bool(told)
    assert re.search(told, caplog.text)


def test_numbers_name_the_classes_where_some_are_absent_and_both_orders_agree(tmp_path: Path) -> None:
    make_folders(tmp_path / "few", "7", "2")
    assert class_of_folders(tmp_path / "few", 8) == {"2": 2, "7": 7}
    make_folders(tmp_path / "zeros", "010", "002", "107")
    assert class_of_folders(tmp_path / "zeros", 200) == {"002": 2, "010": 10, "107": 107}


@pytest.mark.parametrize("names", [["10", "2", "7"], ["0", "1", "2"], ["10", "11"], ["01", "2"]])
def test_numbers_are_refused_where_some_are_absent_and_the_orders_differ(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"named by numbers .* Add an empty folder for each absent class, or"):
        find_class_files(make_folders(tmp_path, *names), 12)


def test_a_folder_without_images_keeps_its_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_folders(tmp_path, "a", "c")
    (tmp_path / "b").mkdir()
    with caplog.at_level(logging.WARNING):
        assert class_of_folders(tmp_path, 3) == {"a": 0, "c": 2}
    assert "no images in 1 class folders: b" in caplog.text


@pytest.mark.parametrize("splits", [["train", "val"], ["train", "test"], ["Train", "Validation", "docs"], ["test"]])
def test_parts_of_a_data_set_are_no_classes_and_the_one_to_give_is_named(tmp_path: Path, splits: list[str]) -> None:
    for split in splits:
        make_folders(tmp_path, f"{split}/cat", f"{split}/dog")
    with pytest.raises(
        ConfigError, match=rf"are no classes themselves; give one of them, such as {tmp_path}/"
    ) as found:
        find_class_files(tmp_path, 10)
    assert str(found.value).lower().endswith(tuple("/" + name for name in ("val", "test", "validation")))


def test_parts_without_class_folders_are_no_classes_either(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds test, train, which are no classes"):
        find_class_files(make_folders(tmp_path, "train", "test"), 10)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    make_folders(tmp_path, "bus", "train", "car/old")
    assert class_of_folders(tmp_path, 3) == {"bus": 0, "car": 1, "train": 2}


def test_folders_and_files_of_systems_are_passed_over(tmp_path: Path) -> None:
    make_folders(tmp_path, "cat", "dog", "cat/.ipynb_checkpoints", "dog/@eaDir", "__MACOSX/cat", ".git")
    make_folders(tmp_path, "cat", image="._a.png")
    files, labels = find_class_files(tmp_path, 2)
    assert [str(file.relative_to(tmp_path)) for file in files] == ["cat/a.png", "dog/a.png"]
    assert labels == [0, 1]


def test_fewer_named_folders_than_classes_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_folders(tmp_path, "cat")
    with caplog.at_level(logging.WARNING):
        find_class_files(tmp_path, 2)
    assert "1 class folders for 2 classes" in caplog.text


def test_other_files_and_hidden_ones_are_passed_over(tmp_path: Path) -> None:
    make_folders(tmp_path, "cat/deeper", image="x.PNG")
    make_folders(tmp_path, "cat", image=".hidden.png")
    make_folders(tmp_path, ".thumbnails")
    (tmp_path / "cat" / "notes.txt").write_text("a cat")
    assert find_class_files(tmp_path, 1)[1] == [0]


def test_more_class_folders_than_classes_are_refused(tmp_path: Path) -> None:
    for name in ("cat", "dog", "fox"):
        make_folders(tmp_path, name)
    with pytest.raises(ConfigError, match="3 class folders, the model has 2 classes"):
        find_class_files(tmp_path, 2)


def test_class_indices_beyond_the_model_are_refused(tmp_path: Path) -> None:
    for name in ("0", "99"):
        make_folders(tmp_path, name)
    with pytest.raises(ConfigError, match="has classes up to 99, the model has 10 classes"):
        find_class_files(tmp_path, 10)


def test_a_folder_without_class_folders_is_refused(tmp_path: Path) -> None:
    make_folders(tmp_path, "")
    with pytest.raises(ConfigError, match="holds no class folders"):
        find_class_files(tmp_path, 10)


def test_class_folders_without_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    with pytest.raises(ConfigError, match="no images in its 1 class folders"):
        find_class_files(tmp_path, 1)
