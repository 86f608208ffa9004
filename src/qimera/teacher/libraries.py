"""Architectures of timm, torchvision and the Hugging Face hub -> a network, and what its images look like.

The libraries are imported when a model of theirs is asked for, and not before.
"""

import importlib
import logging
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from qimera.config.input_spec import IMAGE_MODES
from qimera.errors import ConfigError, first_line, suggest

logger = logging.getLogger(__name__)

LIBRARIES = ("timm", "torchvision", "hf-hub")
"""What can stand before the colon of ``timm:resnet18``."""

_CLASSES = 1000
"""What both libraries build an architecture for, unless they are told another number."""

_AUXILIARY = {"googlenet": "aux1", "inception_v3": "AuxLogits"}
"""Architectures of torchvision that change how their images are normalised, and a part that only training uses."""


def build(library: str, name: str, weights: Mapping[str, Tensor] | None) -> nn.Module:
    """Return the network called ``name`` of a library, with as many classes and channels as ``weights`` are for.

    Without ``weights``, those of a hub's model are downloaded, and those of the others stay random.

    Raises:
        ConfigError: the library is not installed, knows no such name, or the hub cannot be reached.
    """
    if library == "torchvision":
        return _build_torchvision(name, weights)
    return _build_timm(name if library == "timm" else f"hf-hub:{name}", weights)


def input_of(library: str, name: str, model: nn.Module) -> dict[str, Any]:
    """Return shape, mean and std of the images of a network that ``build`` returned, as far as its library says."""
    if library == "torchvision":
        versions = list(_import("torchvision.models").get_model_weights(name))
        if not versions:
            return {}
        prepared = versions[-1].transforms()
        return {"shape": (3, *prepared.crop_size * 2)[:3], "mean": tuple(prepared.mean), "std": tuple(prepared.std)}
    known = _import("timm.data").resolve_model_data_config(model)
    channels = _channels_of(model, known["input_size"][0])
    if channels != len(known["mean"]):
        return {"shape": (channels, *known["input_size"][1:])}
    return {"shape": tuple(known["input_size"]), "mean": tuple(known["mean"]), "std": tuple(known["std"])}


def _build_timm(name: str, weights: Mapping[str, Tensor] | None) -> nn.Module:
    timm = _import("timm")
    on_hub = name.startswith("hf-hub:")
    if not on_hub and not timm.is_model(name.partition(".")[0]):
        raise ConfigError(f"model: timm has no architecture {name!r}{suggest(name, timm.list_models())}")
    try:
        model = timm.create_model(name, pretrained=on_hub and weights is None)
        changes = {} if weights is None else _changes_for_timm(model, weights)
        if changes:
            model = timm.create_model(name, pretrained=False, **changes)
    # A hub can fail in any way.
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        if on_hub:
            raise ConfigError(
                f"model: {name} could not be fetched ({reason}); it takes a network connection, "
                "or files of an earlier download"
            ) from error
        raise ConfigError(f"model: timm cannot build {name}: {reason}") from error
    assert isinstance(model, nn.Module)
    return model


def _changes_for_timm(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the number of classes and of channels that ``weights`` were trained for, where it is not the usual."""
    config: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    found = {}
    for setting, key, axis in (("num_classes", "classifier", 0), ("in_chans", "first_conv", 1)):
        layer = config.get(key)
        layer = layer[0] if isinstance(layer, tuple) else layer
        given = _ending_with(weights, f"{layer}.weight") if layer else None
        usual = dict(model.named_parameters()).get(f"{layer}.weight")
        if given is not None and usual is not None and given.ndim > axis and given.shape[axis] != usual.shape[axis]:
            found[setting] = given.shape[axis]
            logger.info("%s: %d instead of %d, as the weights have it", setting, given.shape[axis], usual.shape[axis])
    return found


def _build_torchvision(name: str, weights: Mapping[str, Tensor] | None) -> nn.Module:
    models = _import("torchvision.models")
    names = models.list_models(module=models)
    if name not in names:
        raise ConfigError(f"model: torchvision has no classifier {name!r}{suggest(name, names)}")
    options = _options_for_torchvision(name, weights)
    model = models.get_model(name, weights=None, **options)
    assert isinstance(model, nn.Module)
    last = [key for key, value in model.named_parameters() if value.ndim > 1][-1]
    given = None if weights is None else _ending_with(weights, last)
    if given is not None and given.shape[0] != _CLASSES:
        logger.info("num_classes: %d instead of %d, as the weights have it", given.shape[0], _CLASSES)
        model = models.get_model(name, weights=None, num_classes=given.shape[0], **options)
        assert isinstance(model, nn.Module)
    return model


def _options_for_torchvision(name: str, weights: Mapping[str, Tensor] | None) -> dict[str, bool]:
    """Return what torchvision sets itself when it loads its own weights, which were trained for other mean and std.

    Fine-tuning keeps it, so it is right for every network that began with those weights.
    """
    if name not in _AUXILIARY:
        return {}
    if weights is None:
        return {"init_weights": True}
    logger.info(
        "%s: images are normalised with ImageNet's mean and std, and the network changes that to 0.5 itself, as "
        "torchvision's own weights and those fine-tuned from them need (transform_input=True); for a network that was "
        "trained from scratch without it, give a function that builds it",
        name,
    )
    has_auxiliary = any(_AUXILIARY[name] in key.split(".") for key in weights)
    return {"transform_input": True, "aux_logits": has_auxiliary, "init_weights": False}


def _ending_with(weights: Mapping[str, Tensor], key: str) -> Tensor | None:
    """Return the weight called ``key``, which wrappers may have put prefixes before."""
    return next((value for name, value in weights.items() if name == key or name.endswith(f".{key}")), None)


def _channels_of(model: nn.Module, usual: int) -> int:
    """Return how many channels the first convolution reads, or the usual number where these are no image's own."""
    first = next((each for each in model.modules() if isinstance(each, nn.Conv2d)), None)
    return usual if first is None or first.in_channels not in IMAGE_MODES else first.in_channels


def _import(name: str) -> Any:
    library = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"model: {library} is not installed ({error}); pip install 'qimera[{library}]'") from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        return _import_without_kernels(name)


_schemas: list[torch.library.Library] = []
"""Kept: operations are unregistered when their library is collected."""


def _import_without_kernels(name: str) -> ModuleType:
    """Import torchvision, or what builds on it, where its compiled kernels do not fit torch's build.

    Its networks need none of them, but it refuses to be imported unless two operations are known
    (pytorch/vision#8985).
    """
    logger.info("torchvision's compiled kernels do not fit this build of torch; its networks work without them")
    for imported in [each for each in sys.modules if each.partition(".")[0] in ("torchvision", name.partition(".")[0])]:
        del sys.modules[imported]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operation in ("nms", "qnms"):
        library.define(f"{operation}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.append(library)
    return importlib.import_module(name)
