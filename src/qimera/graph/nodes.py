"""Reading and copying an exported ATen graph: its layers, tensors, batch norms and outputs."""

import copy
import warnings
from collections.abc import Sequence
from itertools import count
from typing import TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node

aten = torch.ops.aten

CONVOLUTIONS = {
    aten.conv1d.default: "conv1d",
    aten.conv2d.default: "conv2d",
    aten.conv3d.default: "conv3d",
    aten.conv_transpose2d.input: "conv_transpose2d",
}
WEIGHTED = {**CONVOLUTIONS, aten.linear.default: "linear"}
"""Operations with a weight at argument 1 and a bias at argument 2, and what we call them."""

MATRIX_PRODUCTS = {aten.matmul.default, aten.bmm.default}

BATCH_NORM = aten.batch_norm.default

_M = TypeVar("_M", bound=nn.Module)


def node_at(node: Node, index: int) -> Node:
    """Return the argument of ``node`` at this place, which is a node."""
    argument = node.args[index]
    assert isinstance(argument, Node)
    return argument


def tensor_of(module: GraphModule, reader: Node) -> Tensor:
    """Return the parameter or buffer that a ``get_attr`` node reads."""
    owner, _, name = str(reader.target).rpartition(".")
    value = getattr(module.get_submodule(owner), name)
    assert isinstance(value, Tensor)
    return value


def has_parameter(layer: Node) -> bool:
    """Whether ``layer`` is a convolution or linear layer whose weight is a parameter, not another activation."""
    return layer.target in WEIGHTED and node_at(layer, 1).op == "get_attr"


def has_bias(layer: Node) -> bool:
    """Whether ``layer`` adds a bias that is a parameter."""
    bias = layer.args[2] if len(layer.args) > 2 else None
    return isinstance(bias, Node) and bias.op == "get_attr"


def is_size(node: Node) -> bool:
    """Whether ``node`` is a number, such as the size of the batch, and no tensor."""
    return isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat | torch.SymBool)


def layer_name(node: Node) -> str:
    """Return the dotted name of the module whose weight ``node`` uses, such as ``layer1.0.conv1``."""
    for argument in node.args[1:]:
        if isinstance(argument, Node) and argument.op == "get_attr":
            return name_of_reader(str(argument.target))
    return node.name


def name_of_reader(tensor: str) -> str:
    """Return what the layers that read a tensor of this name are called: as its module, or as itself if it has none.

    What ``new_parameter`` makes of a tensor for one of several layers counts as that tensor.
    """
    return tensor.rpartition(".")[0] or tensor.partition("@")[0]


def names_of_parameters(layer: Node) -> tuple[str, str, str]:
    """Return the module that holds the weight of ``layer``, and what a new weight and bias of it are called there.

    Weights that lie in the network itself keep their name, by which their layers are known.
    """
    owner, _, name = str(node_at(layer, 1).target).rpartition(".")
    return (owner, "weight", "bias") if owner else (owner, name, f"{name}_bias")


def classifier_node(module: GraphModule, name: str) -> Node:
    """Return the node of the layer called ``name``, its last call where there are several."""
    found: list[Node] = [node for node in module.graph.nodes if has_parameter(node) and layer_name(node) == name]
    return found[-1]


def batch_norms(module: GraphModule) -> list[Node]:
    """Return the batch norms that use the statistics of training, in order; those that use the batch's are left out."""
    nodes = module.graph.find_nodes(op="call_function", target=BATCH_NORM)
    return [node for node in nodes if not node.args[5] and _has_statistics(node)]


def _has_statistics(norm: Node) -> bool:
    """Whether mean and variance are stored, and scale and shift as well, where there are any."""
    scale, shift, mean, var = norm.args[1:5]
    stored = [isinstance(each, Node) and each.op == "get_attr" for each in (scale, shift, mean, var)]
    return stored[2] and stored[3] and (stored[0] or scale is None) and (stored[1] or shift is None)


def logits_node(module: GraphModule) -> Node:
    """Return the node whose tensor the graph returns."""
    (output,) = module.graph.find_nodes(op="output")
    value = output.args[0]
    while isinstance(value, tuple | list):
        value = value[0]
    assert isinstance(value, Node)
    return value


def to_channels_last_(module: nn.Module) -> None:
    """Bring convolution weights into the layout in which convolutions of images are fastest on CPUs."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def with_outputs(module: GraphModule, names: Sequence[str]) -> GraphModule:
    """Return a graph that computes (logits, [the tensors of the nodes called ``names``]), sharing all parameters."""
    graph = fx.Graph()
    mapping: dict[Node, Node] = {}
    graph.graph_copy(module.graph, mapping)
    by_name = {node.name: copied for node, copied in mapping.items()}
    graph.output((mapping[logits_node(module)], [by_name[name] for name in names]))
    result = GraphModule(module, graph)
    result.graph.eliminate_dead_code()
    result.recompile()
    return result


def copied(module: _M) -> _M:
    """Return a deep copy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # from torch, whose graphs hold what it deprecates
        return copy.deepcopy(module)


def new_parameter(
    module: GraphModule, layer: Node, owner: str, name: str, value: Tensor, *, is_parameter: bool = True
) -> Node:
    """Store ``value`` in the module called ``owner`` and return a node that reads it.

    A parameter that others than ``layer`` read keeps its value for them; the new one then gets a name of its own. If it
    lies in the network itself, an ``@`` tells that name from those of other parameters, after which layers are called.
    """
    prefix = f"{owner}." if owner else ""
    readers = [node for node in module.graph.nodes if node.op == "get_attr" and node.target == prefix + name]
    if any(user is not layer for reader in readers for user in reader.users):
        holder, mark = module.get_submodule(owner), "_" if owner else "@"
        first = sum(key.startswith(name) for key, _ in holder.named_parameters(recurse=False))
        name = next(free for number in count(first) if not hasattr(holder, free := f"{name}{mark}{number}"))
    value = value.detach().clone()
    if is_parameter:
        setattr(module.get_submodule(owner), name, nn.Parameter(value, requires_grad=value.is_floating_point()))
    else:
        module.get_submodule(owner).register_buffer(name, value)
    return module.graph.get_attr(prefix + name)


def node_called(module: GraphModule, name: str) -> Node:
    """Return the node of this name."""
    found: Node = next(node for node in module.graph.nodes if node.name == name)
    return found


def groups_of(layer: Node) -> int:
    """Return into how many groups a layer divides its channels: 1 for a linear layer."""
    return int(str(layer.args[6])) if layer.target in CONVOLUTIONS and len(layer.args) > 6 else 1


def pair(sizes: object) -> tuple[int, int]:
    """Return a size for each of the two axes of an image, of one number for both or one for each."""
    first, *rest = [sizes] if isinstance(sizes, int) else list(sizes)  # type: ignore[call-overload]
    return int(first), int(rest[0] if rest else first)
