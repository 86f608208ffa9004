"""A student -> an ONNX model whose layers run in integer kernels."""

import copy
import json
import logging
import warnings
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript import opset21 as op
from torch import Tensor
from torch.export import Dim
from torch.fx import GraphModule, Node

from qimera import __version__
from qimera.errors import UnsupportedModelError, first_line
from qimera.export.comparison import check_labels, check_scheme
from qimera.export.integer_graph import deploy_
from qimera.export.packing import shared_constant
from qimera.graph.nodes import aten
from qimera.quantization.scheme import RELUS
from qimera.student.student import Student

OPSET = 21

_IN_KERNEL = {
    *RELUS,
    torch.ops.quantized_decomposed.quantize_per_tensor.default,
    torch.ops.quantized_decomposed.dequantize_per_tensor.default,
}
"""What an integer kernel of a layer does after its sums."""

_SILENT = "torch.onnx._internal.exporter._registration"


def onnx_model(student: Student, *, include_preprocessing: bool = False, labels: Sequence[str] = ()) -> ir.Model:
    """Return the student as an ONNX model."""
    check_labels(student, labels)
    check_scheme(student)
    model = _translate(student.converted(), student)
    deploy_(model.graph)
    if include_preprocessing:
        _prepend_preprocessing_(model.graph, student)
    model.producer_name, model.producer_version = "qimera", __version__
    model.metadata_props.clear()
    model.metadata_props.update(_metadata(student, labels))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def float_model(student: Student, *, include_preprocessing: bool = False) -> ir.Model:
    """Return the full-precision model that a student was made from, its batch norms folded, to compare times with."""
    model = _translate(copy.deepcopy(student.reference), student)
    if include_preprocessing:
        _prepend_preprocessing_(model.graph, student)
    return model


def _translate(module: GraphModule, student: Student) -> ir.Model:
    images = torch.zeros(2, *student.input_spec.shape)
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    logging.getLogger(_SILENT).setLevel(logging.ERROR)  # says that torchvision is absent, four times
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(_with_windows_(module), (images,), dynamic_shapes=({0: Dim.DYNAMIC},))
            exported = torch.onnx.export(
                program,
                (images,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["input"],
                output_names=["logits"],
                custom_translation_table={quantize: _quantize_and_clip},
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = first_line(cause)
        raise UnsupportedModelError(f"no ONNX counterpart for part of the model: {reason}") from error
    assert exported is not None
    _rename_own_tensors_(exported.model.graph, module)
    return exported.model


def _rename_own_tensors_(graph: ir.Graph, module: GraphModule) -> None:
    """Give tensors of the network itself, not of a layer, names with a dot, which no tensor that we add has."""
    for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if name in graph.initializers:
            graph.initializers[name].name = f"{name}.value"


def _with_windows_(module: GraphModule) -> GraphModule:
    """Return the graph with every average over positions written as a pooling with a window.

    That has an integer kernel; a mean has none, and adaptive pooling becomes a gather of computed indices. Linear
    layers on tokens read a matrix of all tokens, since only such a kernel adds the bias to its integers.
    """
    for node in list(module.graph.find_nodes(op="call_function", target=aten.linear.default)):
        _read_matrix_(module, node)
    values = {node.name: node.meta.get("val") for node in module.graph.nodes}
    shapes = {name: value.shape for name, value in values.items() if isinstance(value, Tensor)}
    for node in list(module.graph.nodes):
        window = _window(node, shapes)
        if window is not None:
            with module.graph.inserting_before(node):
                pooled = module.graph.call_function(aten.avg_pool2d.default, (node.args[0], window))
                if node.target is aten.mean.dim and not (len(node.args) > 2 and node.args[2]):
                    pooled = module.graph.call_function(aten.flatten.using_ints, (pooled, 1))
            node.replace_all_uses_with(pooled)
            module.graph.erase_node(node)
    module.recompile()
    return module


def _read_matrix_(module: GraphModule, linear: Node) -> None:
    """Let a linear layer read all tokens as rows of one matrix; they are told apart again behind its kernel."""
    value = linear.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim < 3 or any(not isinstance(size, int) for size in value.shape[1:]):
        return
    end = linear
    while len(end.users) == 1 and next(iter(end.users)).target in _IN_KERNEL:
        end = next(iter(end.users))
    with module.graph.inserting_before(linear):
        rows = module.graph.call_function(aten.flatten.using_ints, (linear.args[0], 0, value.ndim - 2))
    linear.args = (rows, *linear.args[1:])
    with module.graph.inserting_after(end):
        tokens = module.graph.call_function(aten.reshape.default, (end, [-1, *value.shape[1:]]))
    end.replace_all_uses_with(tokens, delete_user_cb=lambda user: user is not tokens)


def _window(node: Node, shapes: dict[str, torch.Size]) -> list[int] | None:
    """Return height and width of the window that an average over positions has, if windows do not overlap."""
    if node.target not in (aten.adaptive_avg_pool2d.default, aten.mean.dim):
        return None
    shape = _shape_before(node, shapes)
    if shape is None or len(shape) != 4:
        return None
    size = [int(each) for each in shape[2:]]
    if node.target is aten.mean.dim:
        return size if node.args[1] in ([2, 3], [-2, -1], [-1, -2], [3, 2]) else None
    outputs = node.args[1]
    assert isinstance(outputs, list | tuple)
    wanted = [want if isinstance(want, int) else have for have, want in zip(size, outputs, strict=True)]
    if any(have % want for have, want in zip(size, wanted, strict=True)):
        return None
    return [have // want for have, want in zip(size, wanted, strict=True)]


def _shape_before(node: Node, shapes: dict[str, torch.Size]) -> torch.Size | None:
    """Return the shape of a node's first argument, looking through quantization, which notes none."""
    before = node.args[0]
    while isinstance(before, Node):
        if before.name in shapes:
            return shapes[before.name]
        before = before.args[0] if before.args else None
    return None


def _quantize_and_clip(x, scale, zero_point, quant_min, quant_max, dtype):  # type: ignore[no-untyped-def]
    """Emit QuantizeLinear, which knows the limits of uint8 alone, and an integer Clip where the grid is narrower."""
    levels = op.QuantizeLinear(x, _constant(scale, np.float32), _constant(zero_point, np.uint8))
    if (quant_min, quant_max) == (0, 255):
        return levels
    return op.Clip(levels, _constant(quant_min, np.uint8), _constant(quant_max, np.uint8))


def _constant(value: float | int, dtype: type[np.generic]):  # type: ignore[no-untyped-def]
    return op.Constant(value=onnx.numpy_helper.from_array(np.array(value, dtype)))


def _prepend_preprocessing_(graph: ir.Graph, student: Student) -> None:
    """Let the graph read uint8 (batch, height, width, channel) and normalise it as ``InputSpec.normalize`` does."""
    spec = student.input_spec
    images = graph.inputs[0]
    channels, height, width = spec.shape
    assert images.shape is not None
    pixels = ir.val("pixels", ir.DataType.UINT8, ir.Shape([images.shape[0], height, width, channels]))
    factor = shared_constant(graph, "pixel_factor", ((spec.high - spec.low) / 255).numpy().reshape(1, -1, 1, 1))
    offset = shared_constant(graph, "pixel_offset", spec.low.numpy().reshape(1, -1, 1, 1))
    nodes = [ir.node("Transpose", [pixels], {"perm": [0, 3, 1, 2]})]
    nodes.append(ir.node("Cast", nodes[-1].outputs, {"to": ir.DataType.FLOAT}))
    nodes.append(ir.node("Mul", [nodes[-1].outputs[0], factor]))
    nodes.append(ir.node("Add", [nodes[-1].outputs[0], offset]))
    for number, node in enumerate(nodes):
        node.outputs[0].name = f"preprocessing_{number}"
    images.replace_all_uses_with(nodes[-1].outputs[0])
    graph.inputs[0] = pixels
    graph.insert_before(graph[0], nodes)


def _metadata(student: Student, labels: Sequence[str]) -> dict[str, str]:
    """Return what a device team must know of the file, JSON where it is more than a word."""
    spec = student.input_spec
    metadata = {
        "qimera.version": __version__,
        "qimera.teacher_hash": student.teacher_hash,
        "qimera.quantization": student.settings.model_dump_json(),
        "qimera.input_shape": json.dumps(spec.shape),
        "qimera.input_mean": json.dumps(spec.mean),
        "qimera.input_std": json.dumps(spec.std),
        "qimera.input_pixel_range": json.dumps(spec.pixel_range),
        "qimera.num_classes": str(student.num_classes),
    }
    if labels:
        metadata["qimera.labels"] = json.dumps(list(labels))
    return metadata
