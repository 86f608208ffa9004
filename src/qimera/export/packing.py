"""Integer weights of an ONNX graph -> initializers of their own width, expanded when a session loads.

Every expansion consists of operations on constants, which runtimes fold once. Integer kernels then read int8.
"""

import numpy as np
import onnx_ir as ir
from jaxtyping import Int8, UInt8

_NODE_BYTES = 60
"""What a node of an expansion takes in the file, about."""

_NUM_STREAM_NODES = 9


def pack_(graph: ir.Graph) -> None:
    """Store every int8 weight at its own width where that makes the file smaller."""
    for number, value in enumerate(list(graph.initializers.values())):
        if value.dtype == ir.DataType.INT8 and len(value.shape or ()) > 1 and value.const_value is not None:
            levels = value.const_value.numpy()
            bits = width(levels)
            as_stream = levels.size * bits / 8 + _NUM_STREAM_NODES * _NODE_BYTES
            as_nibbles = levels.size / 2 + _NODE_BYTES if bits <= 4 else float("inf")
            if as_nibbles <= min(as_stream, levels.size):
                _store_nibbles_(graph, value, levels)
            elif as_stream < levels.size:
                _store_stream_(graph, value, levels, bits, f"w{number}")


def width(levels: Int8[np.ndarray, "..."]) -> int:
    """Return the number of bits, from 2 to 8, that hold all of ``levels``."""
    lowest, highest = int(levels.min(initial=0)), int(levels.max(initial=0))
    return next(bits for bits in range(2, 9) if -(1 << bits - 1) <= lowest and highest < 1 << bits - 1)


def to_stream(levels: Int8[np.ndarray, "..."], bits: int) -> UInt8[np.ndarray, "group bits"]:
    """Return ``levels`` as a stream of ``bits`` bits each, eight levels in a row of ``bits`` bytes, low bits first."""
    unsigned = (levels.reshape(-1).astype(np.int16) + (1 << bits - 1)).astype(np.uint8)
    unsigned = np.pad(unsigned, (0, -unsigned.size % 8))
    each_bit = np.unpackbits(unsigned[:, None], axis=1, bitorder="little")[:, :bits]  # (level, bit)
    return np.packbits(each_bit.reshape(-1, 8 * bits), axis=1, bitorder="little")


def _store_nibbles_(graph: ir.Graph, value: ir.Value, levels: np.ndarray) -> None:
    """INT4, two to a byte, and a Cast."""
    packed = _initializer(graph, f"{value.name}.int4", ir.tensor(levels.astype(ir.DataType.INT4.numpy())))
    _replace_(graph, value, [ir.node("Cast", [packed], {"to": ir.DataType.INT8})])


def _store_stream_(graph: ir.Graph, value: ir.Value, levels: np.ndarray, bits: int, prefix: str) -> None:
    """A stream of bits, and the arithmetic that takes it apart: level i of a row starts at bit i * bits."""
    first = np.arange(8) * bits
    constants = {"Div": 1 << first % 8, "Mod": np.array(1 << bits), "Sub": np.array(1 << bits - 1)}
    stream = _initializer(graph, f"{value.name}.int{bits}", ir.tensor(to_stream(levels, bits)))
    low, high = (
        shared_constant(graph, f"int{bits}_byte_{part}", np.minimum(first // 8 + part, bits - 1)) for part in (0, 1)
    )
    nodes = [ir.node("Cast", [stream], {"to": ir.DataType.INT32})]
    octets = nodes[0].outputs[0]
    nodes.append(ir.node("Gather", [octets, high], {"axis": 1}))
    nodes.append(ir.node("Mul", [nodes[-1].outputs[0], shared_constant(graph, "int32_256", np.array(256, np.int32))]))
    nodes.append(ir.node("Gather", [octets, low], {"axis": 1}))
    nodes.append(ir.node("Add", [nodes[-1].outputs[0], nodes[-2].outputs[0]]))
    for operation, constant in constants.items():
        value_of = shared_constant(graph, f"int{bits}_{operation.lower()}", constant.astype(np.int32))
        nodes.append(ir.node(operation, [nodes[-1].outputs[0], value_of]))
    nodes.append(ir.node("Cast", nodes[-1].outputs, {"to": ir.DataType.INT8}))
    if levels.size % 8:
        flat = shared_constant(graph, "shape_flat", np.array([-1], np.int64))
        nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], flat]))
        start, end = (shared_constant(graph, f"index_{each}", np.array([each], np.int64)) for each in (0, levels.size))
        nodes.append(ir.node("Slice", [nodes[-1].outputs[0], start, end]))
    shape = shared_constant(graph, "shape_" + "_".join(map(str, levels.shape)), np.array(levels.shape, np.int64))
    nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], shape]))
    for number, node in enumerate(nodes[:-1]):
        node.outputs[0].name = f"{prefix}_{number}"
    _replace_(graph, value, nodes)


def _replace_(graph: ir.Graph, value: ir.Value, nodes: list[ir.Node]) -> None:
    """Let ``nodes``, whose last one returns the levels, stand for the initializer ``value``."""
    assert value.name is not None
    result = nodes[-1].outputs[0]
    result.type, result.shape = value.type, value.shape
    value.replace_all_uses_with(result)
    del graph.initializers[value.name]
    result.name = value.name
    graph.insert_before(graph[0], nodes)


def shared_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Return the initializer called ``name``, which is made of ``array`` if it is not there."""
    there = graph.initializers.get(name)
    return _initializer(graph, name, ir.tensor(array)) if there is None else there


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    tensor.name = name
    value = ir.val(name, const_value=tensor, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()))
    graph.register_initializer(value)
    return value
