"""What a file of weights holds -> the tensors of a network, wherever in the file they are."""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn

from qimera.errors import ConfigError, describe_value, enumerate_names
from qimera.machine.weights_file import ADVICE, read_content

logger = logging.getLogger(__name__)

_AVERAGED = re.compile(r"(^|_)(ema|swa|averaged?)(_|$)", re.IGNORECASE)
"""Keys of averaged weights. Training programs evaluate these, so they are taken where others stand beside them."""

_OPTIMIZER = re.compile(r"(^|_)optim(izer)?s?(_|$)", re.IGNORECASE)
"""Keys of states of optimizers, which in some programs have the names and shapes of weights."""

_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What wrappers of torch put into the names of the layers below them, not always before every name."""

_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class StateDict:
    """A dictionary of a weights file that holds tensors."""

    place: tuple[str, ...]
    """Keys that lead to it."""

    tensors: dict[str, Tensor]
    others: dict[str, object]
    """What else stands beside the tensors, sparse and quantized ones among it."""


StateDicts = tuple[StateDict, ...]


def load_weights_(model: nn.Module, path: Path) -> None:
    """Copy the tensors of a weights file into ``model``; when anything is wrong, the model stays as it was.

    Raises:
        ConfigError: the file cannot be read, holds more than tensors, or does not fit the model.
    """
    load_state_dict_(model, read_state_dict(path), path)


def read_state_dict(path: Path) -> StateDicts:
    """Return every dictionary with tensors that a weights file holds, at any depth; nothing in it is executed.

    Raises:
        ConfigError: the file cannot be read, holds what could execute something, or no tensors.
    """
    content = read_content(path)
    found = tuple(_dictionaries(content))
    if not found:
        raise ConfigError(f"{path}: must map names to tensors, but {_describe(content)}; {ADVICE}")
    return found


def tensors_by_name(given: StateDicts) -> dict[str, Tensor]:
    """Return all tensors by the end of their place and name, averaged ones first."""
    ordered = sorted(given, key=lambda found: not _is_averaged(found.place))
    return {".".join((*found.place, name)): value for found in ordered for name, value in found.tensors.items()}


def load_state_dict_(model: nn.Module, given: StateDicts, path: Path) -> None:
    """Copy those of ``given``, which was read from ``path``, that fit ``model``; if none do, it stays as it was.

    A prefix before every name of the model and the names of torch's wrappers are dropped. The ``num_batches_tracked``
    of batch norms may be missing or too many. Of several that fit, the averaged ones (EMA) are taken.

    Raises:
        ConfigError: no tensors fit the model, or several do.
    """
    expected = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    attempts = [attempt for found in given for attempt in _attempts(found, expected)]
    fitting = [attempt for attempt in attempts if not attempt.problems]
    if not fitting:
        nearest = max(attempts, key=lambda attempt: (attempt.num_named, attempt.is_averaged))
        where = f" (the weights under {nearest.where})" if nearest.where else ""
        raise ConfigError(
            f"{path}: does not fit {type(model).__name__}{where}; {'; '.join(nearest.problems)}. "
            "These weights belong to another architecture"
        )
    chosen = _choose(fitting, type(model).__name__, path)
    _tell(chosen, fitting, attempts, path)
    model.load_state_dict(chosen.tensors, strict=False)


# --- what the file holds ----------------------------------------------------------------------------------------------


def _dictionaries(content: object) -> Iterator[StateDict]:
    """Yield what holds tensors, outer ones first, each object once, for files can refer to themselves."""
    seen: set[int] = set()
    waiting: list[tuple[tuple[str, ...], object]] = [((), content)]
    while waiting:
        place, value = waiting.pop()
        if not isinstance(value, dict | list | tuple) or id(value) in seen:
            continue
        seen.add(id(value))
        entries = _entries(value)
        inner = [((*place, name), entry) for name, entry in entries if not _OPTIMIZER.search(name)]
        waiting += reversed(inner)
        named = dict(entries) if isinstance(value, dict) else {}
        # Tensor.detach: an attribute of the same name could hide the method, and is gone afterwards.
        tensors = {key: Tensor.detach(entry) for key, entry in named.items() if _is_dense_tensor(entry)}
        if tensors:
            yield StateDict(place, tensors, {key: entry for key, entry in named.items() if key not in tensors})


def _entries(value: dict[object, object] | list[object] | tuple[object, ...]) -> list[tuple[str, object]]:
    # dict.items: a file can give an OrderedDict an attribute that hides the method.
    entries = dict.items(value) if isinstance(value, dict) else enumerate(value)
    return [(str(key), entry) for key, entry in entries if isinstance(key, str | int)]


def _is_dense_tensor(value: object) -> TypeGuard[Tensor]:
    if not isinstance(value, Tensor) or type(value) not in (Tensor, nn.Parameter):
        return False
    is_plain = not value.is_nested and not value.is_quantized and value.device.type == "cpu"
    return is_plain and value.layout is torch.strided


def _describe_entry(value: object) -> str:
    is_tensor = isinstance(value, Tensor)
    return "a sparse, quantized, nested or meta tensor" if is_tensor else describe_value(value)


def _describe(content: object) -> str:
    if not isinstance(content, dict):
        return f"holds {describe_value(content)}"
    kinds = [f"{_describe_entry(value)} under {name!r}" for name, value in _entries(content)]
    return f"holds no dense tensors by name, but {enumerate_names(kinds)}" if kinds else "is empty"


# --- what fits the model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Attempt:
    """One way of giving the tensors of a dictionary the names that the model has for them."""

    found: StateDict
    prefix: str
    tensors: dict[str, Tensor]
    problems: tuple[str, ...]
    num_named: int
    """Tensors of the model that are there, by name."""

    left_out: list[str] = field(default_factory=list)
    """Names without the prefix."""

    dropped: tuple[str, ...] = ()
    """Wrappers whose name was taken out of the names."""

    @property
    def is_averaged(self) -> bool:
        return _is_averaged((*self.found.place, *self.prefix.split(".")))

    @property
    def where(self) -> str:
        """Key and prefix; empty for names of the model at the top of the file."""
        key = repr(".".join(self.found.place)) if self.found.place else ""
        prefix = f"the prefix {self.prefix!r}" if self.prefix else ""
        return " with ".join(filter(None, (key, prefix)))


def _is_averaged(segments: tuple[str, ...]) -> bool:
    return any(_AVERAGED.search(segment) for segment in segments)


def _attempts(found: StateDict, expected: Mapping[str, Tensor]) -> list[_Attempt]:
    """Return the ways in which all of the model's names are there, or the one with most of them."""
    required = [key for key in expected if not key.endswith(_COUNTER)]
    ways: list[tuple[int, StateDict, str, tuple[str, ...]]] = []
    for spelled, dropped in ((found, ()), _without_wrappers(found, expected)):
        for prefix in _prefixes(spelled, required):
            ways.append((sum(prefix + key in spelled.tensors for key in required), spelled, prefix, dropped))
        complete = [way for way in ways if way[0] == len(required)]
        if complete:
            return [_attempt(*way, expected) for way in complete]
    return [_attempt(*max(ways, key=lambda way: way[0]), expected)]


def _prefixes(found: StateDict, required: list[str]) -> list[str]:
    """Return what stands before names of the model, no prefix and what stands before most of them first."""
    known, depths = set(required), {key.count(".") + 1 for key in required}
    counts: Counter[str] = Counter()
    for name in (*found.tensors, *found.others):
        parts = name.split(".")
        counts.update(
            "".join(f"{part}." for part in parts[: len(parts) - depth])
            for depth in depths
            if depth <= len(parts) and ".".join(parts[len(parts) - depth :]) in known
        )
    most = max(counts.values(), default=0)
    best = ["", *sorted(prefix for prefix, count in counts.items() if prefix and count == most)]
    # Where "model." stands before all names, "model.aux." before some is a part of the same network.
    outer = [each for each in best if counts[each] == most]
    return [each for each in best if not any(each != other and each.startswith(other) for other in outer)]


def _without_wrappers(found: StateDict, expected: Mapping[str, Tensor]) -> tuple[StateDict, tuple[str, ...]]:
    """Take the names of wrappers that the model does not have out of the names."""
    own = {part for key in expected for part in key.split(".")}
    present = {part for name in found.tensors for part in name.split(".")}
    gone = tuple(sorted(_WRAPPERS & present - own))
    names = {name: ".".join(part for part in name.split(".") if part not in gone) for name in found.tensors}
    if len(set(names.values())) < len(names):
        return found, ()
    return StateDict(found.place, {names[key]: value for key, value in found.tensors.items()}, found.others), gone


def _attempt(
    num_named: int, found: StateDict, prefix: str, dropped: tuple[str, ...], expected: Mapping[str, Tensor]
) -> _Attempt:
    tensors = {key.removeprefix(prefix): value for key, value in found.tensors.items() if key.startswith(prefix)}
    others = {key.removeprefix(prefix): value for key, value in found.others.items() if key.startswith(prefix)}
    tensors = _under_all_names(tensors, expected)
    left_out = [key for key in (*found.tensors, *found.others) if not key.startswith(prefix)]
    left_out += [prefix + key for key in others if key not in expected]
    problems = (*_key_problems(tensors, others, expected), *_tensor_problems(tensors, expected))
    return _Attempt(found, prefix, tensors, problems, num_named, left_out, dropped)


def _under_all_names(tensors: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the other names of tensors that the model has under several; safetensors keeps one name of each."""
    places = {key: (value.data_ptr(), value.shape, value.dtype) for key, value in expected.items()}
    given = {places[key]: value for key, value in tensors.items() if key in places}
    return {key: given[place] for key, place in places.items() if place in given} | tensors


def _choose(fitting: list[_Attempt], model: str, path: Path) -> _Attempt:
    group = [attempt for attempt in fitting if attempt.is_averaged] or fitting
    different = [group[0], *(each for each in group[1:] if not _are_equal(each.tensors, group[0].tensors))]
    if len(different) > 1:
        places = "; ".join(attempt.where or "the top of the file" for attempt in different)
        raise ConfigError(
            f"{path}: holds several state dicts that fit {model} ({places}); save the one to use by itself"
        )
    return group[0]


def _are_equal(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def _tell(chosen: _Attempt, fitting: list[_Attempt], attempts: list[_Attempt], path: Path) -> None:
    facts = [f"taking the weights under {chosen.where}"] if chosen.where else []
    beside = [each.where or "the top of the file" for each in fitting if not each.is_averaged]
    if chosen.is_averaged and beside:
        facts.append(f"averaged ones, and not those under {', '.join(beside)}")
    if chosen.dropped:
        facts.append(f"dropping {', '.join(repr(f'{each}.') for each in chosen.dropped)} from their names")
    if chosen.left_out:
        facts.append(f"leaving out {len(chosen.left_out)}: {enumerate_names(chosen.left_out)}")
    if facts:
        logger.info("%s: %s", path, ", ".join(facts))
    unfit = [each for each in attempts if each.is_averaged and each.num_named and each.problems]
    if unfit and not chosen.is_averaged:
        problems = "; ".join(unfit[0].problems)
        logger.warning("%s: the averaged weights under %s do not fit: %s", path, unfit[0].where, problems)


def _key_problems(
    given: Mapping[str, Tensor], others: Mapping[str, object], expected: Mapping[str, Tensor]
) -> Iterator[str]:
    wrong = {key: others[key] for key in expected if key in others}
    missing = [key for key in expected if key not in given and key not in wrong and not key.endswith(_COUNTER)]
    unexpected = [key for key in given if key not in expected and not key.endswith(_COUNTER)]
    if wrong:
        kinds = [f"{_describe_entry(value)} under {key!r}" for key, value in wrong.items()]
        yield f"{len(wrong)} no dense tensors: {enumerate_names(kinds)}"
    if missing:
        yield f"{len(missing)} missing: {enumerate_names(missing, nearest_in=unexpected)}"
    if unexpected:
        yield f"{len(unexpected)} unexpected: {enumerate_names(unexpected, nearest_in=missing)}"


def _tensor_problems(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    shapes, types, broken = [], [], []
    for key in expected.keys() & given.keys():
        ours, theirs = expected[key], given[key]
        if theirs.shape != ours.shape:
            shapes.append(f"{key} is {tuple(theirs.shape)} in the file and {tuple(ours.shape)} in the model")
        elif _kind(theirs) != _kind(ours):
            types.append(f"{key} is {theirs.dtype} in the file and {ours.dtype} in the model")
        # In the type of the model: not every one of one byte can be asked.
        elif theirs.is_floating_point() and theirs.to(ours.dtype).isnan().any():
            broken.append(key)
    kinds = {"of another shape": shapes, "of another type": types, "with NaN values": broken}
    return [f"{len(found)} {kind}: {enumerate_names(sorted(found))}" for kind, found in kinds.items() if found]


def _kind(value: Tensor) -> tuple[bool, bool]:
    return value.is_floating_point(), value.is_complex()
