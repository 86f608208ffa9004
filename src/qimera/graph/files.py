"""A network's graph as plain JSON and tensors by name, and back: the form in which it is stored.

Nothing that is read is executed. Operations are those of ``operations.py``, names are checked before they become part
of generated code, and arguments are numbers, short words and tensors of the graph.
"""

import json
import keyword
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node

from qimera.errors import ConfigError, UnsupportedModelError, first_line
from qimera.graph.nodes import tensor_of
from qimera.graph.operations import operation_name, operations
from qimera.machine.files import save_tensors

FORMAT_VERSION = 1
_KEY = "qimera_graph"
"""Under which a safetensors file holds the graph."""

_NODE_NAME = re.compile(r"(?!__|self$)[A-Za-z_][A-Za-z0-9_]{0,199}")
_PART = r"(?!__)[ !#-&(-\-/-\[\]-~]{1,100}"
_TENSOR_NAME = re.compile(rf"{_PART}(\.{_PART}){{0,30}}")
"""Code that reads a tensor has its name between quotation marks, so these and backslashes are not allowed."""

_WORD = re.compile(r"[A-Za-z0-9_ ,>.-]{0,100}")
_MAX_NODES = 100_000
_MAX_DEPTH = 8

_DTYPES = {str(each): each for each in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)}
_DTYPES |= {str(each): each for each in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)}
_LAYOUTS = {str(torch.strided): torch.strided}
_MEMORY_FORMATS = {str(each): each for each in (torch.contiguous_format, torch.preserve_format, torch.channels_last)}
CONSTANTS: dict[str, dict[str, object]] = {
    "dtype": dict(_DTYPES),
    "layout": dict(_LAYOUTS),
    "memory_format": dict(_MEMORY_FORMATS),
    "device": {"cpu": torch.device("cpu")},
}
"""Arguments that are neither numbers, words nor tensors: kind -> name -> value."""


class GraphBuilder:
    """Makes a graph one node after the other and refuses whatever no classifier needs.

    Every method raises ConfigError for what is not allowed; it says what was found, and not where.
    """

    def __init__(self) -> None:
        self._root = nn.Module()
        self._graph = fx.Graph()
        self._nodes: dict[str, Node] = {}
        self._tensors: set[str] = set()
        self._in_parts = 0

    def node(self, name: object) -> Node:
        """Return the node called ``name``, which was added before."""
        if not isinstance(name, str) or name not in self._nodes:
            raise ConfigError(f"reads {name!r:.100}, which nothing before it computes")
        return self._nodes[name]

    def add_images(self, name: object) -> None:
        """Add what the network takes."""
        images = self._graph.placeholder(self._new_name(name))
        images.target = images.name  # another one where the name would hide torch or a builtin in generated code
        self._put(name, images)

    def add_tensor(self, name: str) -> None:
        """Add a parameter or buffer of the network; graphs read it by ``add_reader``."""
        if not is_tensor_name(name):
            raise ConfigError(f"calls a tensor {name!r:.100}, which is no dotted name")
        self._tensors.add(name)

    def set_tensor(self, name: str, value: Tensor, *, is_parameter: bool) -> None:
        """Store the value of a tensor."""
        self.add_tensor(name)
        owner, _, own = name.rpartition(".")
        module = self._root
        for part in owner.split(".") if owner else []:
            if part not in module._modules:
                if hasattr(module, part):
                    raise ConfigError(f"calls a tensor {name!r:.100}, which is taken")
                module.add_module(part, nn.Module())
            inner = module._modules[part]
            assert inner is not None
            module = inner
        if hasattr(module, own):
            raise ConfigError(f"calls a tensor {name!r:.100}, which is taken")
        if is_parameter and (value.is_floating_point() or value.is_complex()):
            module.register_parameter(own, nn.Parameter(value, requires_grad=False))
        else:
            module.register_buffer(own, value)

    def add_reader(self, name: object, tensor: object) -> None:
        """Add a node that reads the parameter or buffer called ``tensor``."""
        if not isinstance(tensor, str) or tensor not in self._tensors:
            raise ConfigError(f"reads the tensor {tensor!r:.100}, which is not in the file")
        self._put(name, self._graph.create_node("get_attr", tensor, name=self._new_name(name)))

    def add_call(self, name: object, operation: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add a call of an operation on the list of ``operations.py``."""
        target = operations().get(operation) if isinstance(operation, str) else None
        if target is None:
            raise ConfigError(f"calls {operation!r:.100}, which is not an operation that networks need")
        _check_arguments(str(operation), target, args, kwargs)
        self._put(name, self._graph.create_node("call_function", target, args, kwargs, self._new_name(name)))

    def unused_name(self, wish: str) -> str:
        """Return a name that no value has yet, like ``wish``."""
        return next(name for index in range(_MAX_NODES + 1) if (name := f"{wish}_parts_{index}") not in self._nodes)

    def enter(self, names: list[str], values: list[Any]) -> dict[str, Node]:
        """Begin a part whose own names are ``names`` for ``values``; return the names outside, for ``leave``."""
        outside = self._nodes
        if len(names) != len(values) or not all(isinstance(value, Node) for value in values):
            raise ConfigError(f"has a part that takes {len(names)} tensors, and is given {len(values)}")
        self._nodes = dict(zip(names, values, strict=True))
        self._in_parts += 1
        return outside

    def leave(self, outside: dict[str, Node], returned: Mapping[str, Node]) -> None:
        """End the part: what it returned is known by the names in ``returned``, and its own names are forgotten."""
        self._nodes = outside
        self._in_parts -= 1
        for name, node in returned.items():
            self._new_name(name)
            self._nodes[name] = node

    def finish(self, returned: Any) -> GraphModule:
        """Return the network, which returns the tensor ``returned``."""
        self._graph.output(returned)
        return GraphModule(self._root, self._graph)

    def _new_name(self, name: object) -> str:
        if not isinstance(name, str) or not _NODE_NAME.fullmatch(name) or keyword.iskeyword(name):
            raise ConfigError(f"calls a value {name!r:.100}, which is no plain name")
        if name in self._nodes:
            raise ConfigError(f"computes {name!r:.100} twice")
        if self._in_parts > _MAX_DEPTH or len(self._graph.nodes) >= _MAX_NODES:
            raise ConfigError(f"has more than {_MAX_NODES} operations, or parts within parts")
        return name

    def _put(self, name: object, node: Node) -> None:
        assert isinstance(name, str)
        self._nodes[name] = node


def is_tensor_name(name: str) -> bool:
    """Whether a stored network can have a parameter or buffer of this name."""
    return _TENSOR_NAME.fullmatch(name) is not None and not any(keyword.iskeyword(part) for part in name.split("."))


def _check_arguments(
    name: str, target: Callable[..., object], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Raise ConfigError for arguments that the operation does not have."""
    if not isinstance(target, torch._ops.OpOverload):
        if kwargs or not 1 <= len(args) <= 2 or not all(isinstance(each, Node | int | float) for each in args):
            raise ConfigError(f"calls {name} with {len(args)} arguments and {sorted(kwargs)}")
        return
    schema = target._schema.arguments
    positional = [each for each in schema if not each.kwarg_only]
    given = {each.name for each in positional[: len(args)]} | set(kwargs)
    missing = [each.name for each in schema if not each.has_default_value() and each.name not in given]
    unknown = set(kwargs) - {each.name for each in schema[len(args) :]}
    if len(args) > len(positional) or missing or unknown:
        raise ConfigError(f"calls {name} with {len(args)} arguments and {sorted(kwargs)!s:.100}")


def checked_word(word: str) -> str:
    """Return ``word``, such as ``same`` or ``tanh``.

    Raises:
        ConfigError: it holds more than letters, digits and little punctuation.
    """
    if not _WORD.fullmatch(word):
        raise ConfigError(f"has the argument {word!r:.100}, which is no plain word")
    return word


# --- the stored form --------------------------------------------------------------------------------------------------


def describe(module: GraphModule, *, named: bool = True) -> str:
    """Return the graph as JSON: each node's name, operation and arguments.

    Args:
        module: A network of operations on the list.
        named: Call nodes by their names; otherwise by their positions, so that names make no difference.

    Raises:
        UnsupportedModelError: an operation is not on the list.
    """
    numbered = {node: node.name if named else str(index) for index, node in enumerate(module.graph.nodes)}
    nodes: list[list[object]] = []
    output: object = None
    for node, name in numbered.items():
        if node.op == "output":
            output = _encoded(node.args[0], numbered)
        elif node.op == "placeholder":
            nodes.append([name, "images"])
        elif node.op == "get_attr":
            is_parameter = isinstance(tensor_of(module, node), nn.Parameter)
            nodes.append([name, "parameter" if is_parameter else "buffer", str(node.target)])
        else:
            operation = operation_name(node.target)
            if operation is None:
                raise UnsupportedModelError(unsupported_operation(node))
            kwargs = {key: _encoded(value, numbered) for key, value in sorted(node.kwargs.items())}
            nodes.append([name, operation, [_encoded(each, numbered) for each in node.args], kwargs])
    return json.dumps({"version": FORMAT_VERSION, "nodes": nodes, "output": output}, separators=(",", ":"))


def unsupported_operation(node: Node) -> str:
    """Return what is said of a node whose operation is not on the list."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    where = f" of {stack[-1][0]}" if stack and stack[-1][0] else ""
    return (
        f"{node.name}{where} calls {node.target}, which qimera does not know; it takes networks of ordinary PyTorch "
        "operations, so replace this one, or leave it outside of the network"
    )


def _encoded(value: object, names: Mapping[Node, str]) -> object:
    if isinstance(value, Node):
        return {"node": names[value]}
    if isinstance(value, list | tuple):
        return [_encoded(each, names) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, torch.device):
        return {"device": "cpu"}  # graphs are stored as they are on the CPU
    for kind, known in CONSTANTS.items():
        if type(value) in {type(each) for each in known.values()}:
            return {kind: str(value)}
    assert value is None or isinstance(value, bool | int | float | str), value
    return value


def _decoded(value: object, builder: GraphBuilder, depth: int = 0) -> Any:
    """Return an argument from its JSON."""
    if depth > _MAX_DEPTH:
        raise ConfigError("nests arguments too deeply")
    if isinstance(value, list):
        return [_decoded(each, builder, depth + 1) for each in value]
    if isinstance(value, str):
        return checked_word(value)
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((kind, name),) = value.items()
        if kind == "node":
            return builder.node(name)
        if kind == "float" and name in ("inf", "-inf", "nan"):
            return float(name)
        if kind in CONSTANTS and isinstance(name, str) and name in CONSTANTS[kind]:
            return CONSTANTS[kind][name]
    raise ConfigError(f"has {value!r:.100} where an argument belongs")


def tensors_of(module: GraphModule) -> dict[str, Tensor]:
    """Return the parameters and buffers that a graph reads, by name."""
    return {str(node.target): tensor_of(module, node).detach() for node in module.graph.find_nodes(op="get_attr")}


def rebuilt(module: GraphModule) -> GraphModule:
    """Return a network as it would come back from a file, which shares the tensors of ``module``."""
    return _built(json.loads(describe(module)), tensors_of(module))


def save_graph(
    module: GraphModule, path: Path, others: Mapping[str, Tensor] | None = None, notes: Mapping[str, str] | None = None
) -> None:
    """Write a network as a safetensors file whose metadata holds its graph, with other tensors and notes beside it."""
    # copied, for tensors of a network may share memory, which the format does not allow
    tensors = {name: value.cpu().clone() for name, value in tensors_of(module).items()}
    save_tensors(tensors | dict(others or {}), path, {_KEY: describe(module), **(notes or {})})


def load_graph(path: Path) -> GraphModule:
    """Return the network that ``save_graph`` wrote.

    Raises:
        ConfigError: no such file, a damaged one, or one that asks for more than operations on tensors.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; runs that hold a teacher.pt2 have to be made again")
    try:
        with safe_open(path, "pt") as file:
            stored = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if stored["version"] != FORMAT_VERSION:
            raise ConfigError(f"has format version {stored['version']!r:.50}, this qimera reads {FORMAT_VERSION}")
        return _built(stored, tensors)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; nothing of it was executed") from error
    # A damaged file can fail in any way.
    except Exception as error:
        raise ConfigError(f"{path}: not a network saved by qimera, or damaged: {first_line(error)}") from error


def _built(stored: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> GraphModule:
    builder = GraphBuilder()
    for name, operation, *rest in stored["nodes"]:
        if operation == "images":
            builder.add_images(name)
        elif operation in ("parameter", "buffer"):
            (tensor,) = rest
            if tensor in tensors and tensor not in builder._tensors:
                builder.set_tensor(tensor, tensors[tensor], is_parameter=operation == "parameter")
            builder.add_reader(name, tensor)
        else:
            args, kwargs = rest
            decoded = {str(key): _decoded(value, builder) for key, value in kwargs.items()}
            builder.add_call(name, operation, tuple(_decoded(each, builder) for each in args), decoded)
    return builder.finish(_decoded(stored["output"], builder))
