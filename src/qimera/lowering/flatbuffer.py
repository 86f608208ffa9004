"""Tensors and operations of LiteRT -> the bytes of a file, by the schema's classes that come with ai-edge-litert."""

from collections.abc import Sequence
from dataclasses import dataclass

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from qimera.student.grids import Grid

_ALIGNMENT = 16
"""Bytes that kernels load at once from a constant; the schema asks for it, its Python classes do not heed it."""

_IDENTIFIER = b"TFL3"
_SCHEMA_VERSION = 3

_TYPES = {
    np.dtype(np.float32): schema.TensorType.FLOAT32,
    np.dtype(np.int32): schema.TensorType.INT32,
    np.dtype(np.int8): schema.TensorType.INT8,
    np.dtype(np.uint8): schema.TensorType.UINT8,
}


class _Buffer(schema.BufferT):  # type: ignore[misc]
    """The bytes of a constant, which lie at a multiple of ``_ALIGNMENT`` in the file."""

    def Pack(self, builder: flatbuffers.Builder) -> int:
        content = bytes(self.data)
        builder.StartVector(1, len(content), _ALIGNMENT)
        builder.head = builder.head - len(content)
        builder.Bytes[builder.head : builder.head + len(content)] = content
        vector = builder.EndVector()
        schema.BufferStart(builder)
        schema.BufferAddData(builder, vector)
        return int(schema.BufferEnd(builder))


class _Quantization(schema.QuantizationParametersT):  # type: ignore[misc]
    """Steps and zero points, each list of which is in the file once: most zero points are lists of zeros."""

    def __init__(self, scale: np.ndarray, zero_point: int, axis: int, packed: dict[bytes, int]) -> None:
        super().__init__()
        self.scale, self.quantizedDimension = scale.astype(np.float32), axis
        self.zeroPoint = np.full(len(scale), zero_point, np.int64)
        self._packed = packed

    def Pack(self, builder: flatbuffers.Builder) -> int:
        places = []
        for each in (self.scale, self.zeroPoint):
            key = each.tobytes()
            if key not in self._packed:
                self._packed[key] = builder.CreateNumpyVector(each)
            places.append(self._packed[key])
        schema.QuantizationParametersStart(builder)
        schema.QuantizationParametersAddScale(builder, places[0])
        schema.QuantizationParametersAddZeroPoint(builder, places[1])
        schema.QuantizationParametersAddQuantizedDimension(builder, self.quantizedDimension)
        return int(schema.QuantizationParametersEnd(builder))


@dataclass(frozen=True)
class Steps:
    """The steps of a constant's integers, for each channel on ``axis`` or one for all; its zero point is 0."""

    scale: np.ndarray
    axis: int = 0


class FlatFile:
    """One graph that grows operation by operation; tensors are known by their number."""

    def __init__(self) -> None:
        self.tensors: list[schema.TensorT] = []
        self.operators: list[schema.OperatorT] = []
        self._buffers = [schema.BufferT()]  # number 0 is that of tensors without content
        self._codes: list[schema.OperatorCodeT] = []
        self._by_content: dict[tuple[bytes, object], int] = {}
        self._metadata: list[schema.MetadataT] = []
        self._packed: dict[bytes, int] = {}

    def tensor(self, name: str, shape: Sequence[int], dtype: type[np.generic], grid: Grid | None = None) -> int:
        """Return a new tensor that an operation will write."""
        return self._tensor(name, shape, np.dtype(dtype), 0, grid)

    def constant(
        self, name: str, value: np.ndarray, steps: Grid | Steps | None = None, *, is_int4: bool = False
    ) -> int:
        """Return a tensor with this content, integers of 4 bits two to a byte; the same content is stored once."""
        content = _nibbles(value) if is_int4 else np.ascontiguousarray(value).tobytes()
        if (content, value.dtype) not in self._by_content:
            buffer = _Buffer()
            buffer.data = content
            self._buffers.append(buffer)
            self._by_content[content, value.dtype] = len(self._buffers) - 1
        number = self._tensor(name, value.shape, value.dtype, self._by_content[content, value.dtype], steps)
        if is_int4:
            self.tensors[number].type = schema.TensorType.INT4
        return number

    def _tensor(
        self, name: str, shape: Sequence[int], dtype: np.dtype[np.generic], buffer: int, steps: Grid | Steps | None
    ) -> int:
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type = name, [int(size) for size in shape], _TYPES[dtype]
        tensor.buffer = buffer
        if isinstance(steps, Grid):
            tensor.quantization = _Quantization(np.array([steps.scale]), steps.zero_point, 0, self._packed)
        elif steps is not None:
            tensor.quantization = _Quantization(steps.scale, 0, steps.axis, self._packed)
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def operation(
        self, kind: str, inputs: Sequence[int], outputs: Sequence[int], version: int = 1, **options: object
    ) -> None:
        """Add the builtin operation ``kind`` (``CONV_2D``); ``options`` are the fields of its options in the schema."""
        code = getattr(schema.BuiltinOperator, kind)
        operator = schema.OperatorT()
        operator.opcodeIndex = self._code(code, version)
        operator.inputs, operator.outputs = list(inputs), list(outputs)
        name = _OPTIONS.get(kind)
        if name is not None:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, name)
            operator.builtinOptions = getattr(schema, f"{name}T")()
            for field, value in options.items():
                assert hasattr(operator.builtinOptions, field), (kind, field)
                setattr(operator.builtinOptions, field, value)
        self.operators.append(operator)

    def _code(self, code: int, version: int) -> int:
        for index, there in enumerate(self._codes):
            if (there.builtinCode, there.version) == (code, version):
                return index
        new = schema.OperatorCodeT()
        new.builtinCode, new.version = code, version
        new.deprecatedBuiltinCode = min(code, schema.BuiltinOperator.PLACEHOLDER_FOR_GREATER_OP_CODES)
        self._codes.append(new)
        return len(self._codes) - 1

    def note(self, name: str, content: bytes) -> None:
        """Add an entry to the file's metadata."""
        buffer, entry = _Buffer(), schema.MetadataT()
        buffer.data = content
        self._buffers.append(buffer)
        entry.name, entry.buffer = name, len(self._buffers) - 1
        self._metadata.append(entry)

    def content(self, inputs: dict[str, int], outputs: dict[str, int], description: str) -> bytes:
        """Return the file, whose graph maps ``inputs`` to ``outputs``, tensors by the names that callers use."""
        graph, model, signature = schema.SubGraphT(), schema.ModelT(), schema.SignatureDefT()
        graph.name, graph.tensors, graph.operators = "main", self.tensors, self.operators
        graph.inputs, graph.outputs = list(inputs.values()), list(outputs.values())
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        signature.inputs, signature.outputs = _tensor_map(inputs), _tensor_map(outputs)
        model.version, model.description = _SCHEMA_VERSION, description
        model.subgraphs, model.buffers, model.operatorCodes = [graph], self._buffers, self._codes
        model.signatureDefs, model.metadata = [signature], self._metadata
        self._packed.clear()
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(model.Pack(builder), file_identifier=_IDENTIFIER)
        return bytes(builder.Output())


def _tensor_map(named: dict[str, int]) -> list[object]:
    maps = []
    for name, tensor in named.items():
        entry = schema.TensorMapT()
        entry.name, entry.tensorIndex = name, tensor
        maps.append(entry)
    return maps


def _nibbles(levels: np.ndarray) -> bytes:
    """Return integers from -8 to 7 in bytes, the first in the low half."""
    halves = np.append(levels.reshape(-1), np.zeros(levels.size % 2, levels.dtype)).astype(np.uint8) & 15
    return (halves[0::2] | halves[1::2] << 4).tobytes()


_OPTIONS = {
    "ADD": "AddOptions",
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "BATCH_MATMUL": "BatchMatMulOptions",
    "CAST": "CastOptions",
    "CONCATENATION": "ConcatenationOptions",
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "DEQUANTIZE": "DequantizeOptions",
    "DIV": "DivOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "GATHER": "GatherOptions",
    "GELU": "GeluOptions",
    "LEAKY_RELU": "LeakyReluOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "MEAN": "ReducerOptions",
    "MUL": "MulOptions",
    "PAD": "PadOptions",
    "QUANTIZE": "QuantizeOptions",
    "REDUCE_MAX": "ReducerOptions",
    "RESHAPE": "ReshapeOptions",
    "RESIZE_BILINEAR": "ResizeBilinearOptions",
    "RESIZE_NEAREST_NEIGHBOR": "ResizeNearestNeighborOptions",
    "SLICE": "SliceOptions",
    "SOFTMAX": "SoftmaxOptions",
    "STRIDED_SLICE": "StridedSliceOptions",
    "SUB": "SubOptions",
    "SUM": "ReducerOptions",
    "TRANSPOSE": "TransposeOptions",
    "TRANSPOSE_CONV": "TransposeConvOptions",
}
"""The table of options of each operation, where it has one."""
