import logging
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qimera.errors import ConfigError
from qimera.teacher.sources import EMBEDDED_MODELS, absolute_source, known_input, load_model


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


def same_state(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def write_model_file(folder: Path, code: str, name: str = "model.py") -> str:
    """Write a user's file and return its path."""
    path = folder / name
    path.write_text(f"from torch import nn\n\n\n{code}")
    return str(path)


# --- file.py:function -------------------------------------------------------------------------------------------------


def test_a_function_of_a_file_gives_the_network_in_eval_mode(tmp_path: Path) -> None:
    path = write_model_file(tmp_path, "def build():\n    return nn.Sequential(nn.BatchNorm2d(3), nn.Dropout())\n")
    model = load_model(f"{path}:build")
    assert isinstance(model[0], nn.BatchNorm2d)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("source", ["hf-hub:timm/resnet18.a1_in1k", "timm:resnet18", "mnist_cnn"])
def test_a_model_that_lies_in_no_file_is_called_the_same_everywhere(source: str) -> None:
    assert absolute_source(source) == source


def test_a_network_whose_own_train_returns_nothing_is_returned_itself(tmp_path: Path) -> None:
    code = "class Net(nn.Linear):\n    def train(self, mode=True):\n        super().train(mode)\n\n\n"
    path = write_model_file(tmp_path, code + "def build():\n    return Net(2, 3)\n")
    model = load_model(f"{path}:build")
    assert isinstance(model, nn.Linear)
    assert not model.training


def test_a_class_of_a_file_works_as_a_function_does(tmp_path: Path) -> None:
    path = write_model_file(tmp_path, "class Net(nn.Module):\n    pass\n")
    assert type(load_model(f"{path}:Net")).__name__ == "Net"


def test_files_beside_the_users_file_can_be_imported_also_by_the_function(tmp_path: Path) -> None:
    (tmp_path / "users_layers_a.py").write_text("WIDTH = 7\n")
    (tmp_path / "users_layers_b.py").write_text("WIDTH = 5\n")
    path = write_model_file(
        tmp_path,
        "import users_layers_a\n\n"
        "def build():\n    import users_layers_b\n"
        "    return nn.Linear(users_layers_a.WIDTH, users_layers_b.WIDTH)\n",
    )
    before = list(sys.path)
    assert load_model(f"{path}:build").weight.shape == (5, 7)
    assert sys.path == before


def test_the_search_path_is_put_back_after_a_failure_too(tmp_path: Path) -> None:
    path = write_model_file(tmp_path, "raise ValueError\n")
    before = list(sys.path)
    with pytest.raises(ConfigError):
        load_model(f"{path}:build")
    assert sys.path == before


def test_a_file_named_like_a_library_does_not_replace_it(tmp_path: Path) -> None:
    path = write_model_file(tmp_path, "def build():\n    return nn.ReLU()\n", name="torch.py")
    load_model(f"{path}:build")
    assert sys.modules["torch"] is torch


def test_dataclasses_and_relative_paths_work_in_the_users_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model_file(
        tmp_path,
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Config:\n    width: int = 3\n\ndef build():\n    return nn.Linear(Config().width, 1)\n",
        name="my-model.v2.py",
    )
    # The file starts with another import, which must not stand before the future one.
    path = tmp_path / "my-model.v2.py"
    path.write_text(path.read_text().removeprefix("from torch import nn\n\n\n") + "\nfrom torch import nn\n")
    monkeypatch.chdir(tmp_path)
    assert load_model("my-model.v2.py:build").in_features == 3


def test_a_files_network_takes_the_weights_of_a_file(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    path = write_model_file(tmp_path, "def build():\n    return nn.Linear(2, 2)\n")
    model = load_model(f"{path}:build", tmp_path / "weights.pt")
    assert torch.equal(model.weight, torch.load(tmp_path / "weights.pt")["weight"])


def test_without_weights_it_is_said_where_they_come_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_model_file(tmp_path, "def build():\n    return nn.ReLU()\n")
    with caplog.at_level(logging.INFO, logger="qimera.teacher.sources"):
        load_model(f"{path}:build")
    assert "no weights file given" in caplog.text


REFUSED_FILES = {
    "a missing function": (
        "def build_small():\n    return nn.ReLU()\n",
        "has no function 'build'; did you mean build_small\\?; it defines build_small",
    ),
    "no function at all": ("", "has no function 'build'; it defines none"),
    "a network instead of a function": ("build = nn.ReLU()\n", "must be a function .* is an object of type ReLU"),
    "a number instead of a function": ("build = 3\n", "must be a function .* is an object of type int"),
    "a function that fails": (
        "def build():\n    return 1 / 0\n",
        r"build\(\) of .* failed with ZeroDivisionError: division by zero \(line 5 of .*model\.py\)",
    ),
    "a function with arguments": (
        "def build(depth):\n    pass\n",
        "failed with TypeError: .*'depth'.* without arguments",
    ),
    "another result": ("def build():\n    return [1]\n", r"must return a torch\.nn\.Module, but returned .* type list"),
    "a class as the result": ("def build():\n    return nn.ReLU\n", "but returned the class ReLU"),
    "a failing import": ("import no_such_module\n", "importing .* failed with ModuleNotFoundError: .*no_such_module"),
    "a syntax error": ("def build(:\n", "importing .* failed with SyntaxError"),
    "a script that exits": ("import sys\n\nsys.exit(2)\n", "importing .* failed with SystemExit: 2 .*__main__"),
}


@pytest.mark.parametrize("case", REFUSED_FILES)
def test_a_users_file_that_gives_no_network_is_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    code, message = REFUSED_FILES[case]
    with pytest.raises(ConfigError, match=message):
        load_model(write_model_file(tmp_path, code) + ":build")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.py:build", r"no such Python file: absent\.py"),
        ("resnet.py", r"expected file\.py:function, given 'resnet\.py'; append .* resnet\.py:build"),
        ("weights/resnet.pt", "holds weights, not an architecture"),
        (
            "mnist-cnn",
            r"embedded model \(mnist_cnn, mnist_convnext, mnist_vit\), given 'mnist-cnn'; did you mean mnist_cnn\?",
        ),
        ("", r"embedded model \(mnist_cnn, mnist_convnext, mnist_vit\), given ''"),
    ],
)
def test_a_source_that_names_no_model_is_refused_with_what_is_expected(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(source)


# --- embedded models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_an_embedded_model_answers_images_of_its_input_spec(name: str) -> None:
    spec = EMBEDDED_MODELS[name].input_spec
    model = load_model(name)
    assert not model.training
    assert model(torch.zeros(2, *spec.shape)).shape[0] == 2


def test_an_embedded_model_can_take_other_weights(tmp_path: Path) -> None:
    other = EMBEDDED_MODELS["mnist_cnn"].build()
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    assert same_state(load_model("mnist_cnn", tmp_path / "other.safetensors"), other)


def test_of_a_users_function_nothing_is_known_about_its_images() -> None:
    assert known_input("model.py:build", nn.ReLU()) == {}
