"""Which tensors of the exported graph are quantized, and how: the annotations that ``prepare_pt2e`` reads."""

import math
import operator
from collections import Counter, defaultdict
from collections.abc import Iterator

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

from qimera.config.settings import QuantizationSettings
from qimera.graph.nodes import (
    BATCH_NORM,
    MATRIX_PRODUCTS,
    WEIGHTED,
    aten,
    has_bias,
    has_parameter,
    layer_name,
    node_at,
    tensor_of,
)
from qimera.quantization.fake_quantize import LearnedStepFakeQuantize, MinMaxFakeQuantize, PerChannelBiasFakeQuantize
from qimera.quantization.ranges import integer_range, weight_range

_ANNOTATION = "quantization_annotation"
_BIAS_LIMIT = 1 << 30

ADDITIONS = {aten.add.Tensor}
_CONCATENATIONS = {aten.cat.default, aten.stack.default}
JOINS = {*ADDITIONS, *_CONCATENATIONS, aten.sub.Tensor, aten.mul.Tensor}
POOLINGS = {
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_max_pool2d.default,
    aten.amax.default,
    aten.mean.dim,
}
RELUS = {aten.relu.default, aten.relu6.default, aten.hardtanh.default}
PADDINGS = {aten.pad.default, aten.constant_pad_nd.default}
_SPLITS = {
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
}
_MOVES = {
    *_SPLITS,
    aten.clone.default,
    aten.contiguous.default,
    aten.dropout.default,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.max_pool2d.default,
    aten.permute.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.repeat.default,
    aten.reshape.default,
    aten.roll.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.t.default,
    aten.transpose.int,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.view.default,
}

_Edge = tuple[Node, Node, int]
"""Who reads, which tensor, and at how many bits."""


class HardwareQuantizer(Quantizer):
    """What integer kernels need: zero-point-0 weights per channel, and every activation edge (deviation D18).

    Inputs of layers and matrix products get the stated bits, and the network's input gets ``input_bits``. Tensors that
    enter additions, concatenations and average pooling get ``edge_bits``, as do outputs that are read unquantized. A
    tensor that is read at several widths is first put on the widest grid and from there on the narrower ones, as an
    integer requantization would. Biases lie on the grid of the sums that they are added to (deviation D27). For
    targets whose kernels add before they round, the convolution's own result is on no grid.
    """

    def __init__(self, settings: QuantizationSettings) -> None:
        super().__init__()
        self.settings = settings

    def annotate(self, model: GraphModule) -> GraphModule:
        """Write the annotations into the nodes' ``meta``."""
        readers: dict[Node, list[_Edge]] = defaultdict(list)
        for node in model.graph.nodes:
            for producer, bits in self._edges(node):
                readers[before_moves(producer)].append((node, producer, bits))
            if has_parameter(node):
                self._annotate_parameters(model, node)
        ends = [end_of_kernel(node) for node in model.graph.nodes if has_parameter(node)]
        in_sums = {self._added_inside(node) for node in model.graph.nodes}
        in_full = [end for end in ends if end not in in_sums and _is_read_in_full(end, readers.get(end, []))]
        for tensor in dict.fromkeys([*readers, *in_full]):
            widths = {bits for _, _, bits in readers[tensor]}
            if tensor in in_full:
                widths.add(self.settings.edge_bits)
            _annotate_tensor(tensor, readers[tensor], widths, for_all=tensor in in_full)
        return model

    def _annotate_parameters(self, model: GraphModule, layer: Node) -> None:
        read = _annotation(layer).input_qspec_map
        read[node_at(layer, 1)] = _weight_spec(model, layer, self.settings.bits_of(layer_name(layer))[0])
        if has_bias(layer):
            read[node_at(layer, 2)] = _bias_spec(model, layer)

    def _edges(self, node: Node) -> Iterator[tuple[Node, int]]:
        """Yield (producer, bits) for each activation that ``node`` reads on a grid."""
        settings = self.settings
        if has_parameter(node):
            entering = node_at(node, 0)
            bits = settings.input_bits if _is_network_input(entering) else settings.bits_of(layer_name(node))[1]
            yield entering, bits
        elif node.target in MATRIX_PRODUCTS:
            yield from ((each, settings.activation_bits) for each in node.all_input_nodes)
        elif node.target in JOINS:
            entering_nodes = _activations(node)
            if len(entering_nodes) > 1 or node.target in _CONCATENATIONS:
                inside = self._added_inside(node)
                yield from ((each, settings.edge_bits) for each in entering_nodes if each is not inside)
        elif node.target in POOLINGS:
            yield from ((each, settings.edge_bits) for each in _activations(node))

    def _added_inside(self, node: Node) -> Node | None:
        """Return the convolution in whose kernel the target computes the addition ``node``; None where there is none.

        The other branch is then added to sums that are not rounded yet.
        """
        if node.target not in ADDITIONS or self.settings.target not in ("openvino", "inductor"):
            return None
        operands = _activations(node)
        return next((each for each in operands if _is_plain_convolution(each) and len(operands) == 2), None)

    def validate(self, model: GraphModule) -> None:
        """Accept every annotated graph."""


class PaperQuantizer(Quantizer):
    """As GDFQ and Qimera quantize: all weights asymmetric min-max per channel, activations after ReLU only.

    What a ReLU returns gets the most bits that any of its readers asks for.
    """

    def __init__(self, settings: QuantizationSettings) -> None:
        super().__init__()
        self.settings = settings

    def annotate(self, model: GraphModule) -> GraphModule:
        """Write the annotations into the nodes' ``meta``."""
        for node in model.graph.nodes:
            if has_parameter(node):
                bits = self.settings.bits_of(layer_name(node))[0]
                _annotation(node).input_qspec_map[node_at(node, 1)] = _minmax_weight_spec(model, node, bits)
            elif node.target in RELUS:
                low, high = integer_range(max(self._widths(node)), signed=False)
                _annotation(node).output_qspec = QuantizationSpec(
                    dtype=torch.uint8,
                    quant_min=low,
                    quant_max=high,
                    qscheme=torch.per_tensor_affine,
                    observer_or_fake_quant_ctr=MinMaxFakeQuantize.with_args(),  # type: ignore[no-untyped-call]
                )
        return model

    def _widths(self, tensor: Node) -> Iterator[int]:
        """Yield the bits at which each reader of ``tensor`` wants it, as it is, moved about or pooled."""
        for user in tensor.users:
            if has_parameter(user):
                yield self.settings.bits_of(layer_name(user))[1]
            elif is_move(user) or user.target in POOLINGS:
                yield from self._widths(user)
            else:
                yield self.settings.activation_bits

    def validate(self, model: GraphModule) -> None:
        """Accept every annotated graph."""


def float_operations(module: GraphModule) -> Counter[str]:
    """Return what an integer runtime computes in floating point, by name; layers whose weight is no parameter too."""
    integer = {*RELUS, *JOINS, *POOLINGS, BATCH_NORM, aten.max_pool2d.default}
    return Counter(
        node.target.name().partition("::")[2].partition(".")[0]
        for node in module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and isinstance(node.meta.get("val"), torch.Tensor)
        and not (has_parameter(node) or is_integer_product(node) or node.target in integer or is_move(node))
    )


def before_moves(tensor: Node) -> Node:
    """Return the tensor whose values ``tensor`` holds, moved about: all values of one lie on any grid of the other."""
    while is_move(tensor):
        tensor = node_at(tensor, 0)
    return tensor


def is_move(node: Node) -> bool:
    """Whether every value that ``node`` returns is one of its first argument, or zero, or never read."""
    if node.target is operator.getitem:  # of other tuples each part is something else
        return node_at(node, 0).target in _SPLITS
    if node.target in PADDINGS:
        mode, value = (node.args[2:] + ("constant", None)[len(node.args) - 2 :])[:2]
        return mode in ("constant", 0, 0.0) and (not value or _is_never_read(node, value))
    return node.target in _MOVES


def _is_never_read(padding: Node, value: object) -> bool:
    """Whether the padding serves maxima alone, which are never minus infinity: "same" pooling of TensorFlow's kind."""
    return value == -math.inf and all(user.target is aten.max_pool2d.default for user in padding.users)


def quantizer_of(module: GraphModule, argument: object) -> nn.Module | None:
    """Return the quantizer on whose grid all values of ``argument`` lie; None if it is no tensor, or on no grid."""
    node = before_moves(argument) if isinstance(argument, Node) else None
    return module.get_submodule(str(node.target)) if node is not None and node.op == "call_module" else None


def end_of_kernel(layer: Node) -> Node:
    """Return the tensor that an integer kernel of ``layer`` can write: what its activation function returns."""
    end = layer
    while len(end.users) == 1 and next(iter(end.users)).target in RELUS:
        end = next(iter(end.users))
    return end


def reading_network_input(module: GraphModule) -> set[str]:
    """Return the names of the layers that read the network's input, whose bits are a setting of their own."""
    return {layer_name(node) for node in module.graph.nodes if has_parameter(node) and reads_network_input(node)}


def reads_network_input(layer: Node) -> bool:
    """Whether this call of a layer reads the network's input, which is on a grid of ``input_bits``."""
    return _is_network_input(node_at(layer, 0))


def is_integer_product(node: Node) -> bool:
    """Whether ``node`` multiplies two matrices on grids: activations, or one of them by a table of constants."""
    return node.target in MATRIX_PRODUCTS


def _is_read_in_full(tensor: Node, edges: list["_Edge"]) -> bool:
    """Whether something but ``edges`` and the caller of the network reads ``tensor``, as it is or moved about."""
    on_grid = {(reader, producer) for reader, producer, _ in edges}
    return any(
        _is_read_in_full(user, edges) if is_move(user) else user.op != "output" and (user, tensor) not in on_grid
        for user in tensor.users
    )


def _annotate_tensor(tensor: Node, edges: list["_Edge"], widths: set[int], *, for_all: bool) -> None:
    """Put ``tensor`` on a grid: on the widest where it is made, if that is ``for_all`` or for several ``edges``."""
    widest = max(widths)
    moved = any(producer is not tensor for _, producer, _ in edges)
    if len(widths) > 1 or moved or for_all:
        _annotation(tensor).output_qspec = _activation_spec(widest)
    for reader, producer, bits in edges:
        if producer is tensor or bits < widest:
            _annotation(reader).input_qspec_map[producer] = _activation_spec(bits)


def _annotation(node: Node) -> QuantizationAnnotation:
    annotation = node.meta.setdefault(_ANNOTATION, QuantizationAnnotation(_annotated=True))
    assert isinstance(annotation, QuantizationAnnotation)
    return annotation


def _activation_spec(bits: int) -> QuantizationSpec:
    low, high = integer_range(bits, signed=False)
    return QuantizationSpec(
        dtype=torch.uint8,
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=LearnedStepFakeQuantize.with_args(),  # type: ignore[no-untyped-call]
    )


def _weight_spec(model: GraphModule, node: Node, bits: int) -> QuantizationSpec:
    low, high = weight_range(bits)
    return QuantizationSpec(
        dtype=torch.int8,
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_channel_symmetric,
        observer_or_fake_quant_ctr=LearnedStepFakeQuantize.with_args(  # type: ignore[no-untyped-call]
            **_channels(model, node)
        ),
    )


def _bias_spec(model: GraphModule, layer: Node) -> QuantizationSpec:
    return QuantizationSpec(
        dtype=torch.int32,
        quant_min=-_BIAS_LIMIT,
        quant_max=_BIAS_LIMIT,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=PerChannelBiasFakeQuantize.with_args(  # type: ignore[no-untyped-call]
            num_channels=len(tensor_of(model, node_at(layer, 2)))
        ),
    )


def _minmax_weight_spec(model: GraphModule, node: Node, bits: int) -> QuantizationSpec:
    low, high = integer_range(bits, signed=True)
    return QuantizationSpec(
        dtype=torch.int8,
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_channel_affine,
        observer_or_fake_quant_ctr=MinMaxFakeQuantize.with_args(  # type: ignore[no-untyped-call]
            per_call=True, **_channels(model, node)
        ),
    )


def _channels(model: GraphModule, node: Node) -> dict[str, object]:
    axis = 1 if node.target is aten.conv_transpose2d.input else 0
    return {"ch_axis": axis, "shape": tuple(tensor_of(model, node_at(node, 1)).shape)}


def _activations(node: Node) -> list[Node]:
    """Return the tensors that ``node`` reads and that depend on the images, each once."""
    return [each for each in node.all_input_nodes if each.op != "get_attr"]


def _is_plain_convolution(node: Node) -> bool:
    return node.target in WEIGHTED and node.target is not aten.linear.default and len(node.users) == 1


def _is_network_input(node: Node) -> bool:
    return before_moves(node).op == "placeholder"
