"""A MODEL argument -> a network in eval mode with its weights."""

import difflib
import importlib.util
import logging
import pickle
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qimera.embedded import MnistCnn
from qimera.errors import ConfigError
from qimera.settings import InputSpec

logger = logging.getLogger(__name__)

_WEIGHTS_FOLDER = Path(__file__).parent / "weights"
_WEIGHTS_SUFFIXES = frozenset({".bin", ".ckpt", ".pt", ".pt2", ".pth", ".safetensors"})
_NESTING_KEYS = ("state_dict", "model", "model_state_dict")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel, of torch.compile
_MAX_LISTED = 5


@dataclass(frozen=True)
class EmbeddedModel:
    """A trained classifier that comes with the package, to try everything on without files of one's own."""

    build: Callable[[], nn.Module]
    """Makes the network with random weights."""

    weights_file: str
    """Name inside ``qimera/weights``."""

    input_spec: InputSpec
    """What its images look like."""

    description: str
    """One sentence for lists and help texts."""


EMBEDDED_MODELS: dict[str, EmbeddedModel] = {
    "mnist_cnn": EmbeddedModel(
        build=MnistCnn,
        weights_file="mnist_cnn.safetensors",
        input_spec=InputSpec(shape=(1, 28, 28), mean=(0.1307,), std=(0.3081,)),
        description="Residual network with 77,754 parameters for handwritten digits, trained on 4,000 MNIST images.",
    ),
}


def load_model(source: str, weights: Path | None = None) -> nn.Module:
    """Return the network that ``source`` names, in eval mode.

    Args:
        source: ``file.py:function``, where the function takes no arguments and returns a network; or the name of
            an embedded model. The file is the user's own code and is executed.
        weights: File of the weights. Without it, an embedded model brings its own, and a function's network stays
            as the function returned it.

    Raises:
        ConfigError: the source or the weights cannot be found, run or read, or do not fit each other.
    """
    path, separator, function = source.rpartition(":")
    if source in EMBEDDED_MODELS:
        embedded = EMBEDDED_MODELS[source]
        model, weights = embedded.build(), weights or _WEIGHTS_FOLDER / embedded.weights_file
    elif separator:
        model = _build_from_file(Path(path), function)
    else:
        raise ConfigError(_explain_source(source))
    if weights is None:
        logger.info("%s: no weights file given; its weights are the ones that %s() returned", source, function)
    else:
        load_weights_(model, weights)
    return model.eval()


def embedded_input_spec(source: str) -> InputSpec | None:
    """Return what images of the embedded model ``source`` look like; None for any other source."""
    embedded = EMBEDDED_MODELS.get(source)
    return None if embedded is None else embedded.input_spec


def load_weights_(model: nn.Module, path: Path) -> None:
    """Copy the tensors of a weights file into ``model``; when anything is wrong, the model stays as it was.

    ``.safetensors`` files are read by safetensors and all others by ``torch.load(weights_only=True)``, so no code
    in the file is executed. A state dict under ``state_dict``, ``model`` or ``model_state_dict`` is taken from
    there, a prefix that DataParallel or torch.compile put before every key is dropped, and the ``num_batches_tracked``
    of batch norms may be missing or too many.

    Raises:
        ConfigError: the file cannot be read, holds more than tensors, or does not fit the model.
    """
    if not path.is_file():
        raise ConfigError(f"weights: no such file: {path}")
    given = _as_tensors(_unwrap(_read(path), path), path)
    expected = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    given = _strip_wrapper_prefixes(given, expected, path)
    problems = _key_problems(given, expected) + _tensor_problems(given, expected)
    if problems:
        raise ConfigError(
            f"{path}: does not fit {type(model).__name__}; {'; '.join(problems)}. "
            "Give the weights of this architecture, or the architecture of these weights"
        )
    model.load_state_dict(given, strict=False)


# --- source -----------------------------------------------------------------------------------------------------------


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
        f"model: expected file.py:function or an embedded model ({', '.join(sorted(EMBEDDED_MODELS))}), "
        f"given {source!r}{_suggest(source, EMBEDDED_MODELS)}"
    )


def _build_from_file(path: Path, name: str) -> nn.Module:
    if not path.is_file() or path.suffix != ".py":
        raise ConfigError(f"model: no such Python file: {path} (given {str(path) + ':' + name!r})")
    with _importable(path.resolve().parent):
        try:
            module = _execute(path.resolve())
        # SystemExit: a script that parses its command line when it is imported.
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"model: importing {path} failed with {_describe(error)}; "
                'let it define functions only, with the rest under if __name__ == "__main__"'
            ) from error
        function = _find_function(module, name, path)
        try:
            model = function()
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"model: {name}() of {path} failed with {_describe(error)}; it is called without arguments"
            ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model: {name}() of {path} must return a torch.nn.Module, but returned {_describe_value(model)}"
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


def _find_function(module: ModuleType, name: str, path: Path) -> Callable[[], object]:
    value: object = vars(module).get(name)
    if callable(value) and not isinstance(value, nn.Module):
        return value
    functions = [key for key, other in vars(module).items() if callable(other) and not key.startswith("_")]
    if name in vars(module):
        raise ConfigError(
            f"model: {name} of {path} must be a function without arguments that returns a network, "
            f"but is {_describe_value(value)}"
        )
    own = [key for key in functions if getattr(vars(module)[key], "__module__", None) == module.__name__]
    raise ConfigError(
        f"model: {path} has no function {name!r}{_suggest(name, functions)}; it defines {_enumerate(own) or 'none'}"
    )


def _describe(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error} (line {frames[-1].lineno} of {frames[-1].filename})"


def _describe_value(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of type {type(value).__name__}"


# --- weights ----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> object:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ConfigError(f"{path}: not a safetensors file, or damaged ({error}); save or copy it again") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # A damaged pickle can fail in any way.
    except Exception as error:
        raise ConfigError(f"{path}: {_explain_refusal(error)}") from error


def _explain_refusal(error: Exception) -> str:
    advice = "save model.state_dict() with torch.save, or as .safetensors, where the model is at home"
    refused = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if refused:
        # A file that ends inside the name of torch's own function looks the same.
        return f"holds more than tensors ({refused[1]}), or is damaged, and was not executed; {advice}"
    if "TorchScript" in str(error):
        return f"holds more than tensors (a TorchScript program) and was not executed; {advice}"
    return f"not a file of torch.save, or damaged ({type(error).__name__}); save or copy it again, or {advice}"


def _unwrap(content: object, path: Path) -> object:
    if not isinstance(content, Mapping):
        return content
    nested = [key for key in _NESTING_KEYS if isinstance(content.get(key), Mapping)]
    if len(nested) > 1:
        raise ConfigError(f"{path}: holds several state dicts ({', '.join(nested)}); save the one to use by itself")
    if not nested:
        return content
    logger.info("%s: taking the weights under the key %r", path, nested[0])
    return content[nested[0]]


def _as_tensors(content: object, path: Path) -> dict[str, Tensor]:
    advice = "save model.state_dict() with torch.save, or as .safetensors"
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: must map names to tensors, but holds {_describe_value(content)}; {advice}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.layout is not torch.strided:
            raise ConfigError(
                f"{path}: must map names to dense tensors, but holds {_describe_value(value)} under {key!r} "
                f"(keys: {_enumerate([str(name) for name in content])}); {advice}"
            )
    return dict(content)


def _strip_wrapper_prefixes(given: dict[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    for prefix in _WRAPPER_PREFIXES:
        if given and _all_start_with(given, prefix) and not _all_start_with(expected, prefix):
            logger.info("%s: dropping the prefix %r of every key", path, prefix)
            given = {key.removeprefix(prefix): value for key, value in given.items()}
    return given


def _all_start_with(keys: Iterable[str], prefix: str) -> bool:
    return all(key.startswith(prefix) for key in keys)


def _key_problems(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    missing = [key for key in expected if key not in given and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in given if key not in expected and not key.endswith("num_batches_tracked")]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {_enumerate(missing, nearest_in=unexpected)}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {_enumerate(unexpected, nearest_in=missing)}")
    return problems


def _tensor_problems(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    shapes, types, broken = [], [], []
    for key in expected.keys() & given.keys():
        ours, theirs = expected[key], given[key]
        if theirs.shape != ours.shape:
            shapes.append(f"{key} is {tuple(theirs.shape)} in the file and {tuple(ours.shape)} in the model")
        if theirs.is_floating_point() != ours.is_floating_point():
            types.append(f"{key} is {theirs.dtype} in the file and {ours.dtype} in the model")
        if theirs.is_floating_point() and theirs.isnan().any():
            broken.append(key)
    kinds = {"of another shape": shapes, "of another type": types, "with NaN values": broken}
    return [f"{len(found)} {kind}: {_enumerate(sorted(found))}" for kind, found in kinds.items() if found]


# --- messages ---------------------------------------------------------------------------------------------------------


def _enumerate(names: list[str], nearest_in: list[str] | None = None) -> str:
    listed = [name + _suggest(name, nearest_in or [], " (nearest: {})") for name in names[:_MAX_LISTED]]
    rest = len(names) - len(listed)
    return ", ".join(listed) + (f" and {rest} more" if rest else "")


def _suggest(name: str, valid: Iterable[str], form: str = "; did you mean {}?") -> str:
    nearest = difflib.get_close_matches(name, list(valid), n=1)
    return form.format(nearest[0]) if nearest else ""
