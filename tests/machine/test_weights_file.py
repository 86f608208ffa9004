import argparse
import collections
import datetime
import functools
import gzip
import importlib
import io
import operator
import os
import pathlib
import pickle
import random
import types
import uuid
import zipfile
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import example, given, strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from qimera.errors import ConfigError
from qimera.teacher.state_dicts import load_weights_
from tests.teacher.test_state_dicts import network, same_state


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


@pytest.mark.parametrize("legacy", [False, True])
def test_what_programs_store_beside_the_weights_is_passed_over(tmp_path: Path, legacy: bool) -> None:
    saved, model = network(seed=1), network(seed=2)
    log = collections.defaultdict(list, loss=[1.0], when=[datetime.datetime.now(datetime.UTC)])
    scalars = [np.zeros(2, kind)[0] for kind in ("?bhilqBHILQefdgFDGUSV" + "O")] + [np.datetime64("2020-01-01")]
    beside = {
        "scalars": scalars,
        "arrays": [np.eye(3), np.ma.zeros(2), np.zeros(2, [("a", "f4")]), np.array([None, {}])],
        "types": [np.float32, np.dtype("f4"), torch.float32, float],
        "paths": {pathlib.PurePosixPath("a"): pathlib.PureWindowsPath("b"), "out": pathlib.Path("c")},
        "times": [datetime.date(2020, 1, 1), datetime.time(3), datetime.timedelta(1)],
        "collections": [collections.Counter("aab"), collections.deque([1], 3), {1}, frozenset({2}), range(3), slice(1)],
        "objects": [
            argparse.Namespace(lr=0.1),
            types.SimpleNamespace(lr=0.1),
            uuid.UUID(int=3),
            Decimal(1),
            Fraction(1),
        ],
        "log": log,
        "torch": torch.__version__,
        "random": [np.random.RandomState(0).get_state(), torch.get_rng_state(), random.getstate()],
    }
    content = {"state_dict": collections.defaultdict(dict, saved.state_dict()), **beside}
    torch.save(content, tmp_path / "weights.pt", _use_new_zipfile_serialization=not legacy)
    load_weights_(model, tmp_path / "weights.pt")
    assert same_state(model, saved)


def test_a_windows_path_is_passed_over_everywhere(tmp_path: Path) -> None:
    saved, model = network(seed=1), network(seed=2)
    torch.save({"model": saved.state_dict(), "out": pathlib.PureWindowsPath("x")}, tmp_path / "weights.pt")
    with zipfile.ZipFile(tmp_path / "weights.pt") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "weights.pt", "w") as archive:
        for name, entry in entries.items():
            archive.writestr(name, entry.replace(b"pathlib\nPureWindowsPath\n", b"pathlib\nWindowsPath\n"))
    load_weights_(model, tmp_path / "weights.pt")
    assert same_state(model, saved)


def test_what_others_allowed_torch_is_not_allowed_here_and_stays_theirs(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "weights.pt")
    with torch.serialization.safe_globals([nn.Sequential]):
        allowed = set(torch.serialization.get_safe_globals())
        with pytest.raises(ConfigError, match=r"more than tensors \(torch\.nn\.modules\.container\.Sequential\)"):
            load_weights_(network(), tmp_path / "weights.pt")
        assert set(torch.serialization.get_safe_globals()) == allowed


class Payload:
    """Runs a command in whoever unpickles it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


def test_code_in_a_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    torch.save({"weight": Payload(tmp_path / "executed")}, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=r"more than tensors \(\w+\.mkdir\) and was not executed; .*state_dict"):
        load_weights_(network(), tmp_path / "weights.pt")
    assert not (tmp_path / "executed").exists()


def test_code_in_a_bare_pickle_is_not_executed(tmp_path: Path) -> None:
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps({"weight": Payload(tmp_path / "executed")}))
    with pytest.raises(ConfigError, match=r"not a file of torch\.save"):
        load_weights_(network(), tmp_path / "weights.pkl")
    assert not (tmp_path / "executed").exists()


def test_a_pickled_network_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=r"more than tensors \(torch\.nn\..*\) .* save model\.state_dict\(\)"):
        load_weights_(network(), tmp_path / "weights.pt")


class Called:
    """Calls whatever it is given in whoever unpickles it."""

    def __init__(self, function: object, *arguments: object, state: object = None) -> None:
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[object, ...]:
        return self.parts


HOSTILE: dict[str, Callable[[str], object]] = {
    "os.system": lambda folder: Called(os.system, f"mkdir {folder}"),
    "eval": lambda folder: Called(eval, f"__import__('os').mkdir({folder!r})"),
    "exec": lambda folder: Called(exec, f"__import__('os').mkdir({folder!r})"),
    "getattr": lambda folder: Called(getattr, os.mkdir, "__self__"),
    "open": lambda folder: Called(open, folder, "w"),
    "partial": lambda folder: Called(functools.partial(os.mkdir, folder)),
    "attrgetter": lambda folder: Called(operator.attrgetter("__self__"), os.mkdir),
    "import": lambda folder: Called(importlib.import_module, "antigravity"),
    "torch.load": lambda folder: Called(torch.load, folder),
    "numpy.load": lambda folder: Called(np.load, folder),
    "numpy.fromfile": lambda folder: Called(np.fromfile, folder),
    "torch.hub.load": lambda folder: Called(torch.hub.load, folder, "a"),
    "storage of a file": lambda folder: Called(torch.UntypedStorage.from_file, folder, True, 9),
    "a factory that executes": lambda folder: collections.defaultdict(exec),
    "an object array with a payload": lambda folder: np.array([Payload(Path(folder))]),
    "a tensor rebuilt by a function": lambda folder: Called(
        torch._tensor._rebuild_from_type_v2, os.mkdir, Tensor, (folder,), {}
    ),
    "hooks of a parameter": lambda folder: Called(
        torch._utils._rebuild_parameter, torch.ones(2), True, collections.OrderedDict({1: os.mkdir})
    ),
    "an attribute of a parameter": lambda folder: Called(
        torch._utils._rebuild_parameter_with_state, torch.ones(2), True, {}, {"detach": os.mkdir}
    ),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("case", HOSTILE)
def test_no_function_beside_or_among_the_weights_is_called(tmp_path: Path, case: str, legacy: bool) -> None:
    content = {**network().state_dict(), "4.weight": HOSTILE[case](str(tmp_path / "executed"))}
    torch.save(content, tmp_path / "weights.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ConfigError, match=r"holds more than tensors \([\w.]+\) and was not executed"):
        load_weights_(network(), tmp_path / "weights.pt")
    assert not (tmp_path / "executed").exists()


def test_the_state_of_a_numpy_type_is_never_interpreted(tmp_path: Path) -> None:
    saved, model = network(seed=1), network(seed=2)
    # Claims that its eight bytes are a pointer to an object; NumPy would follow it.
    pointers = Called(np.dtype, "V8", False, True, state=(3, "|", None, None, None, 8, 1, 0x3F))
    array = Called(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b", state=(1, (1,), pointers, False, b"A" * 8))
    torch.save({"model": saved.state_dict(), "array": array}, tmp_path / "weights.pt")
    load_weights_(model, tmp_path / "weights.pt")
    assert same_state(model, saved)


def saved_bytes(content: object, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


def archive_of(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"3")
    return buffer.getvalue()


FOREIGN = {
    "a later protocol": (
        lambda: saved_bytes({"a": np.eye(2)}, pickle_protocol=4),
        r"more than tensors \(the pickle instr",
    ),
    "a huge number": (lambda: saved_bytes({"a": 10**900}), r"more than tensors \(the pickle instruction LONG4\)"),
    "a bare pickle": (lambda: pickle.dumps({"a": 3}), "not a file of torch.save, but a pickle of another program"),
    "a pickle of protocol 2": (lambda: pickle.dumps({"a": 3}, 2), "but a pickle of another program"),
    "an archive": (lambda: archive_of("images.npy"), r"but an archive of images\.npy"),
    "a program": (lambda: archive_of("model/archive_format"), r"torch\.export; give it as the model, .* in \.pt2"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n", "but an HDF5 file"),
    "gzip": (lambda: gzip.compress(b"abc"), "but a file that gzip compressed; unpack it first"),
    "Git LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:3", r"fetch it with git lfs pull"),
    "a web page": (lambda: b"<!DOCTYPE html>", "but a web page; download the file itself"),
    "safetensors": (lambda: safetensors.torch.save({"a": torch.ones(1)}), r"let its name end in \.safetensors"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_another_kind_of_file_is_named_and_not_called_damaged(tmp_path: Path, case: str) -> None:
    make, message = FOREIGN[case]
    (tmp_path / "weights.pt").write_bytes(make())
    with pytest.raises(ConfigError, match=message) as caught:
        load_weights_(network(), tmp_path / "weights.pt")
    assert "damaged" not in str(caught.value)


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


def test_an_archive_that_claims_to_span_disks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(network(seed=1).state_dict(), path)
    content = path.read_bytes()
    number_of_disks = content.rindex(b"PK\x06\x07") + 16
    path.write_bytes(content[:number_of_disks] + b"\x02" + content[number_of_disks + 1 : -8] + bytes(8))
    with pytest.raises(ConfigError, match=r"weights\.pt: not a file of torch\.save, or damaged"):
        load_weights_(network(seed=2), path)


def test_a_missing_weights_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="weights: no such file"):
        load_weights_(network(), tmp_path / "weights.pt")
