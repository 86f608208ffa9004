import importlib.util
import logging
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qimera.errors import ConfigError
from qimera.teacher import libraries
from qimera.teacher.sources import known_input, load_model

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed"),
    pytest.mark.filterwarnings("ignore"),  # of libraries that are not ours
]
SMALL = "timm:test_resnet"


def test_timm_says_what_its_images_look_like() -> None:
    model = load_model(SMALL, untrained=True)
    known = known_input(SMALL, model)
    assert known == {"shape": (3, 160, 160), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    assert not model.training


@pytest.mark.parametrize("name", ["tresnet_m", "csatv2"])
def test_channels_are_those_of_images_where_the_first_convolution_reads_others(name: str) -> None:
    """TResNet reads blocks of 4 x 4 pixels as channels, and CSATv2 a cosine transform."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    assert known_input(f"timm:{name}", model)["shape"][0] == 3


def test_torchvision_says_what_its_images_look_like() -> None:
    known = known_input("torchvision:resnet18", load_model("torchvision:resnet18", untrained=True))
    assert known["shape"] == (3, 224, 224)
    assert known["mean"] == pytest.approx((0.485, 0.456, 0.406))
    assert known["std"] == pytest.approx((0.229, 0.224, 0.225))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_classes_and_channels_are_those_of_the_weights(tmp_path: Path, prefix: str) -> None:
    import timm

    saved = timm.create_model("test_resnet", num_classes=7, in_chans=1)
    file = tmp_path / "weights.safetensors"
    save_file({prefix + key: value.contiguous() for key, value in saved.state_dict().items()}, file)
    model = load_model(SMALL, file)
    assert model(torch.zeros(2, 1, 160, 160)).shape == (2, 7)
    assert known_input(SMALL, model) == {"shape": (1, 160, 160)}


def test_torchvision_classes_are_those_of_the_weights(tmp_path: Path) -> None:
    import torchvision

    saved = torchvision.models.mobilenet_v3_small(num_classes=7)
    torch.save(saved.state_dict(), tmp_path / "weights.pt")
    assert (
        load_model("torchvision:mobilenet_v3_small", tmp_path / "weights.pt")(torch.zeros(2, 3, 64, 64)).shape[1] == 7
    )


@pytest.mark.parametrize(
    ("name", "auxiliary"), [("googlenet", True), ("googlenet", False), ("inception_v3", True), ("inception_v3", False)]
)
@pytest.mark.parametrize("num_classes", [1000, 7])
def test_torchvisions_inceptions_change_their_input_as_torchvision_lets_them(
    tmp_path: Path, name: str, auxiliary: bool, num_classes: int, caplog: pytest.LogCaptureFixture
) -> None:
    build = getattr(libraries._import("torchvision.models"), name)
    # As torchvision builds it for its own weights, which fine-tuning starts from.
    saved = build(transform_input=True, aux_logits=auxiliary, num_classes=num_classes, init_weights=False).eval()
    torch.save(saved.state_dict(), tmp_path / "weights.pt")
    with caplog.at_level(logging.INFO, logger="qimera.teacher.libraries"):
        model = load_model(f"torchvision:{name}", tmp_path / "weights.pt")
    images = torch.randn(2, 3, 80, 80, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(images), saved(images))
    assert "transform_input=True" in caplog.text
    assert known_input(f"torchvision:{name}", model)["mean"] == pytest.approx((0.485, 0.456, 0.406))


def test_no_other_architecture_of_torchvision_changes_its_input() -> None:
    models = libraries._import("torchvision.models")
    names = [name for name in models.list_models(module=models) if not name.startswith(("vit_", "swin", "regnet"))]
    with torch.device("meta"):
        built = {name: models.get_model(name, weights=None) for name in names if name not in libraries._AUXILIARY}
    assert not [name for name, model in built.items() if hasattr(model, "transform_input")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timm:resnet_18", r"timm has no architecture 'resnet_18'; did you mean resnet18\?"),
        ("torchvision:resnet_18", r"torchvision has no classifier 'resnet_18'; did you mean resnet18\?"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(source, untrained=True)


def test_random_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="weights: missing; timm:test_resnet is an architecture with random weights"):
        load_model(SMALL)


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"timm is not installed .*pip install 'qimera\[timm\]'"):
        load_model(SMALL, untrained=True)


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(libraries._import("timm"), "create_model", fail)
    with pytest.raises(ConfigError, match=r"hf-hub:timm/resnet18 could not be fetched .*it takes a network connection"):
        load_model("hf-hub:timm/resnet18")
