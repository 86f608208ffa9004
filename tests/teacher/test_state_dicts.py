import argparse
import collections
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from qimera.errors import ConfigError
from qimera.teacher.state_dicts import load_weights_


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


def same_state(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, object]:
    return {prefix + key: value for key, value in state.items()}


WRAPPINGS: dict[str, Callable[[dict[str, Tensor]], dict[str, object]]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}},
    "model": lambda state: {"model": state},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "'module.'": lambda state: {f"module.{key}": value for key, value in state.items()},
    "'model.'": lambda state: {f"model.{key}": value for key, value in state.items()},
    "leaving out 1: loss.weight": lambda state: {
        "state_dict": {**{f"model.{key}": value for key, value in state.items()}, "loss.weight": torch.ones(3)},
        "hyper_parameters": {"lr": 0.1},
    },
    "leaving out 1: n_averaged": lambda state: {
        "model": {key: torch.zeros_like(value) for key, value in state.items()},
        "model_ema": {**{f"module.{key}": value for key, value in state.items()}, "n_averaged": torch.tensor(7)},
    },
    "'state_dict_ema', averaged ones, and not those under 'state_dict'": lambda state: {
        "state_dict": {key: torch.zeros_like(value) for key, value in state.items()},
        "state_dict_ema": state,
        "args": argparse.Namespace(lr=0.1),
        "metric": np.float64(76.1),
    },
    "under 'net' with the prefix 'module.'": lambda state: {"net": prefixed("module.", state), "acc": 93.0, "epoch": 3},
    "under 'state_dict' with the prefix 'net.'": lambda state: {"state_dict": prefixed("net.", state)},
    "under 'network'": lambda state: {"network": state},
    "under 'params_ema', averaged ones, and not those under 'params'": lambda state: {
        "params": {key: torch.zeros_like(value) for key, value in state.items()},
        "params_ema": state,
    },
    "under 'ema.module', averaged ones, and not those under 'model'": lambda state: {
        "model": {key: torch.zeros_like(value) for key, value in state.items()},
        "ema": {"module": state, "updates": 70},
    },
    "under the prefix 'model_ema.module.', averaged ones, and not those under the prefix 'model.'": lambda state: {
        **prefixed("model.", {key: torch.zeros_like(value) for key, value in state.items()}),
        **prefixed("model_ema.module.", state),
    },
    "under 'a.b.0.c' with the prefix 'x.y.'": lambda state: {"a": {"b": [{"c": prefixed("x.y.", state)}]}},
    "under '0'": lambda state: (state, {"lr": 0.1}),  # type: ignore[dict-item, return-value]
    "under 'discriminator'": lambda state: {"generator": {"0.weight": torch.ones(3)}, "discriminator": state},
    "under 'model'": lambda state: {"model": state, "optimizer": {"momentum": prefixed("", network(3).state_dict())}},
    "under 'weights'": lambda state: {"weights": state, "copy": {key: value.clone() for key, value in state.items()}},
    "the averaged weights under 'ema' do not fit: 2 missing: 1.running_mean, 1.running_var": lambda state: {
        "model": state,
        "ema": {key: torch.zeros_like(value) for key, value in state.items() if "running" not in key},
    },
    "dropping 'module.' from their names": lambda state: {
        key.replace("1.", "1.module.", 1) if key.startswith("1.") else key: value for key, value in state.items()
    },
    "leaving out 1: epoch": lambda state: {**state, "epoch": 3},
    "'module._orig_mod.'": lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_are_found_in_every_usual_wrapping_and_it_is_said(
    tmp_path: Path, wrapping: str, caplog: pytest.LogCaptureFixture
) -> None:
    saved, model = network(seed=1), network(seed=2)
    torch.save(WRAPPINGS[wrapping](saved.state_dict()), tmp_path / "weights.pt")
    with caplog.at_level(logging.INFO, logger="qimera.teacher.state_dicts"):
        load_weights_(model, tmp_path / "weights.pt")
    assert same_state(model, saved)
    assert (wrapping in caplog.text) == (wrapping != "plain")


def test_a_tensor_that_the_model_has_under_several_names_may_be_stored_under_one(tmp_path: Path) -> None:
    saved, model = network(seed=1), network(seed=2)
    saved.last, model.last = saved[3], model[3]
    save_model(saved, str(tmp_path / "weights.safetensors"))
    load_weights_(model, tmp_path / "weights.safetensors")
    assert same_state(model, saved)


class HiddenItems:
    """Unpickles to an OrderedDict that has no ``items`` method any more."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def __reduce__(self) -> tuple[object, ...]:
        return collections.OrderedDict, (), {"items": 3, "keys": 4}, None, iter(self.state.items())


def test_a_dictionary_that_holds_itself_or_hides_its_methods_is_read(tmp_path: Path) -> None:
    saved, model = network(seed=1), network(seed=2)
    content: dict[str, object] = {"net": HiddenItems(saved.state_dict())}
    content["self"] = [content]
    torch.save(content, tmp_path / "weights.pt")
    load_weights_(model, tmp_path / "weights.pt")
    assert same_state(model, saved)


def test_a_models_own_module_prefix_is_kept(tmp_path: Path) -> None:
    saved, model = nn.ModuleDict({"module": network(seed=1)}), nn.ModuleDict({"module": network(seed=2)})
    torch.save(saved.state_dict(), tmp_path / "weights.pt")
    load_weights_(model, tmp_path / "weights.pt")
    assert same_state(model, saved)


def test_counts_of_batches_may_be_missing_or_too_many(tmp_path: Path) -> None:
    state = network(seed=1).state_dict()
    del state["1.num_batches_tracked"]
    torch.save(state | {"9.num_batches_tracked": torch.tensor(3)}, tmp_path / "weights.pt")
    model = network(seed=2)
    load_weights_(model, tmp_path / "weights.pt")
    assert torch.equal(model[0].weight, state["0.weight"])


def test_half_precision_weights_fill_a_float_model(tmp_path: Path) -> None:
    saved, model = network(seed=1), network(seed=2)
    torch.save(saved.half().state_dict(), tmp_path / "weights.pt")
    load_weights_(model, tmp_path / "weights.pt")
    assert model[0].weight.dtype == torch.float32
    assert torch.equal(model[0].weight, saved[0].weight.float())


def changed(**changes: object) -> dict[str, object]:
    """Return a state dict of ``network`` with other entries; None takes one away."""
    state = network(seed=1).state_dict() | {key.replace("_", ".", 1): value for key, value in changes.items()}
    return {key: value for key, value in state.items() if value is not None}


REFUSED_CONTENTS = {
    "a missing and an unexpected key": (
        changed(**{"3_weight": None, "3_weights": torch.zeros(3, 16)}),
        r"1 missing: 3\.weight \(nearest: 3\.weights\); 1 unexpected: 3\.weights \(nearest: 3\.weight\)",
    ),
    "another shape": (
        changed(**{"3_weight": torch.zeros(10, 16)}),
        r"3\.weight is \(10, 16\) in the file and \(3, 16\) in the model",
    ),
    "integers for weights": (
        changed(**{"3_weight": torch.zeros(3, 16, dtype=torch.int8)}),
        r"3\.weight is torch\.int8 in the file and torch\.float32 in the model",
    ),
    "NaN": (changed(**{"3_bias": torch.full((3,), float("nan"))}), r"1 with NaN values: 3\.bias"),
    "sparse tensors": (
        changed(**{"3_weight": torch.zeros(3, 16).to_sparse()}),
        r"1 no dense tensors: a sparse, .* under '3\.weight'",
    ),
    "tensors without values": (
        changed(**{"3_weight": torch.zeros(3, 16, device="meta")}),
        r"1 no dense tensors: .* or meta tensor under '3\.weight'",
    ),
    "complex numbers": (
        changed(**{"3_weight": torch.zeros(3, 16, dtype=torch.complex64)}),
        r"3\.weight is torch\.complex64 in the file and torch\.float32 in the model",
    ),
    "numbers": (changed(**{"3_weight": 3}), r"1 no dense tensors: an object of type int under '3\.weight'"),
    "arrays": (
        {"state_dict": {key: value.numpy() for key, value in network().state_dict().items()}},
        r"holds no dense tensors by name, but an object of type dict under 'state_dict'",
    ),
    "one array": ({"0.weight": np.eye(2)}, r"but an object of type numpy\.ndarray under '0\.weight'"),
    "a list": ([torch.zeros(2)], "must map names to tensors, but holds an object of type list"),
    "one tensor": (torch.zeros(2), "must map names to tensors, but holds an object of type Tensor"),
    "two state dicts": (
        {"model": network(seed=1).state_dict(), "best": {"state_dict": network(seed=3).state_dict()}},
        r"several state dicts that fit Sequential \('model'; 'best\.state_dict'\); save the one to use by itself",
    ),
    "two networks": (
        {f"{part}.{key}": value for part in "ab" for key, value in network(seed=ord(part)).state_dict().items()},
        r"several state dicts that fit Sequential \(the prefix 'a\.'; the prefix 'b\.'\)",
    ),
    "two averages": (
        {"ema_fast": network(seed=1).state_dict(), "ema_slow": network(seed=3).state_dict()},
        r"several state dicts that fit Sequential \('ema_fast'; 'ema_slow'\)",
    ),
    "a part of a larger network": (
        changed(**{"4_weight": torch.zeros(3, 3), "aux_3.weight": torch.zeros(3, 16)}),
        r"2 unexpected: 4\.weight, aux\.3\.weight",
    ),
    "another network beside something": (
        {"generator": {"q": torch.ones(2)}, "classifier": changed(**{"4_weight": torch.zeros(3, 3)})},
        r"does not fit Sequential \(the weights under 'classifier'\); 1 unexpected: 4\.weight",
    ),
    "a part of the names": ({"0.weight": torch.zeros(4, 1, 3, 3)}, r"7 missing: 0\.bias, 1\.weight, .* 2 more"),
    "nothing": ({}, r"must map names to tensors, but is empty"),
}


@pytest.mark.parametrize("case", REFUSED_CONTENTS)
def test_weights_that_do_not_fit_are_refused_and_leave_the_model_untouched(tmp_path: Path, case: str) -> None:
    content, message = REFUSED_CONTENTS[case]
    torch.save(content, tmp_path / "weights.pt")
    model = network(seed=2)
    with pytest.raises(ConfigError, match=message):
        load_weights_(model, tmp_path / "weights.pt")
    assert same_state(model, network(seed=2))
