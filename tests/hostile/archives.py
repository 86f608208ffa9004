"""Hostile .pt2 files: each kind changes a good archive of ``torch.export.save``; here, its entries."""

import io
import json
import os
import pickle
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

ROOT, GRAPH, SHAPE = "good", "models/model.json", (3, 8, 8)
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
CODE = "__import__('os').mkdir('executed')"
"""Makes a folder in the working directory of whoever evaluates it."""


class Payload:
    """Makes a folder in the working directory of whoever unpickles it."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("executed",)


def pickled(value: object = None) -> bytes:
    """Return a file of ``torch.save`` that executes something."""
    buffer = io.BytesIO()
    torch.save({"x": Payload() if value is None else value}, buffer)
    return buffer.getvalue()


class Tiny(nn.Module):
    """A network of 6 operations and 169 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 5)
        self.register_buffer("gain", torch.ones(1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.relu(self.norm(self.conv(images)) * self.gain).mean((2, 3)))


@dataclass
class Archive:
    """The entries of a zip file, in order, to be changed."""

    entries: list[tuple[str, bytes]]
    """Names without the folder that all lie in; a name that begins with a slash is taken as it stands."""
    finish: list[Callable[[bytes], bytes]] = field(default_factory=list)
    """Applied to the file at last."""
    attributes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Name of an entry -> attributes of its ZipInfo."""

    @classmethod
    def good(cls) -> "Archive":
        """Return the archive of a small network."""
        torch.manual_seed(0)
        buffer = io.BytesIO()
        program = torch.export.export(Tiny().eval(), (torch.zeros(2, *SHAPE),), dynamic_shapes=({0: Dim.DYNAMIC},))
        torch.export.save(program, buffer)
        with zipfile.ZipFile(buffer) as archive:
            return cls([(name.partition("/")[2], archive.read(name)) for name in archive.namelist()])

    def copy(self) -> "Archive":
        """Return the same again."""
        return Archive(list(self.entries))

    def __getitem__(self, name: str) -> bytes:
        return next(content for each, content in self.entries if each == name)

    def __setitem__(self, name: str, content: bytes) -> None:
        places = [index for index, (each, _) in enumerate(self.entries) if each == name]
        if places:
            self.entries[places[0]] = (name, content)
        else:
            self.entries.append((name, content))

    def __delitem__(self, name: str) -> None:
        self.entries = [(each, content) for each, content in self.entries if each != name]

    @contextmanager
    def json(self, name: str = GRAPH) -> Iterator[Any]:
        """Yield the value in an entry, to be changed."""
        value = json.loads(self[name])
        yield value
        self[name] = json.dumps(value).encode()

    def content(self) -> bytes:
        """Return the file."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in self.entries:
                info = zipfile.ZipInfo(f"{ROOT}/{name}" if not name.startswith("/") else name[1:])
                for key, value in self.attributes.get(name, {}).items():
                    setattr(info, key, value)
                archive.writestr(info, content)
        result = buffer.getvalue()
        for change in self.finish:
            result = change(result)
        return result

    def write(self, path: Path) -> Path:
        """Write the file."""
        path.write_bytes(self.content())
        return path


Kind = Callable[[Archive], None]
KINDS: dict[str, Kind] = {}


def kind(change: Kind) -> Kind:
    """Put a kind into the list by its own name."""
    KINDS[change.__name__] = change
    return change


def poison(value: Any) -> Any:
    """Return JSON in which every expression is code."""
    if isinstance(value, dict):
        return {key: CODE if key == "expr_str" else poison(each) for key, each in value.items()}
    return [poison(each) for each in value] if isinstance(value, list) else value


def hostile_graph(archive: Archive) -> bytes:
    """Return the graph of an archive with expressions and an operation that are code."""
    return json.dumps(poison(json.loads(archive[GRAPH]))).replace("aten.relu.default", "os.system").encode()


# --- entries ----------------------------------------------------------------------------------------------------------


def _renamed(name: str) -> Kind:
    def change(archive: Archive) -> None:
        archive[name] = hostile_graph(archive)
        del archive[GRAPH]

    return change


def _added(name: str, content: bytes | None = None) -> Kind:
    def change(archive: Archive) -> None:
        archive.entries.append((name, hostile_graph(archive) if content is None else content))

    return change


def _put_first(name: str) -> Kind:
    def change(archive: Archive) -> None:
        archive.entries.insert(0, (name, hostile_graph(archive)))

    return change


def replaced(name: str, content: bytes) -> Kind:
    """Return the kind that gives an entry another content."""

    def change(archive: Archive) -> None:
        archive[name] = content

    return change


for ending in ("jsox", "JSON", "txt1", "json ", "json.bak", "json/x", "jso\u0144", "json5", "pt", ""):
    KINDS[f"graph with the ending {ending!r}"] = _renamed(f"models/model.{ending}")
for other in ("Models/model.json", "models//model.json", "models/./model.json", "models\\model.json", "model.json"):
    KINDS[f"graph in {other!r}"] = _renamed(other)
for other in ("models/other.json", "models/model.json.jsox", "models/a/model.json", "models/model.json\0.txt"):
    KINDS[f"a second graph in {other!r}"] = _added(other)
    KINDS[f"a first graph in {other!r}"] = _put_first(other)
for name in (GRAPH, WEIGHTS, CONSTANTS, "data/weights/weight_0", "byteorder", "archive_format"):
    KINDS[f"two entries called {name}"] = _added(name)
for name in (
    "../../executed",
    "/../../executed",
    "//tmp/executed",
    "..\\..\\executed",
    "/C:\\executed",
    "a\0b",
    "\u202e",
):
    KINDS[f"an entry called {name!r}"] = _added(name)
    KINDS[f"a first entry called {name!r}"] = _put_first(name)
for name in ("data/weights/model.pt", "data/constants/model.pt", "data/sample_inputs/model.pt", "data.pkl"):
    KINDS[f"a pickle in {name}"] = replaced(name, pickled())
for name in ("x.so", "x.py", "x.pkl", "data/aotinductor/model/x.so", "data/aotinductor/model/x.cpp", "extra/x.py"):
    KINDS[f"code in {name}"] = _added(name, b"import os; os.mkdir('executed')")
for name, content in {
    "byteorder": b"big",
    "archive_format": b"../..",
    "archive_version": b"999",
    ".data/version": b"999",
    ".data/serialization_id": CODE.encode(),
}.items():
    KINDS[f"another {name}"] = replaced(name, content)
for name in ("byteorder", "archive_format", "archive_version", GRAPH, WEIGHTS, "data/weights/weight_0"):
    KINDS[f"no {name}"] = lambda archive, name=name: archive.__delitem__(name)


@kind
def weights_only_as_an_old_pickle(archive: Archive) -> None:
    archive["data/weights/model.pt"] = pickled()
    del archive[WEIGHTS]


@kind
def constants_only_as_an_old_pickle(archive: Archive) -> None:
    archive["data/constants/model.pt"] = pickled()
    del archive[CONSTANTS]


@kind
def a_link_instead_of_the_graph(archive: Archive) -> None:
    archive[GRAPH] = b"/etc/passwd"
    archive.attributes[GRAPH] = {"create_system": 3, "external_attr": (stat.S_IFLNK | 0o777) << 16}


@kind
def a_folder_instead_of_the_graph(archive: Archive) -> None:
    del archive[GRAPH]
    archive[f"{GRAPH}/"] = b""


@kind
def an_encrypted_graph(archive: Archive) -> None:
    archive.finish.append(lambda content: _flagged(content, b"models/model.json", 1))


def _flagged(content: bytes, name: bytes, flag: int) -> bytes:
    """Set a bit of the flags of an entry, in both of its headers."""
    changed = bytearray(content)
    for magic, length, offset in ((b"PK\x03\x04", 30, 6), (b"PK\x01\x02", 46, 8)):
        place = -1
        while (place := content.find(magic, place + 1)) >= 0:
            if content[place + length :].startswith(f"{ROOT}/".encode() + name):
                changed[place + offset] |= flag
    return bytes(changed)


@kind
def another_name_in_the_header_of_an_entry(archive: Archive) -> None:
    archive.finish.append(lambda content: content.replace(b"good/models/model.json", b"good/models/evil_.json", 1))


@kind
def a_wrong_checksum(archive: Archive) -> None:
    archive.finish.append(lambda content: content.replace(b"aten.relu", b"aten.tanh", 1))


@kind
def bytes_before_the_archive(archive: Archive) -> None:
    archive.finish.append(lambda content: pickle.dumps(Payload()) + content)


@kind
def an_archive_behind_another(archive: Archive) -> None:
    first = archive.content()
    archive.finish.append(lambda content: first + content)


@kind
def a_pickle_alone(archive: Archive) -> None:
    archive.finish.append(lambda _: pickle.dumps(Payload()))


@kind
def a_file_of_torch_save(archive: Archive) -> None:
    archive.finish.append(lambda _: pickled())


@kind
def a_tape_archive(archive: Archive) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tape:
        tape.addfile(tarfile.TarInfo("pickle"), io.BytesIO(b""))
    archive.finish.append(lambda _: buffer.getvalue())


@kind
def a_weight_that_is_a_bomb(archive: Archive) -> None:
    archive["data/weights/weight_0"] = bytes(1 << 26)
    archive.attributes["data/weights/weight_0"] = {"compress_type": zipfile.ZIP_DEFLATED}


@kind
def a_graph_that_is_a_bomb(archive: Archive) -> None:
    archive[GRAPH] = b" " * (1 << 26)
    archive.attributes[GRAPH] = {"compress_type": zipfile.ZIP_LZMA}


@kind
def sizes_of_entries_beyond_all_bounds(archive: Archive) -> None:
    def lie(content: bytes) -> bytes:
        place = content.rfind(b"PK\x01\x02")
        return content[: place + 20] + b"\xf0\xff\xff\xff" * 2 + content[place + 28 :]

    archive.finish.append(lie)
