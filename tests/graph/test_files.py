"""Networks as files: what is written comes back, and nothing that does not belong there is read."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qimera.errors import ConfigError, UnsupportedModelError
from qimera.graph.files import describe, load_graph, save_graph
from qimera.graph.shapes import propagate_shapes_
from qimera.teacher.teacher import Teacher
from tests import shared
from tests.networks import NETWORKS, SPEC, Lambda

IMAGES = torch.randn(3, *SPEC.shape, generator=torch.Generator().manual_seed(0))


def shapes(teacher: Teacher) -> list[tuple[str, ...]]:
    found = []
    for node in teacher.module.graph.nodes:
        value = node.meta.get("val")
        found.append(tuple(map(str, value.shape[1:])) if isinstance(value, Tensor) else ())
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    teacher = shared.teacher_of(name)
    teacher.save(tmp_path / "teacher.safetensors")
    loaded = Teacher.load(tmp_path / "teacher.safetensors", SPEC)
    assert loaded.hash == teacher.hash
    assert [node.name for node in loaded.module.graph.nodes] == [node.name for node in teacher.module.graph.nodes]
    assert shapes(loaded) == shapes(teacher)
    assert [name for name, _ in loaded.module.named_parameters()] == [n for n, _ in teacher.module.named_parameters()]
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), teacher(IMAGES))


def test_infinite_and_typed_arguments_come_back(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        Lambda(lambda x: x.masked_fill(x < -9, -math.inf).clamp(min=-1).to(torch.float64).to(torch.float32)),
        Lambda(lambda x: x + torch.zeros(x.shape[0], 1, 1, 1, dtype=torch.float32)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).eval()
    teacher = Teacher.capture(model, SPEC)
    save_graph(teacher.module, tmp_path / "a.safetensors")
    assert describe(load_graph(tmp_path / "a.safetensors")) == describe(teacher.module)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.safetensors: no such file; .*have to be made again"):
        Teacher.load(tmp_path / "absent.safetensors", SPEC)


def test_names_of_values_make_no_difference_to_the_hash(teacher: Teacher) -> None:
    other = Teacher.capture(teacher.module, SPEC)
    for index, node in enumerate(other.module.graph.nodes):
        node.name = f"value_{index}"
    assert describe(other.module) != describe(teacher.module)
    assert describe(other.module, named=False) == describe(teacher.module, named=False)


def test_shapes_hold_for_batches_of_any_size(teacher: Teacher) -> None:
    propagate_shapes_(teacher.module, SPEC.shape)
    for node in teacher.module.graph.nodes:
        if node.op == "call_function":
            assert not isinstance(node.meta["val"].shape[0], int), node.name


def test_an_operation_that_is_not_on_the_list_cannot_be_written(teacher: Teacher, tmp_path: Path) -> None:
    graph = torch.fx.Graph()
    images = graph.placeholder("images")
    graph.output(graph.call_function(torch.ops.aten.rand_like.default, (images,)))
    with pytest.raises(UnsupportedModelError, match=r"rand_like_default calls aten\.rand_like\.default"):
        save_graph(torch.fx.GraphModule(nn.Module(), graph), tmp_path / "a.safetensors")


# --- what is refused --------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], None]


def call(operation: str, *args: Any, **kwargs: Any) -> Change:
    """Return what puts a call of ``operation`` behind the first node."""

    def change(stored: dict[str, Any]) -> None:
        stored["nodes"].append(["extra", operation, list(args), kwargs])
        stored["output"] = {"node": "extra"}

    return change


def rename(old: str, new: str) -> Change:
    def change(stored: dict[str, Any]) -> None:
        stored["nodes"] = json.loads(json.dumps(stored["nodes"]).replace(f'"{old}"', json.dumps(new)))

    return change


IMAGE = {"node": "x"}
HOSTILE: dict[str, tuple[Change, str]] = {
    "another version": (lambda stored: stored.update(version=2), "has format version 2"),
    "an operation that reads files": (
        call("aten.from_file.default", "passwd"),
        r"calls 'aten\.from_file\.default'",
    ),
    "an operation outside of aten": (call("os.system", "true"), r"calls 'os\.system'"),
    "an attribute of an operation": (call("aten.relu.__init__", IMAGE), r"calls 'aten\.relu\.__init__'"),
    "a name that is code": (rename("relu", "relu = open('x'); y"), "which is no plain name"),
    "a keyword": (rename("relu", "import"), "which is no plain name"),
    "a value that comes later": (call("aten.relu.default", {"node": "extra"}), "'extra', which nothing before it"),
    "a tensor that is code": (rename("conv1.weight", "conv1.weight.__class__"), "'conv1.weight.__class__', which"),
    "a tensor that is missing": (rename("conv1.weight", "conv1.other"), "'conv1.other', which is not in the file"),
    "too many arguments": (call("aten.relu.default", IMAGE, 1, 2), r"calls aten\.relu\.default with 3 arguments"),
    "an unknown argument": (call("aten.relu.default", IMAGE, out=IMAGE), r"with 1 arguments and \['out'\]"),
    "a word that is code": (call("aten.gelu.default", IMAGE, approximate="__import__('os')"), "which is no plain word"),
    "another device": (
        call("aten.to.device", IMAGE, {"device": "cuda"}, {"dtype": "torch.float32"}),
        "where an argument belongs",
    ),
    "an object": (call("aten.relu.default", {"object": "os.system"}), "where an argument belongs"),
    "deep nesting": (call("aten.relu.default", [[[[[[[[[[[]]]]]]]]]]]), "nests arguments too deeply"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_graph_that_asks_for_more_is_refused(teacher: Teacher, tmp_path: Path, name: str) -> None:
    change, message = HOSTILE[name]
    path = tmp_path / "teacher.safetensors"
    teacher.save(path)
    with safe_open(path, "pt") as file:
        stored = json.loads(file.metadata()["qimera_graph"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(stored)
    save_file(tensors, path, {"qimera_graph": json.dumps(stored)})
    with pytest.raises(ConfigError, match=message) as refusal:
        Teacher.load(path, SPEC)
    assert str(path) in str(refusal.value)
