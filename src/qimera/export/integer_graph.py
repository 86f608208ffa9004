"""An ONNX graph of Q/DQ operations -> the form that integer kernels take, with packed weights."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir

from qimera.export.packing import pack_, shared_constant
from qimera.graph.nodes import name_of_reader

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_MULTIPLYING = {*LAYERS, "Attention", "Einsum", "GRU", "LSTM", "RNN"}
_EXPANDING = {"DequantizeLinear", "Transpose", "Cast", "Reshape", "Slice", "Sub", "Mod", "Div", "Add", "Gather"}
"""What lies between a layer and the integers of its weight."""

_MOVES = {
    *("DepthToSpace", "Expand", "Flatten", "Gather", "MaxPool", "Pad", "Reshape", "Slice", "SpaceToDepth", "Split"),
    *("Squeeze", "Tile", "Transpose", "Unsqueeze"),
}


def deploy_(graph: ir.Graph) -> None:
    """Bring ``graph`` into the form that reaches integer kernels.

    It computes the same numbers bit for bit, except for the last bits of scaled products.
    """
    name_layers_(graph)
    absorb_clips_(graph)
    requantize_moves_(graph)
    absorb_factors_(graph)
    pack_(graph)
    strip_(graph)


def name_layers_(graph: ir.Graph) -> None:
    """Call every layer after its weight: the node ``layer1.0.conv1`` reads ``layer1.0.conv1.weight``.

    A layer that is called again gets a number, as in ``Student.layer_names``. Products without a weight are called
    after their operation and a number: ``MatMul@1``.
    """
    calls: Counter[str] = Counter()
    for node in graph:
        weight = _weight_of(node)
        if weight is not None and weight.name is not None:
            owner = name_of_reader(weight.name)
            node.name = f"{owner}@{calls[owner]}" if calls[owner] else owner
            calls[owner] += 1
        elif node.op_type in _MULTIPLYING:
            calls[node.op_type] += 1
            node.name = f"{node.op_type}@{calls[node.op_type]}"


def absorb_clips_(graph: ir.Graph) -> None:
    """Let the integer grid behind a Relu or Clip do the clipping, since rounding keeps the order of numbers.

    q(clip(x, low, high)) = clip(q(x), q(low), q(high)). In front of a quantizer whose range is not inside that of the
    Clip, ONNX Runtime would leave the layer before in floating point.
    """
    for node in list(graph):
        limits = _limits(node)
        if limits is None:
            continue
        readers = list(node.outputs[0].uses())
        if readers and all(use.node.op_type == "QuantizeLinear" for use in readers):
            for use in readers:
                _tighten_(graph, use.node, *limits)
            node.outputs[0].replace_all_uses_with(_first(node))
            graph.remove(node, safe=True)


def _limits(node: ir.Node) -> tuple[float, float] | None:
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type == "Clip" and _first(node).dtype == ir.DataType.FLOAT:
        low, high = (_scalar(each) for each in (*node.inputs[1:], None, None)[:2])
        return -np.inf if low is None else low, np.inf if high is None else high
    return None


def _tighten_(graph: ir.Graph, quantizer: ir.Node, low: float, high: float) -> None:
    """Add the limits ``low`` and ``high``, in the unit of the activations, to those of a quantizer's levels."""
    scale, zero_point = (_scalar(each) for each in quantizer.inputs[1:3])
    assert scale is not None
    assert zero_point is not None
    inverse = np.float32(1) / np.float32(scale)
    with np.errstate(over="ignore"):
        lowest, highest = (np.clip(np.rint(np.float32(each) * inverse) + zero_point, 0, 255) for each in (low, high))
    uses = list(quantizer.outputs[0].uses())
    clip = uses[0].node if len(uses) == 1 and uses[0].node.op_type == "Clip" else None
    if clip is not None:
        there = [_scalar(each) for each in clip.inputs[1:3]]
        lowest, highest = max(lowest, there[0] or 0), min(highest, 255 if there[1] is None else there[1])
    if (lowest, highest) == (0, 255):
        return
    bounds = [_level(graph, int(each)) for each in (lowest, highest)]
    if clip is None:
        clip = ir.node("Clip", [quantizer.outputs[0], *bounds])
        clip.outputs[0].name = f"{quantizer.outputs[0].name}_clipped"
        clip.outputs[0].dtype = ir.DataType.UINT8
        clip.outputs[0].shape = quantizer.outputs[0].shape
        quantizer.outputs[0].replace_all_uses_with(clip.outputs[0])
        clip.replace_input_with(0, quantizer.outputs[0])
        graph.insert_after(quantizer, clip)
    for position, bound in enumerate(bounds, 1):
        clip.replace_input_with(position, bound)


def _level(graph: ir.Graph, level: int) -> ir.Value:
    return shared_constant(graph, f"level_{level}", np.array(level, np.uint8))


def requantize_moves_(graph: ir.Graph) -> None:
    """Put Q and DQ behind operations that only move values about, so that integers are moved.

    The values lie on the grid already; both change nothing but tell the runtime so.
    """
    for node in list(graph):
        grid = _grid_moved_on(node)
        for moved in node.outputs if grid else ():
            if not all(use.node.op_type == "QuantizeLinear" for use in moved.uses()):
                _requantize_(graph, node, moved, grid)


def _grid_moved_on(node: ir.Node) -> Sequence[ir.Value | None]:
    """Return scale and zero point of what ``node`` moves about, or puts together of parts on one grid; else nothing."""
    parts = node.inputs if node.op_type == "Concat" else node.inputs[: node.op_type in _MOVES]
    sources = [None if part is None else part.producer() for part in parts]
    grids = [
        tuple(source.inputs[1:])
        for source in sources
        if source is not None and source.op_type == "DequantizeLinear" and not _first(source).is_initializer()
    ]
    is_one = len(grids) == len(parts) and len(set(grids)) == 1
    return grids[0] if is_one else ()


def _requantize_(graph: ir.Graph, node: ir.Node, moved: ir.Value, parameters: Sequence[ir.Value | None]) -> None:
    levels = ir.node("QuantizeLinear", [moved, *parameters])
    back = ir.node("DequantizeLinear", [levels.outputs[0], *parameters])
    moved.replace_all_uses_with(back.outputs[0])
    levels.replace_input_with(0, moved)
    for new, suffix, dtype in ((levels, "levels", ir.DataType.UINT8), (back, "values", ir.DataType.FLOAT)):
        new.outputs[0].name = f"{moved.name}_{suffix}"
        new.outputs[0].dtype, new.outputs[0].shape = dtype, moved.shape
    graph.insert_after(node, [levels, back])


def absorb_factors_(graph: ir.Graph) -> None:
    """Let the step of one factor of a product scale the result, as that of queries and keys is scaled.

    The kernel multiplies its sums of integers by both steps anyway; an operation of its own reads and writes every
    score once more, a tenth of CCT-4's time at batch 64.
    """
    for node in list(graph):
        factor = _scalar(node.inputs[1]) if node.op_type == "Mul" else None
        scaled = _dequantizer_behind(node) if factor is not None and factor > 0 else None
        if factor is not None and scaled is not None and not node.outputs[0].is_graph_output():
            step = np.float32(_scalar(scaled.inputs[1])) * np.float32(factor)
            scaled.replace_input_with(1, shared_constant(graph, f"val_step_{step}", np.array(step)))
            node.outputs[0].replace_all_uses_with(_first(node))
            graph.remove(node, safe=True)


def _dequantizer_behind(factor: ir.Node) -> ir.Node | None:
    """Return where the left side of a product of two activations comes from, if ``factor`` alone reads the product."""
    product = _first(factor).producer()
    source = _first(product).producer() if product is not None and product.op_type == "MatMul" else None
    if product is None or source is None or source.op_type != "DequantizeLinear" or _weight_of(product) is not None:
        return None
    read_once = all(len(list(each.outputs[0].uses())) == 1 for each in (product, source))
    return source if read_once and not _is_per_channel(source) else None


def strip_(graph: ir.Graph) -> None:
    """Drop what the exporter noted for itself, names and shapes of tensors inside, and zero points that say 0."""
    graph.metadata_props.clear()
    kept = {id(value) for value in graph.outputs}
    for number, node in enumerate(graph):
        node.metadata_props.clear()
        node.doc_string = None
        if node.op_type not in _MULTIPLYING:
            node.name = ""
        if _is_of_convolution(node) and _is_zero(node.inputs[2]):
            node.resize_inputs(2)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not _is_per_channel(node):
            node.attributes.clear()
        for position, output in enumerate(node.outputs):
            output.metadata_props.clear()
            if id(output) not in kept:
                output.name, output.type, output.shape = f"v{number}" + "_" * position, None, None
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    for number, (name, value) in enumerate(list(graph.initializers.items())):
        if name.startswith(("val_", "_scale", "_zero_point")):
            value.name = f"c{number}"
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()


def _is_of_convolution(node: ir.Node) -> bool:
    """Whether ``node`` dequantizes a weight or bias of a convolution; matrix kernels insist on zero points."""
    return (
        node.op_type == "DequantizeLinear"
        and len(node.inputs) == 3
        and all(use.node.op_type in ("Conv", "ConvTranspose") for use in node.outputs[0].uses())
    )


def _is_per_channel(node: ir.Node) -> bool:
    scale = node.inputs[1]
    return scale is not None and scale.shape is not None and len(scale.shape) > 0


def _is_zero(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and not value.const_value.numpy().any()


def _scalar(value: ir.Value | None) -> float | None:
    """Return the one number that ``value`` always is, if so."""
    constant = None if value is None else value.const_value
    return None if constant is None or constant.size != 1 else float(constant.numpy().item())


def _weight_of(node: ir.Node) -> ir.Value | None:
    """Return the initializer that holds the integers of a layer's weight."""
    if node.op_type not in LAYERS or node.inputs[1] is None:
        return None
    source = node.inputs[1]
    producer = source.producer()
    while producer is not None and producer.op_type in _EXPANDING:
        source = _first(producer)
        producer = source.producer()
    return source if source.is_initializer() else None


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def layers_in(model: onnx.ModelProto) -> list[str]:
    """Return the names of all layers and products in a file, in order: those with integer weights and all others."""
    return [node.name for node in model.graph.node if node.op_type in _MULTIPLYING]
