"""A student -> the content of a LiteRT file whose layers run in integer kernels."""

import inspect
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from qimera.errors import UnsupportedModelError
from qimera.export.comparison import check_scheme, multiplying
from qimera.graph.nodes import aten, copied, logits_node, node_at
from qimera.lowering.layers import Parameter
from qimera.lowering.operations import TABLE
from qimera.lowering.values import CHANNELS_LAST, Constant, Tensor, Value
from qimera.lowering.writer import Writer
from qimera.student.grids import Grid, Levels
from qimera.student.student import Student

_DEQUANTIZE_CHANNELS = torch.ops.quantized_decomposed.dequantize_per_channel.default
PIXELS = Grid(1.0, 0, Levels(1.0, 0, 0, 255))
"""The uint8 input of files that normalise: its integers are the pixels."""

_DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default

_OF_SHAPES = {
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
}
"""Operations that read no more of a tensor than its shape, which is that of one image."""


@dataclass(frozen=True)
class LoweredModel:
    """A graph for LiteRT, and what can be said of it before anything has run it."""

    writer: Writer
    input: int
    output: Value
    input_name: str

    def content(self, extra: Sequence[Value] = ()) -> bytes:
        """Return the file's bytes, with more outputs than the logits for comparisons."""
        outputs = {"logits": self.output.tensor, **{f"extra_{n}": each.tensor for n, each in enumerate(extra)}}
        return self.writer.file.content({self.input_name: self.input}, outputs, "qimera")


def lower(
    student: Student,
    *,
    include_preprocessing: bool = False,
    logits_levels: Levels | None = None,
    is_micro: bool = False,
) -> LoweredModel:
    """Return the student's graph for one image at a time.

    Args:
        student: Of scheme ``hardware``.
        include_preprocessing: Read uint8 pixels and normalise them inside.
        logits_levels: Where the logits are written as integers; without them, in floating point.
        is_micro: For the kernels of microcontrollers.

    Raises:
        UnsupportedModelError: the student is of another scheme, or an operation has no counterpart.
    """
    check_scheme(student)
    module = student.converted()
    writer = Writer(packs=is_micro or student.settings.target == "tflm", is_micro=is_micro)
    images, name = _images(writer, student, include_preprocessing)
    output = _walk(writer, module, images, multiplying(student))
    writer.name = "logits"
    logits = writer.floats(output) if logits_levels is None else writer.quantized(output, logits_levels)
    return _finished(writer, images, name, logits)


def lower_full_precision(student: Student, *, include_preprocessing: bool = False) -> LoweredModel:
    """Return the model that a student was made from, its batch norms folded, to compare times with."""
    writer = Writer()
    images, name = _images(writer, student, include_preprocessing)
    output = _walk(writer, copied(student.reference), images, {})
    return _finished(writer, images, name, writer.floats(output))


def _finished(writer: Writer, images: Value, name: str, logits: Value) -> LoweredModel:
    _, logits = writer.read(logits, (0, 1))
    writer.file.tensors[logits.tensor].name = "logits"
    return LoweredModel(writer, images.tensor if name == "input" else 0, logits, name)


def _images(writer: Writer, student: Student, include_preprocessing: bool) -> tuple[Value, str]:
    """Return the normalised images that the network reads, and the name of the file's input."""
    spec = student.input_spec
    shape = (1, *spec.shape)
    writer.name = "input"
    if not include_preprocessing:
        return writer.output(shape, CHANNELS_LAST), "input"
    stored = tuple(shape[axis] for axis in CHANNELS_LAST)
    pixels = writer.file.tensor("pixels", stored, np.uint8, PIXELS)
    assert pixels == 0
    numbers, scaled = (writer.file.tensor("input", stored, np.float32) for _ in range(2))
    images = writer.output(shape, CHANNELS_LAST)
    factor = writer.file.constant("pixel_factor", ((spec.high - spec.low) / 255).numpy().reshape(1, 1, 1, -1))
    offset = writer.file.constant("pixel_offset", spec.low.numpy().reshape(1, 1, 1, -1))
    writer.file.operation("DEQUANTIZE", [pixels], [numbers], 2)
    writer.file.operation("MUL", [numbers, factor], [scaled])
    writer.file.operation("ADD", [scaled, offset], [images.tensor])
    return images, "pixels"


def _walk(writer: Writer, module: GraphModule, images: Value, names: dict[str, str]) -> Tensor:
    """Lower every node, in order, and return the tensor that the graph returns."""
    values, moving = _run_on_zeros(module, (1, *images.shape[1:]))
    lowered: dict[Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            lowered[node] = images
        elif node in moving and node.op == "call_function":
            try:
                lowered[node] = _lowered(writer, node, values[node], lowered, names.get(node.name, node.name))
            except UnsupportedModelError as error:
                raise UnsupportedModelError(f"{error}{_place_of(node, names, str(error))}") from error
        elif node.op != "output":
            lowered[node] = _constant(node, values)
    result = lowered[logits_node(module)]
    assert isinstance(result, Tensor)
    return result


def _run_on_zeros(module: GraphModule, shape: tuple[int, ...]) -> tuple[dict[Node, Any], set[Node]]:
    """Return what every node returns for an image of zeros, and the nodes that depend on more than an image's size."""
    run = Interpreter(module, garbage_collect_values=False)
    with torch.no_grad():
        run.run(torch.zeros(shape))
    moving: set[Node] = set()
    for node in module.graph.nodes:
        holds_values = isinstance(run.env.get(node), torch.Tensor | tuple | list) and node.target not in _OF_SHAPES
        if node.op == "placeholder" or (holds_values and any(each in moving for each in node.all_input_nodes)):
            moving.add(node)
    return run.env, moving


def _place_of(node: Node, names: dict[str, str], message: str) -> str:
    """Say behind which layer a node is that ``message`` is about; nothing where that is a layer itself."""
    before: Node | None = node
    while before is not None and before.name not in names:
        before = next((each for each in before.all_input_nodes if each.op != "get_attr"), None)
    if before is None or before is node or not message.startswith(f"{node.name}:"):
        return ""
    return f" ({node.name} comes behind {names[before.name]})"


def _constant(node: Node, values: dict[Node, Any]) -> object:
    """Return what depends on no image: the integers of a parameter or of a table on a grid, or numbers."""
    value = values[node]
    source = node.args[0] if node.args else None
    if node.target is _DEQUANTIZE_CHANNELS:
        levels, steps = (values[node_at(node, index)].numpy() for index in range(2))
        axis = node.args[3]
        assert isinstance(axis, int)
        return Parameter(levels, steps, axis)
    if node.target is _DEQUANTIZE and isinstance(source, Node):
        return Constant(values[source].numpy(), Levels(*node.args[1:5]))  # type: ignore[arg-type]
    if isinstance(value, torch.Tensor):
        return Constant(value.detach().numpy())
    return value


def _lowered(writer: Writer, node: Node, value: object, lowered: dict[Node, Any], name: str) -> object:
    """Lower one node, which returns ``value`` for an image of zeros."""
    args: Any
    args, kwargs = map_arg((node.args, node.kwargs), lambda each: lowered[each])
    if node.target is operator.getitem:
        parts, place = args
        if place < len(parts):
            return parts[place]
        raise UnsupportedModelError(
            f"{name}: result {place} of {node_at(node, 0).target} has no counterpart in LiteRT; export to ONNX instead"
        )
    lowering = TABLE.get(node.target)
    if lowering is None:
        raise UnsupportedModelError(f"{name}: {node.target} has no counterpart in LiteRT; export to ONNX instead")
    try:
        inspect.signature(lowering).bind(writer, *args, **kwargs)
    except TypeError as error:
        raise UnsupportedModelError(
            f"{name}: {node.target} has no counterpart in LiteRT with these arguments; export to ONNX instead"
        ) from error
    writer.name, writer.layer = node.name, name
    writer.shape = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
    return lowering(writer, *args, **kwargs)
