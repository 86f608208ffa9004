"""A teacher and its bits -> the bytes of what an ONNX file of the student holds, and of the teacher's own numbers."""

import math
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from qimera.config.settings import QuantizationSettings
from qimera.graph.folding import can_take_in_norm
from qimera.graph.nodes import aten, batch_norms, has_bias, has_parameter, layer_name, node_at, tensor_of
from qimera.quantization.scheme import is_integer_product
from qimera.teacher.teacher import Teacher

_FLOAT_BYTES = 4
_SCALE_BYTES = 4
_BIAS_BYTES = 8
"""An int32 and the float32 scale of its grid."""


@dataclass(frozen=True)
class StoredLayer:
    """What a file holds of one layer, however often it is called."""

    num_weights: tuple[int, ...] = ()
    """Numbers of each weight. All calls read the same, but those that a batch norm of their own is folded into."""

    num_scales: int = 0
    """Output channels of all these weights."""

    num_biases: int = 0
    """Numbers of all biases: each call has its own, on the grid of its sums."""

    def num_bytes(self, weight_bits: int) -> int:
        """Return the bytes at this width, weights packed without gaps."""
        weights = sum((count * weight_bits + 7) // 8 for count in self.num_weights)
        return weights + self.num_scales * _SCALE_BYTES + self.num_biases * _BIAS_BYTES


def float_bytes(teacher: Teacher) -> int:
    """Return the bytes of all floating-point parameters and buffers in float32."""
    return sum(4 * value.numel() for value in teacher.module.state_dict().values() if value.is_floating_point())


def packed_bytes(teacher: Teacher, settings: QuantizationSettings) -> int:
    """Return the bytes of all that the student's file holds but the description of its operations.

    These are weights packed at their bits, a scale and a bias per output channel, and in float32 what no integer kernel
    reads: other parameters, such as those of layer norms and embeddings of positions, and buffers. What describes the
    operations takes some hundred bytes for each.
    """
    layers = stored_layers(teacher.module).items()
    return unquantized_bytes(teacher.module) + sum(layer.num_bytes(settings.bits_of(name)[0]) for name, layer in layers)


def stored_layers(module: GraphModule) -> dict[str, StoredLayer]:
    """Return what a file holds of each layer that is quantized, by its name."""
    norms = _folded_norms(module)
    calls: dict[str, dict[tuple[object, Node | None], Node]] = {}
    num_biases: dict[str, int] = {}
    for layer in module.graph.nodes:
        if has_parameter(layer):
            name = layer_name(layer)
            calls.setdefault(name, {})[node_at(layer, 1).target, norms.get(layer)] = layer
            num_biases[name] = num_biases.get(name, 0) + _num_biases(module, layer, norms.get(layer))
    found = {}
    for name, layers in calls.items():
        shapes = [(layer, tensor_of(module, node_at(layer, 1)).shape) for layer in layers.values()]
        num_scales = sum(shape[layer.target is aten.conv_transpose2d.input] for layer, shape in shapes)
        num_weights = tuple(math.prod(shape) for _, shape in shapes)
        found[name] = StoredLayer(num_weights, num_scales, num_biases[name])
    return found


def unquantized_bytes(module: GraphModule) -> int:
    """Return the bytes of the parameters and buffers that a file holds as they are, or as levels of activations."""
    folded = set(_folded_norms(module).values())
    unfolded = [norm for norm in batch_norms(module) if norm not in folded]
    factors = sum(2 * len(tensor_of(module, node_at(norm, 3))) for norm in unfolded)
    norms = folded.union(unfolded)
    others = {
        reader.target: tensor_of(module, reader)
        for reader in module.graph.find_nodes(op="get_attr")
        if any(user not in norms and not _is_packed(user, reader) for user in reader.users)
    }
    tables = {
        node_at(node, index).target for node in module.graph.nodes if is_integer_product(node) for index in (0, 1)
    }
    sizes = {name: 1 if name in tables else value.element_size() for name, value in others.items()}
    return factors * _FLOAT_BYTES + sum(value.numel() * sizes[name] for name, value in others.items())


def _folded_norms(module: GraphModule) -> dict[Node, Node]:
    """Return the batch norm that becomes part of each layer, as ``fold_batch_norms`` does it."""
    norms = {node_at(norm, 0): norm for norm in batch_norms(module)}
    return {layer: norm for layer, norm in norms.items() if can_take_in_norm(layer)}


def _num_biases(module: GraphModule, layer: Node, norm: Node | None) -> int:
    if norm is not None:
        return len(tensor_of(module, node_at(norm, 3)))
    return len(tensor_of(module, node_at(layer, 2))) if has_bias(layer) else 0


def _is_packed(layer: Node, reader: Node) -> bool:
    return has_parameter(layer) and reader in layer.args[1:3]
