"""A .pt2 file of ``torch.export.save`` -> its program, without executing anything that is in the file.

``torch.export.load`` unpickles whatever an archive asks it to, evaluates the expressions in it and looks up any name
as an operation. So an archive is read only after all of that was found harmless.
"""

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from qimera.errors import ConfigError, first_line

_OPERATION = re.compile(r"torch\.ops\.(aten|quantized_decomposed)\.\w+\.\w+|_operator\.\w+|math\.\w+|torch\.sym_\w+")
_SYMBOL = re.compile(r"Symbol\('\w+'((, )\w+=(True|False))*\)")
_EXPRESSION = re.compile(
    r"([\d\s()+*/,<>=&|~-]|\b(s|u|zuf|zf)\d+\b|\b(Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|ModularIndexing)\b"
    r"|\b(Eq|Ne|Le|Lt|Ge|Gt|And|Or|Not|Add|Mul|Pow|Integer|Rational|true|false|True|False|oo|int_oo)\b)*"
)
_MAX_BYTES = 8 << 30


def read_program(path: Path) -> ExportedProgram:
    """Return the program in a .pt2 file.

    Raises:
        ConfigError: no such file, not an archive of ``torch.export.save``, or one that asks for more than tensors.
    """
    if not path.is_file():
        raise ConfigError(f"model: no such file: {path}")
    content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            found = next(_refusals(archive), None)
    # A damaged archive can fail in any way.
    except Exception as error:
        raise ConfigError(f"{path}: not a file of torch.export.save, or damaged: {first_line(error)}") from error
    if found is not None:
        raise ConfigError(f"{path}: {found}, and was not executed; export the plain classifier again")
    try:
        return torch.export.load(io.BytesIO(content))
    except Exception as error:
        raise ConfigError(f"{path}: not a file of torch.export.save, or damaged: {first_line(error)}") from error


def network_of(program: ExportedProgram, path: Path) -> GraphModule:
    """Return the network of a user's program.

    Raises:
        ConfigError: it takes more than images, or batches of one size alone.
    """
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    images = [node for node in inputs if node.name in program.graph_signature.user_inputs]
    if len(images) != 1:
        raise ConfigError(f"{path}: takes {len(images)} inputs; export a classifier that takes images alone")
    if isinstance(images[0].meta["val"].shape[0], int):
        raise ConfigError(
            f"{path}: takes batches of exactly {images[0].meta['val'].shape[0]}; "
            "export it with dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)"
        )
    module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    for method in ("train", "eval"):  # refuse to be called, though they would change nothing
        vars(module).pop(method, None)
    return module


def image_shape(network: GraphModule) -> tuple[int, ...]:
    """Return the shape of one image that the network of a program takes."""
    (images,) = network.graph.find_nodes(op="placeholder")
    return tuple(int(size) for size in images.meta["val"].shape[1:])


def _refusals(archive: zipfile.ZipFile) -> Iterator[str]:
    """Yield what of an archive could make ``torch.export.load``, or a call of the program, do more than compute."""
    if sum(entry.file_size for entry in archive.infolist()) > _MAX_BYTES:
        yield f"declares more than {_MAX_BYTES >> 30} GiB"
    for name in archive.namelist():
        if name.endswith("_config.json"):
            for key, entry in json.loads(archive.read(name)).get("config", {}).items():
                if entry.get("use_pickle"):
                    yield f"holds a pickle ({key})"
        elif "/sample_inputs/" in name and archive.getinfo(name).file_size:
            try:
                torch.load(io.BytesIO(archive.read(name)), weights_only=True)
            except Exception as error:
                yield f"holds more than tensors in its sample inputs ({first_line(error)})"
        elif name.endswith((".so", ".cpp", ".py", ".pkl")):
            yield f"holds code ({name})"
        elif "/models/" in name and name.endswith(".json"):
            yield from _refusals_of_graph(json.loads(archive.read(name)))


def _refusals_of_graph(value: object, key: str = "") -> Iterator[str]:
    """Yield names of operations and expressions that are none."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _refusals_of_graph(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _refusals_of_graph(inner, key)
    elif isinstance(value, str):
        if key == "target" and not _OPERATION.fullmatch(value):
            yield f"calls {value!r}, which is no operation on tensors"
        elif key == "expr_str" and not _EXPRESSION.fullmatch(_SYMBOL.sub("s0", value)):
            yield f"sizes a tensor by {value!r}, which is no arithmetic"
