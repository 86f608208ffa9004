import argparse
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from qimera.errors import ConfigError
from qimera.state_dicts import load_weights_


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


def same_state(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


WRAPPINGS: dict[str, Callable[[dict[str, Tensor]], dict[str, object]]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}},
    "model": lambda state: {"model": state},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "'module.'": lambda state: {f"module.{key}": value for key, value in state.items()},
    "'model.'": lambda state: {f"model.{key}": value for key, value in state.items()},
    "leaving out 1 without it: loss.weight": lambda state: {
        "state_dict": {**{f"model.{key}": value for key, value in state.items()}, "loss.weight": torch.ones(3)},
        "hyper_parameters": {"lr": 0.1},
    },
    "leaving out 1 without it: n_averaged": lambda state: {
        "model": {key: torch.zeros_like(value) for key, value in state.items()},
        "model_ema": {**{f"module.{key}": value for key, value in state.items()}, "n_averaged": torch.tensor(7)},
    },
    "'state_dict_ema', averaged ones, and not those under 'state_dict'": lambda state: {
        "state_dict": {key: torch.zeros_like(value) for key, value in state.items()},
        "state_dict_ema": state,
        "args": argparse.Namespace(lr=0.1),
        "metric": np.float64(76.1),
    },
    "'_orig_mod.'": lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_are_found_in_every_usual_wrapping_and_it_is_said(
    tmp_path: Path, wrapping: str, caplog: pytest.LogCaptureFixture
) -> None:
    saved, model = network(seed=1), network(seed=2)
    torch.save(WRAPPINGS[wrapping](saved.state_dict()), tmp_path / "weights.pt")
    with caplog.at_level(logging.INFO, logger="qimera.state_dicts"):
        load_weights_(model, tmp_path / "weights.pt")
    assert same_state(model, saved)
    assert (wrapping in caplog.text) == (wrapping != "plain")


@pytest.mark.parametrize("legacy", [False, True])
def test_both_formats_of_torch_save_are_read(tmp_path: Path, legacy: bool) -> None:
    saved, model = network(seed=1), network(seed=2)
    torch.save(saved.state_dict(), tmp_path / "weights.pth", _use_new_zipfile_serialization=not legacy)
    load_weights_(model, tmp_path / "weights.pth")
    assert same_state(model, saved)


def test_safetensors_are_read(tmp_path: Path) -> None:
    saved, model = network(seed=1), network(seed=2)
    save_file(saved.state_dict(), tmp_path / "weights.safetensors")
    load_weights_(model, tmp_path / "weights.safetensors")
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
    "sparse tensors": (changed(**{"3_weight": torch.zeros(3, 16).to_sparse()}), r"dense tensors, .* under '3\.weight'"),
    "numbers": (changed(**{"3_weight": 3}), r"must map names to dense tensors, but holds .* int under '3\.weight'"),
    "a list": ([torch.zeros(2)], "must map names to tensors, but holds an object of type list"),
    "one tensor": (torch.zeros(2), "must map names to tensors, but holds an object of type Tensor"),
    "two state dicts": ({"model": {}, "state_dict": {}}, r"several state dicts \(state_dict, model\)"),
    "nothing": ({}, r"8 missing: 0\.weight, 0\.bias, 1\.weight, 1\.bias, 1\.running_mean and 3 more"),
}


@pytest.mark.parametrize("case", REFUSED_CONTENTS)
def test_weights_that_do_not_fit_are_refused_and_leave_the_model_untouched(tmp_path: Path, case: str) -> None:
    content, message = REFUSED_CONTENTS[case]
    torch.save(content, tmp_path / "weights.pt")
    model = network(seed=2)
    with pytest.raises(ConfigError, match=message):
        load_weights_(model, tmp_path / "weights.pt")
    assert same_state(model, network(seed=2))


class Payload:
    """Runs a command in whoever unpickles it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


def test_code_in_a_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    torch.save({"weight": Payload(tmp_path / "executed")}, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=r"more than tensors \(\w+\.mkdir\), .* was not executed; .*state_dict"):
        load_weights_(network(), tmp_path / "weights.pt")
    assert not (tmp_path / "executed").exists()


def test_code_in_a_bare_pickle_is_not_executed(tmp_path: Path) -> None:
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps({"weight": Payload(tmp_path / "executed")}))
    with pytest.raises(ConfigError, match=r"not a file of torch\.save"):
        load_weights_(network(), tmp_path / "weights.pkl")
    assert not (tmp_path / "executed").exists()


def test_a_pickled_network_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=r"more than tensors \(torch\.nn\..*\), .* save model\.state_dict\(\)"):
        load_weights_(network(), tmp_path / "weights.pt")


@settings(max_examples=40, deadline=None)
@example(share=0.078125, suffix=".pth")  # ends inside the name of a function
@given(share=st.floats(0, 0.999), suffix=st.sampled_from([".pt", ".pth", ".safetensors"]))
def test_a_truncated_file_is_refused_and_leaves_the_model_untouched(
    tmp_path_factory: pytest.TempPathFactory, share: float, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("truncated") / f"weights{suffix}"
    state = network(seed=1).state_dict()
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=suffix == ".pt")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    model = network(seed=2)
    with pytest.raises(ConfigError, match=rf"{path}: .*damaged"):
        load_weights_(model, path)
    assert same_state(model, network(seed=2))


def test_a_missing_weights_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="weights: no such file"):
        load_weights_(network(), tmp_path / "weights.pt")
