"""A MODEL argument -> a network in eval mode with its weights."""

import importlib
import importlib.util
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from torch.fx import GraphModule

from qimera.config.input_spec import InputSpec
from qimera.errors import ConfigError, describe_value, enumerate_names, suggest
from qimera.teacher import exported_programs, libraries
from qimera.teacher.mnist_networks import MnistCnn, MnistConvNext, MnistVit
from qimera.teacher.state_dicts import load_state_dict_, read_state_dict, tensors_by_name

logger = logging.getLogger(__name__)

_WEIGHTS_FOLDER = Path(__file__).parent / "weights"
_WEIGHTS_SUFFIXES = frozenset({".bin", ".ckpt", ".pt", ".pth", ".safetensors"})
_EXPECTED = "file.py:function, module.path:function, timm:NAME, torchvision:NAME, hf-hub:REPO, program.pt2"


@dataclass(frozen=True)
class EmbeddedModel:
    """A trained classifier that comes with the package, to try everything on without files of one's own."""

    build: Callable[[], nn.Module]
    """Makes the network with random weights."""

    weights_file: str
    """Name inside ``qimera/teacher/weights``."""

    input_spec: InputSpec
    """What its images look like."""

    description: str
    """One sentence for lists and help texts."""


_DIGITS = InputSpec(shape=(1, 28, 28), mean=(0.1307,), std=(0.3081,))

EMBEDDED_MODELS: dict[str, EmbeddedModel] = {
    "mnist_cnn": EmbeddedModel(
        build=MnistCnn,
        weights_file="mnist_cnn.safetensors",
        input_spec=_DIGITS,
        description="Residual network with 77,754 parameters for handwritten digits, trained on 4,000 MNIST images.",
    ),
    "mnist_vit": EmbeddedModel(
        build=MnistVit,
        weights_file="mnist_vit.safetensors",
        input_spec=_DIGITS,
        description="Vision transformer with 70,042 parameters for handwritten digits, trained on 4,000 MNIST images.",
    ),
    "mnist_convnext": EmbeddedModel(
        build=MnistConvNext,
        weights_file="mnist_convnext.safetensors",
        input_spec=_DIGITS,
        description="ConvNeXt with 28,666 parameters for handwritten digits, trained on 4,000 MNIST images.",
    ),
}


def load_model(source: str, weights: Path | None = None, *, untrained: bool = False) -> nn.Module:
    """Return the network that ``source`` names, in eval mode.

    Args:
        source: ``file.py:function`` or ``module.path:function``, where the function takes no arguments and returns a
            network, and is executed; ``timm:NAME``, ``torchvision:NAME`` or ``hf-hub:REPO`` (timm's models on the
            Hugging Face hub, fetched with their weights); a file of ``torch.export.save``, which ends in ``.pt2``; or
            the name of an embedded model.
        weights: File of the weights. Without it, an embedded model, a program and the hub bring their own, and a
            function's network stays as the function returned it.
        untrained: Let architectures of timm and torchvision have random weights where no file is given.

    Raises:
        ConfigError: the source or the weights cannot be found, run or read, or do not fit each other.
    """
    given = None if weights is None else read_state_dict(weights)
    library, _, name = source.partition(":")
    if source in EMBEDDED_MODELS:
        embedded = EMBEDDED_MODELS[source]
        model, weights = embedded.build(), weights or _WEIGHTS_FOLDER / embedded.weights_file
        given = given or read_state_dict(weights)
    elif library in libraries.LIBRARIES:
        if given is None and library != "hf-hub" and not untrained:
            raise ConfigError(
                f"weights: missing; {source} is an architecture with random weights. Give the file of its trained "
                "weights, or fetch both from the hub with hf-hub:REPO"
            )
        model = libraries.build(library, name, None if given is None else tensors_by_name(given))
    elif Path(source).suffix == ".pt2":
        model = exported_programs.read_program(Path(source))
    elif ":" in source:
        model = _build_from_function(*source.rsplit(":", 1))
    else:
        raise ConfigError(_explain_source(source))
    if given is not None and weights is not None:
        load_state_dict_(model, given, weights)
    else:
        logger.info("%s: no weights file given; its weights are the ones that it came with", source)
    model.eval()  # which returns nothing where the network's own train() does not
    return model


def known_input(source: str, model: nn.Module) -> dict[str, Any]:
    """Return what is known of the images of the ``model`` that ``source`` named: fields of ``InputSpec``."""
    library, _, name = source.partition(":")
    if source in EMBEDDED_MODELS:
        return EMBEDDED_MODELS[source].input_spec.model_dump()
    if library in libraries.LIBRARIES:
        return libraries.input_of(library, name, model)
    if Path(source).suffix == ".pt2":
        assert isinstance(model, GraphModule)
        return {"shape": exported_programs.image_shape(model)}
    return {}


def absolute_source(source: str) -> str:
    """Return ``source`` with the path of a file made absolute, so that it names the same from everywhere."""
    path, separator, function = source.rpartition(":")
    if separator and source.partition(":")[0] not in libraries.LIBRARIES and _is_file(path):
        return f"{Path(path).resolve()}:{function}"
    return str(Path(source).resolve()) if Path(source).suffix == ".pt2" else source


def short_source(source: str) -> str:
    """Return ``source`` without the directories of a file, which are nobody's business but the user's."""
    path, separator, function = source.rpartition(":")
    if separator and Path(path).suffix == ".py":
        return f"{Path(path).name}:{function}"
    return Path(source).name if Path(source).suffix == ".pt2" else source


# --- functions --------------------------------------------------------------------------------------------------------


def _explain_source(source: str) -> str:
    suffix = Path(source).suffix.lower()
    if suffix == ".py":
        return (
            f"model: expected file.py:function, given {source!r}; append the name of the function, as in {source}:build"
        )
    if suffix in _WEIGHTS_SUFFIXES:
        return (
            f"model: {source!r} holds weights, not an architecture; "
            "give the architecture as file.py:function and this file as weights"
        )
    return (
        f"model: expected {_EXPECTED} or an embedded model ({', '.join(sorted(EMBEDDED_MODELS))}), "
        f"given {source!r}{suggest(source, EMBEDDED_MODELS)}"
    )


def _is_file(place: str) -> bool:
    """Whether what stands before the function is a file's path, and not a module's name."""
    return place.endswith(".py") or not all(part.isidentifier() for part in place.split("."))


def _build_from_function(place: str, name: str) -> nn.Module:
    """Call the function ``name`` of a Python file or of a module that can be imported from here."""
    path = Path(place).resolve()
    if _is_file(place) and (not path.is_file() or path.suffix != ".py"):
        raise ConfigError(f"model: no such Python file: {place} (given {place + ':' + name!r})")
    with _importable(path.parent if _is_file(place) else Path.cwd()):
        try:
            module = _execute(path) if _is_file(place) else importlib.import_module(place)
        # SystemExit: a script that parses its command line when it is imported.
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"model: importing {place} failed with {_describe(error)}; "
                'let it define functions only, with the rest under if __name__ == "__main__"'
            ) from error
        function = _find_function(module, name, place)
        try:
            model = function()
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"model: {name}() of {place} failed with {_describe(error)}; it is called without arguments"
            ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model: {name}() of {place} must return a torch.nn.Module, but returned {describe_value(model)}"
        )
    return model


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let the files in ``folder`` be imported, as they are beside a running script."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _execute(path: Path) -> ModuleType:
    # A name of its own: a user's torch.py must not replace torch.
    name = "_qimera_model_" + re.sub(r"\W", "_", path.stem)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and torch.export look modules up by name, also long after the import.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _find_function(module: ModuleType, name: str, place: str) -> Callable[[], object]:
    value: object = vars(module).get(name)
    if callable(value) and not isinstance(value, nn.Module):
        return value
    functions = [key for key, other in vars(module).items() if callable(other) and not key.startswith("_")]
    if name in vars(module):
        raise ConfigError(
            f"model: {name} of {place} must be a function without arguments that returns a network, "
            f"but is {describe_value(value)}"
        )
    own = [key for key in functions if getattr(vars(module)[key], "__module__", None) == module.__name__]
    defined = enumerate_names(own) or "none"
    raise ConfigError(f"model: {place} has no function {name!r}{suggest(name, functions)}; it defines {defined}")


def _describe(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error} (line {frames[-1].lineno} of {frames[-1].filename})"
