"""A .pt2 file of ``torch.export.save`` -> its network, without executing anything that is in the file.

``torch.export.load`` unpickles what an archive asks it to, evaluates expressions and looks names up as operations. So
it is never called. The graph is built anew from entries of known names, JSON of known shape, operations of an explicit
list and raw bytes of tensors; everything else in an archive is left unread.
"""

import json
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qimera.errors import ConfigError, first_line
from qimera.graph.files import CONSTANTS, GraphBuilder, checked_word
from qimera.graph.operations import operations
from qimera.graph.shapes import propagate_shapes_

_MAX_READS = 8
"""How often each byte of an archive may be read, on average: tensors that are tied lie in one place."""

_FORMAT = {"archive_format": b"pt2", "byteorder": b"little", "archive_version": b"0"}
_GRAPH = "models/model.json"
_TENSORS = {
    "data/weights/": ("model_weights_config.json", re.compile(r"weight_\d{1,9}")),
    "data/constants/": ("model_constants_config.json", re.compile(r"tensor_\d{1,9}")),
}
"""Folder -> the entry that lists its tensors, and what their entries are called."""

_DTYPES = [None, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32]
_DTYPES += [torch.float64, None, torch.complex64, None, torch.bool, torch.bfloat16]
_MEMORY_FORMATS = [None, "torch.contiguous_format", "torch.channels_last", None, "torch.preserve_format"]
_STRIDED = 7
_KEYWORD = 2
"""What these files write for dtypes, memory formats, the usual layout, and arguments that are given by name."""

_REGIONS = {"torch.ops.higher_order.wrap_with_set_grad_enabled": 1, "torch.ops.higher_order.wrap_with_autocast": 4}
"""Parts of a graph that are computed without gradients or by other rules, and how many settings come first."""

_CHECKS = {"torch.ops.aten._assert_scalar.default", "torch.ops.aten._assert_tensor_metadata.default"}
_CHECKS |= {"torch.ops.aten.sym_constrain_range.default", "torch.ops.aten.sym_constrain_range_for_size.default"}
"""Operations that return nothing; what they check is checked again when the network is captured."""


def read_program(path: Path) -> GraphModule:
    """Return the network in a .pt2 file; it takes images alone, and returns logits or several tensors.

    Raises:
        ConfigError: no such file, not an archive of ``torch.export.save``, one that asks for more than operations on
            tensors, or a program that takes more than images, images of any size, or batches of one size alone.
    """
    if not path.is_file():
        raise ConfigError(f"model: no such file: {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = _Entries(archive)
            return _network(entries, json.loads(entries.text(_GRAPH)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; nothing of it was executed") from error
    # A damaged archive can fail in any way.
    except Exception as error:
        raise ConfigError(f"{path}: not a file of torch.export.save, or damaged: {first_line(error)}") from error


def image_shape(network: GraphModule) -> tuple[int, ...]:
    """Return the shape of one image that the network of a program takes."""
    (images,) = network.graph.find_nodes(op="placeholder")
    return tuple(int(size) for size in images.meta["val"].shape[1:])


class _Entries:
    """The entries of an archive that are read at all."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise ConfigError("holds two entries of one name")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ConfigError("holds compressed entries, which torch.export.save does not write")
        self._archive = archive
        self._left = _MAX_READS * sum(entry.file_size for entry in archive.infolist())
        self._root = names[0].partition("/")[0] if names else ""
        for name, expected in _FORMAT.items():
            if name not in self:
                raise ConfigError(
                    "is not in the format that torch.export.save writes since PyTorch 2.7; export the classifier again"
                )
            if self.read(name).strip() != expected:
                raise ConfigError(f"has another {name} than {expected.decode()}; export the classifier again")

    def __contains__(self, name: str) -> bool:
        return f"{self._root}/{name}" in self._archive.NameToInfo

    def read(self, name: str) -> bytes:
        content = self._archive.read(f"{self._root}/{name}")
        self._left -= len(content)
        if self._left < 0:
            raise ConfigError(f"reads its entries more than {_MAX_READS} times over")
        return content

    def text(self, name: str) -> str:
        """Return JSON as text: of bytes, ``json`` would import whatever codec their first ones ask for."""
        return self.read(name).decode("utf-8")


def _network(entries: _Entries, program: Mapping[str, Any]) -> GraphModule:
    graph, signature = program["graph_module"]["graph"], program["graph_module"]["signature"]
    builder = GraphBuilder()
    for folder, (listing, names) in _TENSORS.items():
        if folder + listing in entries:
            _add_tensors(builder, entries, folder, json.loads(entries.text(folder + listing))["config"], names)
    shape = _add_inputs(builder, graph, signature["input_specs"])
    _add_nodes(builder, graph["nodes"])
    returned = [
        builder.node(spec["user_output"]["arg"]["as_tensor"]["name"])
        for spec in signature["output_specs"]
        if "user_output" in spec
    ]
    network = builder.finish(returned[0] if len(returned) == 1 else tuple(returned))
    propagate_shapes_(network, shape)
    return network


# --- tensors ----------------------------------------------------------------------------------------------------------


def _add_tensors(
    builder: GraphBuilder, entries: _Entries, folder: str, config: Mapping[str, Any], names: re.Pattern[str]
) -> None:
    for tensor, entry in config.items():
        if entry["use_pickle"] is not False:
            raise ConfigError(f"holds {tensor!r:.100} as a pickle")
        if not names.fullmatch(entry["path_name"]):
            raise ConfigError(f"keeps {tensor!r:.100} under {entry['path_name']!r:.100}, where no tensor lies")
        value = _tensor(entries.read(folder + entry["path_name"]), entry["tensor_meta"])
        builder.set_tensor(tensor, value, is_parameter=entry["is_param"] is True)


def _tensor(content: bytes, meta: Mapping[str, Any]) -> Tensor:
    """Return the tensor that lies in ``content`` as ``meta`` says; what it says is checked against the bytes."""
    dtype = _at(_DTYPES, meta["dtype"])
    if dtype is None or meta["layout"] != _STRIDED:
        raise ConfigError(f"holds a tensor of type {meta['dtype']!r:.20} and layout {meta['layout']!r:.20}")
    sizes, strides = ([_whole(each["as_int"]) for each in meta[key]] for key in ("sizes", "strides"))
    offset = _whole(meta["storage_offset"]["as_int"])
    if len(sizes) != len(strides) or min([*sizes, *strides, offset]) < 0:
        raise ConfigError(f"holds a tensor of sizes {sizes!s:.100} and strides {strides!s:.100}")
    if 0 in sizes:
        return torch.empty(sizes, dtype=dtype)
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if (last + 1) * dtype.itemsize > len(content) or math.prod(sizes) * dtype.itemsize > len(content):
        raise ConfigError(f"holds {len(content)} bytes for a tensor of sizes {sizes!s:.100}")
    flat = torch.frombuffer(bytearray(content), dtype=dtype, count=len(content) // dtype.itemsize)
    return flat.as_strided(sizes, strides, offset).clone(memory_format=torch.contiguous_format)


def _at(values: list[Any], index: object) -> Any:
    return values[index] if type(index) is int and 0 <= index < len(values) else None


def _whole(value: object) -> int:
    if type(value) is not int or abs(value) >= 1 << 63:
        raise ConfigError(f"has the size {value!r:.50}, which is no plain number")
    return value


# --- graph ------------------------------------------------------------------------------------------------------------


def _add_inputs(builder: GraphBuilder, graph: Mapping[str, Any], specs: list[Mapping[str, Any]]) -> tuple[int, ...]:
    """Add what the program reads, and return the shape of one image."""
    images = []
    for spec in specs:
        ((kind, given),) = spec.items()
        if kind == "user_input":
            images.append(given["arg"]["as_tensor"]["name"] if "as_tensor" in given["arg"] else None)
        elif kind in ("parameter", "buffer", "tensor_constant"):
            builder.add_reader(given["arg"]["name"], given[f"{kind}_name"])
        else:
            raise ConfigError(f"takes an input of the kind {kind!r:.50}")
    if len(images) != 1 or images[0] is None:
        raise ConfigError(f"takes {len(images)} inputs; export a classifier that takes only images")
    batch, *shape = graph["tensor_values"][images[0]]["sizes"]
    if "as_int" in batch:
        raise ConfigError(
            f"takes batches of exactly {_whole(batch['as_int'])}; "
            "export it with dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)"
        )
    if any("as_int" not in size for size in shape):
        raise ConfigError("takes images of more than one size; export it so that only its batches are of any size")
    builder.add_images(images[0])
    return tuple(_whole(size["as_int"]) for size in shape)


def _add_nodes(builder: GraphBuilder, nodes: list[Mapping[str, Any]]) -> None:
    for node in nodes:
        target, outputs = node["target"], node["outputs"]
        if target in _REGIONS:
            _add_region(builder, node, _REGIONS[target])
        elif target not in _CHECKS:
            _add_call(builder, _operation(target), node["inputs"], outputs)


def _operation(target: object) -> str:
    """Return what ``operations.py`` calls the operation that the file calls ``target``."""
    name = str(target).removeprefix("torch.ops.").removeprefix("_")
    if name not in operations():
        raise ConfigError(f"calls {target!r:.100}, which is not an operation that networks need")
    return name


def _add_call(
    builder: GraphBuilder, operation: str, inputs: list[Mapping[str, Any]], outputs: list[Mapping[str, Any]]
) -> None:
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    schema = getattr(operations()[operation], "_schema", None)
    order = [each.name for each in schema.arguments if not each.kwarg_only] if schema else []
    for given in inputs:
        name, value = given["name"], _argument(builder, given["arg"])
        in_place = not schema or (len(args) < len(order) and order[len(args)] == name and not kwargs)
        if in_place and given["kind"] != _KEYWORD:
            args.append(value)
        else:
            kwargs[str(name)] = value
    names = _names_of(outputs)
    if isinstance(names, str):
        builder.add_call(names, operation, tuple(args), kwargs)
        return
    whole = builder.unused_name(operation.split(".")[1])
    builder.add_call(whole, operation, tuple(args), kwargs)
    for index, part in enumerate(names):
        if part is not None:
            builder.add_call(part, "operator.getitem", (builder.node(whole), index), {})


def _names_of(outputs: list[Mapping[str, Any]]) -> str | list[str | None]:
    """Return the name of what an operation returns, or the names of its parts."""
    found: list[str | None] = []
    for output in outputs:
        ((kind, value),) = output.items()
        if kind == "as_tensors":
            return [each["name"] for each in value]
        if kind == "as_optional_tensor":
            ((kind, value),) = value.items()
        if kind == "as_none":
            found.append(None)
        else:
            found.append(value["name" if kind == "as_tensor" else "as_name"])
    return found[0] if len(found) == 1 and found[0] is not None else found


def _add_region(builder: GraphBuilder, node: Mapping[str, Any], num_settings: int) -> None:
    """Add the nodes of a part of the graph as if they stood in the graph itself."""
    part, *given = [each["arg"] for each in node["inputs"]][num_settings:]
    graph = part["as_graph"]["graph"]
    read = [each["as_tensor"]["name"] for each in graph["inputs"]]
    outside = builder.enter(read, [_argument(builder, each) for each in given])
    _add_nodes(builder, graph["nodes"])
    returned = [builder.node(each["as_tensor"]["name"]) for each in graph["outputs"]]
    names = _names_of(node["outputs"])
    parts = [names] if isinstance(names, str) else [str(name) for name in names]
    builder.leave(outside, dict(zip(parts, returned, strict=True)))


_PLAIN = {"as_int": int, "as_bool": bool, "as_float": float}


def _argument(builder: GraphBuilder, argument: Mapping[str, Any]) -> Any:
    """Return one argument of an operation."""
    ((kind, value),) = argument.items()
    if kind in ("as_tensor", "as_sym_int", "as_sym_float", "as_sym_bool"):
        return _reference(builder, kind, value)
    if kind in ("as_tensors", "as_sym_ints", "as_sym_floats", "as_sym_bools"):
        return [_reference(builder, kind.removesuffix("s"), each) for each in value]
    if kind == "as_optional_tensor":
        return _argument(builder, value)
    if kind == "as_optional_tensors":
        return [_argument(builder, each) for each in value]
    if kind == "as_none":
        return None
    if kind in _PLAIN:
        return _number(value)
    if kind.removesuffix("s") in _PLAIN:
        return [_number(each) for each in value]
    if kind == "as_string":
        return checked_word(value)
    if kind == "as_scalar_type" and (dtype := _at(_DTYPES, value)) is not None:
        return dtype
    if kind == "as_memory_format" and (name := _at(_MEMORY_FORMATS, value)) is not None:
        return CONSTANTS["memory_format"][name]
    if kind == "as_layout" and value == _STRIDED:
        return torch.strided
    if kind == "as_device" and value["type"] in ("cpu", "cuda"):
        return torch.device("cpu")
    raise ConfigError(f"has an argument of the kind {kind!r:.50}, {value!r:.50}, which no network needs")


def _reference(builder: GraphBuilder, kind: str, value: Mapping[str, Any]) -> Node | int | float | bool:
    if kind == "as_tensor":
        return builder.node(value["name"])
    ((kind, given),) = value.items()
    return builder.node(given) if kind == "as_name" else _number(given)


def _number(value: object) -> int | float | bool:
    if isinstance(value, str) and value in ("Infinity", "-Infinity", "NaN"):
        return float(value)
    if type(value) is int:
        return _whole(value)
    if not isinstance(value, float | bool):
        raise ConfigError(f"has {value!r:.50} where a number belongs")
    return value
