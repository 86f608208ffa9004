"""Hostile teachers: safetensors files whose metadata holds a graph that asks for more than operations on tensors."""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hostile.archives import CODE, pickled
from tests.hostile.strings import DOTTED, NAMES, OPERATIONS, STRANGE

KEY = "qimera_graph"


@dataclass
class TeacherFile:
    """The parts of a safetensors file with a graph, to be changed."""

    graph: Any
    """What the JSON in the metadata says; a string stands for itself."""
    header: dict[str, Any]
    """Tensors by name: type, shape and where their bytes lie."""
    data: bytes
    raw: bytes | None = None
    """Another file altogether."""

    @classmethod
    def of(cls, content: bytes) -> "TeacherFile":
        """Return the parts of a file."""
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        return cls(json.loads(header.pop("__metadata__")[KEY]), header, content[8 + length :])

    def content(self) -> bytes:
        """Return the file."""
        if self.raw is not None:
            return self.raw
        graph = self.graph if isinstance(self.graph, str) else json.dumps(self.graph)
        header = json.dumps({"__metadata__": {KEY: graph}, **self.header}).encode()
        return struct.pack("<Q", len(header)) + header + self.data

    def write(self, path: Path) -> Path:
        """Write the file."""
        path.write_bytes(self.content())
        return path

    @property
    def nodes(self) -> list[Any]:
        """The nodes of its graph."""
        return self.graph["nodes"]

    def node(self, operation: str) -> list[Any]:
        """Return the first node of that operation."""
        return next(each for each in self.nodes if each[1] == operation)


Kind = Callable[[TeacherFile], None]
KINDS: dict[str, Kind] = {}


def _relu(place: int, value: object) -> Kind:
    return lambda file: file.node("aten.relu.default").__setitem__(place, value)


def _nodes(*nodes: object) -> Kind:
    """Return the kind that puts nodes behind the images."""
    return lambda file: file.nodes.__setitem__(slice(_images(file) + 1, _images(file) + 1), nodes)


def _images(file: TeacherFile) -> int:
    return next(index for index, each in enumerate(file.nodes) if each[1] == "images")


def _renamed_node(operation: str, name: str) -> Kind:
    def change(file: TeacherFile) -> None:
        old, new = json.dumps(file.node(operation)[0]), json.dumps(name)
        text = json.dumps(file.graph)
        file.graph = text.replace(f"[{old},", f"[{new},").replace(f": {old}}}", f": {new}}}")

    return change


def _renamed_tensor(name: str) -> Kind:
    def change(file: TeacherFile) -> None:
        file.node("parameter")[2], old = name, file.node("parameter")[2]
        file.header[name] = file.header.pop(old)

    return change


for target in OPERATIONS:
    for spelled in dict.fromkeys((target, target.removeprefix("torch.ops."), target.removeprefix("_"))):
        KINDS[f"calls {spelled!r}"] = _relu(1, spelled)
        KINDS[f"calls {spelled!r} with a word"] = _nodes(["x", spelled, ["touch executed"], {}])
for title, name in NAMES.items():
    for operation in ("images", "aten.relu.default", "parameter"):
        KINDS[f"{operation} called {title}"] = _renamed_node(operation, name)
    KINDS[f"an argument called {title}"] = _relu(3, {name: 1})
    KINDS[f"a word that is {title}"] = _relu(2, [name])
    KINDS[f"a second word that is {title}"] = _nodes(
        ["x", "aten.gelu.default", [{"node": "images"}], {"approximate": name}]
    )
for title, name in {**NAMES, **{f"dotted: {title}": name for title, name in DOTTED.items()}}.items():
    if name != "\udc80":  # which safetensors cannot hold
        KINDS[f"tensor called {title}"] = _renamed_tensor(name)
for number, value in enumerate(STRANGE):
    for place, part in enumerate(("name", "operation", "arguments", "settings")):
        KINDS[f"{part} {value!r:.30} of an operation ({number})"] = _relu(place, value)
    KINDS[f"argument {value!r:.30} ({number})"] = _relu(2, [value])
    KINDS[f"output {value!r:.30} ({number})"] = lambda file, value=value: file.graph.__setitem__("output", value)
    KINDS[f"nodes {value!r:.30} ({number})"] = lambda file, value=value: file.graph.__setitem__("nodes", value)
    KINDS[f"version {value!r:.30} ({number})"] = lambda file, value=value: file.graph.__setitem__("version", value)
    KINDS[f"node {value!r:.30} ({number})"] = _nodes(value)
    KINDS[f"tensor {value!r:.30} ({number})"] = _nodes(["x", "parameter", value])
    KINDS[f"graph {value!r:.30} ({number})"] = lambda file, value=value: setattr(file, "graph", json.dumps(value))
_LOOP = [["n0", "operator.add", [2**62, 1], {}]]
_LOOP += [[f"n{index + 1}", "operator.mul", [{"node": f"n{index}"}] * 2, {}] for index in range(60)]
KINDS["numbers squared again and again"] = _nodes(*_LOOP)
_LOOP = [["n0", "aten.sym_size.int", [{"node": "x"}, 0], {}], *_LOOP[1:]]
KINDS["sizes squared again and again"] = _nodes(["x", "aten.relu.default", [{"node": "images"}], {}], *_LOOP)
KINDS["a number of 4000 digits"] = _nodes(["x", "operator.add", [10**4000, 1], {}])
KINDS["a word repeated"] = _nodes(["x", "operator.mul", ["abc", 2**36], {}])
KINDS["a list repeated"] = _nodes(["x", "operator.mul", [[0], 2**36], {}])
KINDS["a word formatted"] = _nodes(["x", "operator.mod", ["abc", 5], {}])
KINDS["a part of a word"] = _nodes(["x", "operator.getitem", ["abc", 0], {}])
KINDS["a tensor beyond all memory"] = _nodes(["x", "aten.full.default", [[2**20, 2**30], 1.0], {}])
KINDS["two inputs"] = _nodes(["other", "images"])
KINDS["a tensor twice"] = lambda file: file.nodes.append(["again", *file.node("parameter")[1:]])
KINDS["a node twice"] = lambda file: file.nodes.append(file.node("aten.relu.default"))
KINDS["no output"] = lambda file: file.graph.pop("output")
KINDS["lists within lists"] = lambda file: setattr(file, "graph", "[" * 100_000 + "]" * 100_000)
KINDS["lists within an argument"] = _nodes(["x", "aten.relu.default", json.loads("[" * 50 + "]" * 50), {}])
KINDS["keys given twice"] = lambda file: setattr(
    file, "graph", json.dumps(file.graph)[:-1] + ',"nodes":[["x","os.system"]]}'
)
KINDS["code instead of a graph"] = lambda file: setattr(file, "graph", CODE)
KINDS["a pickle instead of the file"] = lambda file: setattr(file, "raw", pickled())
KINDS["an endless header"] = lambda file: setattr(file, "raw", struct.pack("<Q", 2**63 - 1) + b"{}")
KINDS["no file at all"] = lambda file: setattr(file, "raw", b"")
for dtype in ("F8_E4M3", "F4", "C64", "BOOL", "Q8", "O", "os"):
    KINDS[f"tensors of type {dtype}"] = lambda file, dtype=dtype: [
        each.update(dtype=dtype) for each in file.header.values()
    ]
for shape in ([2**40, 2**40], [-1], [0], [1] * 1000, [1.5], "x"):
    KINDS[f"tensors of shape {shape!s:.20}"] = lambda file, shape=shape: [
        each.update(shape=shape) for each in file.header.values()
    ]
for offsets in ([0, 2**40], [-8, 0], [8, 0], [0, 0], "x"):
    KINDS[f"tensors at {offsets}"] = lambda file, offsets=offsets: [
        each.update(data_offsets=offsets) for each in file.header.values()
    ]
