"""A file of weights -> the tensors of a network, without executing anything that is in the file."""

import argparse
import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qimera.errors import ConfigError, describe_value, enumerate_names

logger = logging.getLogger(__name__)

_NESTING_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "state_dict", "model", "model_state_dict")
"""Where programs that train put the weights; averaged ones first, since they are what such programs evaluate."""

_AVERAGED_KEYS = _NESTING_KEYS[:4]
_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.")
"""Of DataParallel and averaged models, of torch.compile, and of Lightning and users' own wrappers."""

_COUNTER = "num_batches_tracked"
_HARMLESS = [
    argparse.Namespace,
    np.dtype,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
    np.dtypes.Int64DType,
    np._core.multiarray.scalar,  # type: ignore[attr-defined]
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]  # of NumPy 1
]
"""What training programs store beside the weights, and what unpickling can do no harm with."""


def load_weights_(model: nn.Module, path: Path) -> None:
    """Copy the tensors of a weights file into ``model``; when anything is wrong, the model stays as it was.

    Raises:
        ConfigError: the file cannot be read, holds more than tensors, or does not fit the model.
    """
    load_state_dict_(model, read_state_dict(path), path)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file by name.

    ``.safetensors`` files are read by safetensors and all others by ``torch.load(weights_only=True)``, so no code in
    the file is executed. A state dict under a usual key, such as ``state_dict``, is taken from there; where averaged
    weights (EMA) stand beside the last ones, the averaged ones are.

    Raises:
        ConfigError: the file cannot be read, or holds more than tensors.
    """
    if not path.is_file():
        raise ConfigError(f"weights: no such file: {path}")
    return _as_tensors(_unwrap(_read(path), path), path)


def load_state_dict_(model: nn.Module, given: dict[str, Tensor], path: Path) -> None:
    """Copy ``given``, which was read from ``path``, into ``model``; when anything is wrong, it stays as it was.

    A prefix that a wrapper put before every key is dropped, and the ``num_batches_tracked`` of batch norms may be
    missing or too many.

    Raises:
        ConfigError: the tensors do not fit the model.
    """
    expected = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    given = _strip_wrapper_prefixes(given, expected, path)
    problems = _key_problems(given, expected) + _tensor_problems(given, expected)
    if problems:
        raise ConfigError(
            f"{path}: does not fit {type(model).__name__}; {'; '.join(problems)}. "
            "Give the weights of this architecture, or the architecture of these weights"
        )
    model.load_state_dict(given, strict=False)


def _read(path: Path) -> object:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ConfigError(f"{path}: not a safetensors file, or damaged ({error}); save or copy it again") from error
    try:
        with torch.serialization.safe_globals(_HARMLESS):
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
    if not nested:
        return content
    averaged = nested[0] in _AVERAGED_KEYS
    if len(nested) > 1 and not averaged:
        raise ConfigError(f"{path}: holds several state dicts ({', '.join(nested)}); save the one to use by itself")
    beside = f", averaged ones, and not those under {', '.join(map(repr, nested[1:]))}" if len(nested) > 1 else ""
    logger.info("%s: taking the weights under the key %r%s", path, nested[0], beside)
    return content[nested[0]]


def _as_tensors(content: object, path: Path) -> dict[str, Tensor]:
    advice = "save model.state_dict() with torch.save, or as .safetensors"
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: must map names to tensors, but holds {describe_value(content)}; {advice}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.layout is not torch.strided:
            raise ConfigError(
                f"{path}: must map names to dense tensors, but holds {describe_value(value)} under {key!r} "
                f"(keys: {enumerate_names([str(name) for name in content])}); {advice}"
            )
    return dict(content)


def _strip_wrapper_prefixes(given: dict[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Drop the prefixes that stand before every key of the model; what does not bear them is not of the model."""
    while True:
        prefix = next((each for each in _WRAPPER_PREFIXES if _is_wrapped(given, expected, each)), None)
        if prefix is None:
            return given
        others = [key for key in given if not key.startswith(prefix)]
        left_out = f"; leaving out {len(others)} without it: {enumerate_names(others)}" if others else ""
        logger.info("%s: dropping the prefix %r of every key%s", path, prefix, left_out)
        given = {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)}


def _is_wrapped(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], prefix: str) -> bool:
    if not given or all(key.startswith(prefix) for key in expected):
        return False
    if all(key.startswith(prefix) for key in given):
        return True
    return all(prefix + key in given or key.endswith(_COUNTER) for key in expected)


def _key_problems(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    missing = [key for key in expected if key not in given and not key.endswith(_COUNTER)]
    unexpected = [key for key in given if key not in expected and not key.endswith(_COUNTER)]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {enumerate_names(missing, nearest_in=unexpected)}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {enumerate_names(unexpected, nearest_in=missing)}")
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
    return [f"{len(found)} {kind}: {enumerate_names(sorted(found))}" for kind, found in kinds.items() if found]
