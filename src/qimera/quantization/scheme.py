"""Which tensors of the exported graph are quantized, and how: the annotations that ``prepare_pt2e`` reads."""

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

from qimera.graph import aten, has_parameter, layer_name, node_at, tensor_of
from qimera.quantization.fake_quantize import LearnedStepFakeQuantize, MinMaxFakeQuantize
from qimera.quantization.ranges import integer_range
from qimera.settings import QuantizationSettings

_ANNOTATION = "quantization_annotation"

MATRIX_PRODUCTS = {aten.matmul.default, aten.bmm.default}
JOINS = {aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.mul_.Tensor, aten.cat.default}
POOLINGS = {
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.max_pool2d.default,
    aten.adaptive_max_pool2d.default,
    aten.mean.dim,
}
RELUS = {aten.relu.default, aten.relu_.default, aten.relu6.default, aten.relu6_.default}
RELUS |= {aten.hardtanh.default, aten.hardtanh_.default}
_VALUE_PRESERVING = {aten.pad.default, aten.constant_pad_nd.default, aten.flatten.using_ints, aten.view.default}


class HardwareQuantizer(Quantizer):
    """What integer kernels need: zero-point-0 weights per channel, and every activation edge (deviation D18).

    Inputs of layers and matrix products get the stated bits; edges into additions, concatenations and pooling, and
    the network's input, ``edge_bits`` and ``input_bits``. A tensor that is read at several widths is first put on the
    widest grid and from there on the narrower ones, as an integer requantization would.
    """

    def __init__(self, settings: QuantizationSettings) -> None:
        super().__init__()
        self.settings = settings

    def annotate(self, model: GraphModule) -> GraphModule:
        """Write the annotations into the nodes' ``meta``."""
        widths: dict[Node, set[int]] = defaultdict(set)
        for node in model.graph.nodes:
            for producer, bits in self._edges(node):
                widths[producer].add(bits)
                annotation = _annotation(node)
                annotation.input_qspec_map[producer] = _activation_spec(bits)
            if has_parameter(node):
                bits = self.settings.bits_of(layer_name(node))[0]
                _annotation(node).input_qspec_map[node_at(node, 1)] = _weight_spec(model, node, bits)
        for producer, found in widths.items():
            if len(found) > 1:
                _annotation(producer).output_qspec = _activation_spec(max(found))
        return model

    def _edges(self, node: Node) -> Iterator[tuple[Node, int]]:
        """Yield (producer, bits) for each activation that ``node`` reads on a grid."""
        settings = self.settings
        if has_parameter(node):
            entering = node_at(node, 0)
            bits = settings.input_bits if _is_network_input(entering) else settings.bits_of(layer_name(node))[1]
            yield entering, bits
        elif node.target in MATRIX_PRODUCTS:
            yield from ((each, settings.activation_bits) for each in _activations(node))
        elif node.target in JOINS:
            entering_nodes = _activations(node)
            if len(entering_nodes) > 1 or node.target is aten.cat.default:
                yield from ((each, settings.edge_bits) for each in entering_nodes)
        elif node.target in POOLINGS:
            yield from ((each, settings.edge_bits) for each in _activations(node))

    def validate(self, model: GraphModule) -> None:
        """Accept every annotated graph."""


class PaperQuantizer(Quantizer):
    """As GDFQ and Qimera quantize: all weights asymmetric min-max per channel, activations after ReLU only."""

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
                low, high = integer_range(self.settings.activation_bits, signed=False)
                _annotation(node).output_qspec = QuantizationSpec(
                    dtype=torch.uint8,
                    quant_min=low,
                    quant_max=high,
                    qscheme=torch.per_tensor_affine,
                    observer_or_fake_quant_ctr=MinMaxFakeQuantize.with_args(),  # type: ignore[no-untyped-call]
                )
        return model

    def validate(self, model: GraphModule) -> None:
        """Accept every annotated graph."""


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
    low, high = integer_range(bits, signed=True)
    return QuantizationSpec(
        dtype=torch.int8,
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_channel_symmetric,
        observer_or_fake_quant_ctr=LearnedStepFakeQuantize.with_args(  # type: ignore[no-untyped-call]
            **_channels(model, node)
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


def _is_network_input(node: Node) -> bool:
    while node.target in _VALUE_PRESERVING and isinstance(node.args[0], Node):
        node = node.args[0]
    return node.op == "placeholder"
