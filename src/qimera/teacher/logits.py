"""What a network returns -> where in it the logits are."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from qimera.errors import ConfigError, UnsupportedModelError

logger = logging.getLogger(__name__)


_WRAP = "wrap the model so that it returns them"
_TWO_LOGITS = (
    "let the last layer return minus and plus half of its one logit, without a sigmoid; the softmax of the two is then "
    "the sigmoid of the one (docs/troubleshooting.md has the code)"
)


@dataclass(frozen=True)
class LogitsPlace:
    """Where the logits are in what a network returns."""

    path: tuple[str, ...]
    """Keys, positions and names from the outside in; empty for a network that returns one tensor."""

    is_map: bool
    """Whether they are of shape (batch, num_classes, 1, 1)."""

    def logits_of(self, output: object) -> Tensor:
        """Return the logits (batch, num_classes) in ``output``."""
        found = dict(_tensors_in(output))[self.path]
        return found.flatten(1) if self.is_map else found


def choose_logits(output: object, num_images: int, wanted: str, network: str) -> LogitsPlace:
    """Return the place of the logits in ``output``, which ``network`` returned for ``num_images`` images.

    Args:
        output: A tensor, or tensors in tuples, lists, mappings and dataclasses.
        num_images: Size of the batch.
        wanted: Keys and positions on the way to the logits, such as ``head.logits``; empty to find them.
        network: What messages call it.

    Raises:
        ConfigError: there is no output ``wanted``.
        UnsupportedModelError: no output is of shape (batch, classes) with two classes or more, or several are.
    """
    tensors = dict(_tensors_in(output))
    possible = {path: tensor for path, tensor in tensors.items() if _could_be_logits(tensor, num_images)}
    listed = ", ".join(f"{_name(path)} {_shape(tensor)}" for path, tensor in tensors.items()) or "none"
    if wanted:
        by_name = {_name(path): path for path in possible}
        if wanted not in by_name:
            raise ConfigError(
                f"logits: {network} returns no logits of {num_images} images called {wanted!r}; its outputs: {listed}"
            )
        path = by_name[wanted]
    else:
        named = [path for path in possible if path and path[-1] == "logits"]
        found = named if len(named) == 1 else list(possible)
        if not found:
            scores = any(map(_is_one_number_each, tensors.values()))
            raise UnsupportedModelError(
                f"{network} returns no logits for {num_images} images; its outputs: {listed}; expected one of shape "
                f"({num_images}, classes) with at least 2 classes: {_TWO_LOGITS if scores else _WRAP}"
            )
        if len(found) > 1:
            names = ", ".join(_name(path) for path in found)
            raise UnsupportedModelError(
                f"{network} returns several tensors that could be the logits: {listed}; choose one of {names} "
                "with --logits, or logits=... in Python"
            )
        path = found[0]
        if path:
            logger.info("%s returns several tensors; its logits are %s", network, _name(path))
    return LogitsPlace(path, tensors[path].ndim > 2)


def _tensors_in(output: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    if isinstance(output, Tensor):
        yield path, output
        return
    inner: Iterator[tuple[object, object]] | zip[tuple[object, object]]
    if isinstance(output, Mapping):
        inner = iter(output.items())
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        inner = zip(output._fields, output, strict=True)
    elif isinstance(output, tuple | list):
        inner = iter(enumerate(output))
    elif dataclasses.is_dataclass(output):
        inner = ((field.name, getattr(output, field.name)) for field in dataclasses.fields(output))
    else:
        return
    for key, value in inner:
        yield from _tensors_in(value, (*path, str(key)))


def _could_be_logits(tensor: Tensor, num_images: int) -> bool:
    positions = tensor.shape[2:]
    return (
        tensor.is_floating_point()
        and tensor.ndim in (2, 4)
        and tensor.shape[0] == num_images
        and tensor.shape[1] >= 2
        and all(size == 1 for size in positions)
    )


def _is_one_number_each(tensor: Tensor) -> bool:
    """Whether there is one number for each image, as classifiers of two classes have that end in a sigmoid."""
    return tensor.is_floating_point() and tensor.ndim > 0 and tensor[0].numel() == 1


def _name(path: tuple[str, ...]) -> str:
    return ".".join(path) or "output"


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"
