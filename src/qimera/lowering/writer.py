"""Tensors of a graph -> tensors that lie as a kernel reads them, on the grid that it reads; every lowering uses it."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from qimera.errors import UnsupportedModelError
from qimera.lowering.flatbuffer import FlatFile
from qimera.lowering.values import CHANNELS_LAST, Deferred, Order, Tensor, Value
from qimera.student.grids import MOVING, Grid, Levels, grid_of, moving_step

SAME, VALID = int(schema.Padding.SAME), int(schema.Padding.VALID)


def activation(name: str) -> int:
    """Return the schema's number of a fused activation function."""
    return int(getattr(schema.ActivationFunctionType, name))


class Writer:
    """Adds operations to a file, each with what it needs around it."""

    def __init__(self, *, packs: bool = False, is_micro: bool = False) -> None:
        self.packs = packs
        """Whether weights of 4 bits keep their integers; else they are widened."""
        self.is_micro = is_micro
        """Whether the file is for microcontrollers: such weights are int4 where a kernel reads that."""
        self.file = FlatFile()
        self.float_layers: list[str] = []
        """Names of layers and products in floating point."""
        self.written: dict[str, Value] = {}
        """What the kernel of each layer writes, by its name."""
        self.name = ""
        """Of the node that is being lowered: what its tensors are called."""
        self.layer = ""
        """What the node is called if it is a layer or a product."""
        self.shape: tuple[int, ...] = ()
        """What PyTorch returns for one image there."""
        self._done: dict[object, Value] = {}

    # --- new tensors --------------------------------------------------------------------------------------------------

    def output(self, shape: Sequence[int], order: Order, grid: Grid | None = None) -> Value:
        """Return a new tensor of PyTorch's ``shape``, int8 on ``grid`` or float32, lying in ``order``."""
        stored = tuple(shape[axis] for axis in order)
        number = self.file.tensor(self.name, stored, np.int8 if grid else np.float32, grid)
        return Value(number, stored, tuple(shape), tuple(order), grid)

    def integers(self, values: Sequence[int]) -> int:
        """Return a constant of int32, such as a shape or axes."""
        return self.file.constant(f"{self.name}_parameter", np.array(values, np.int32))

    # --- reading ------------------------------------------------------------------------------------------------------

    def value(self, tensor: Tensor) -> Value:
        """Return a tensor as one that lies in the file; what was deferred becomes floating point."""
        if isinstance(tensor, Value):
            return tensor
        if isinstance(tensor, Deferred):
            result = self._once(("float", tensor.write), lambda: tensor.write(None))
            return self._clipped(result, tensor.low, tensor.high)
        array = tensor.array
        if tensor.levels is not None:
            grid = grid_of(tensor.levels, self.name)
            number = self.file.constant(
                f"{self.name}_constant", (array.astype(int) + grid.offset).astype(np.int8), grid
            )
            return Value(number, array.shape, array.shape, tuple(range(array.ndim)), grid)
        number = self.file.constant(f"{self.name}_constant", array.astype(np.float32))
        return Value(number, array.shape, array.shape, tuple(range(array.ndim)))

    def entering(self, tensor: Tensor, levels: Levels | None) -> Value:
        """Return a tensor as a kernel reads it: integers if the kernel writes ``levels``, else floating point."""
        return self.floats(tensor) if levels is None else self.on_grid(tensor)

    def on_grid(self, tensor: Tensor) -> Value:
        """Return a tensor whose integers a kernel reads."""
        value = self.value(tensor)
        if value.grid is None:
            raise UnsupportedModelError(
                f"{self.name}: reads a tensor that is on no grid, for which there is no kernel; export to ONNX instead"
            )
        return value

    def noted(self, layer: str, result: Value) -> Value:
        """Remember what the kernel of a layer writes, for comparisons."""
        self.written[layer] = result
        return result

    def _once(self, key: object, write) -> Value:  # type: ignore[no-untyped-def]
        if key not in self._done:
            self._done[key] = write()
        return self._done[key]

    def read(self, tensor: Tensor, order: Order | None = None) -> tuple[int, Value]:
        """Return the number of the tensor whose axes lie in ``order``, or as they do, in their own shape."""
        value = self.whole(self.value(tensor))
        wanted = value.order if order is None else tuple(order)
        result = self._once((value, wanted), lambda: self._arranged(value, wanted))
        return result.tensor, result

    def whole(self, value: Value) -> Value:
        """Return a value whose last axis lies as PyTorch has it."""
        if not value.parts:
            return value
        channels, height, width = value.parts
        maps = replace(value, shape=(value.shape[0], channels, height, width), order=(0, 2, 3, 1), parts=())
        plain = self.read(maps, (0, 1, 2, 3))[1]
        return replace(plain, shape=value.shape, order=tuple(range(len(value.shape))))

    def _arranged(self, value: Value, order: Order) -> Value:
        """Return the value in another order of memory, by RESHAPE where only axes of one are moved."""
        moved = [axis for axis in value.order if value.shape[axis] > 1]
        if moved != [axis for axis in order if value.shape[axis] > 1]:
            source = self._reshaped(value, value.stored)
            result = self.output(value.shape, order, value.grid)
            permutation = [value.order.index(axis) for axis in order]
            self.file.operation("TRANSPOSE", [source.tensor, self.integers(permutation)], [result.tensor], 2)
            return result
        return self._reshaped(replace(value, order=order), tuple(value.shape[axis] for axis in order))

    def _reshaped(self, value: Value, stored: tuple[int, ...]) -> Value:
        if value.written == stored:
            return value
        number = self.file.tensor(self.name, stored, np.int8 if value.grid else np.float32, value.grid)
        self.file.operation("RESHAPE", [value.tensor, self.integers(stored)], [number], newShape=list(stored))
        return replace(value, tensor=number, written=stored)

    def sliced(self, value: Value, start: Sequence[int], shape: Sequence[int]) -> Value:
        """Return a part of a tensor: ``shape`` of it, from ``start`` on."""
        number, value = self.read(value)
        if value.shape == tuple(shape):
            return value
        result = self.output(shape, value.order, value.grid)
        begin = self.integers([start[axis] for axis in value.order])
        self.file.operation("SLICE", [number, begin, self.integers(result.stored)], [result.tensor], 2)
        return result

    def padded(
        self,
        value: Value,
        window: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        shape: Sequence[int],
        *,
        lowest: bool = False,
    ) -> tuple[Value, int]:
        """Return what a window slides over, channels last, and the padding that its kernel adds by itself.

        TensorFlow's SAME pads less at the start than PyTorch where a stride leaves positions over. An operation of its
        own then adds the padding: zeros or, with ``lowest``, the least number, which never wins a maximum.
        """
        _, value = self.read(value, CHANNELS_LAST)
        sizes = value.shape[2:]
        reach = [dilation[axis] * (window[axis] - 1) + 1 for axis in range(2)]
        needed = [max(0, (shape[2 + axis] - 1) * stride[axis] + reach[axis] - sizes[axis]) for axis in range(2)]
        before = list(padding)
        if needed == [0, 0] and before == [0, 0]:
            return value, VALID
        is_same = all(-(-sizes[axis] // stride[axis]) == shape[2 + axis] for axis in range(2))
        if is_same and before == [each // 2 for each in needed]:
            return value, SAME
        sides = [(0, 0), (0, 0), *((before[axis], max(0, needed[axis] - before[axis])) for axis in range(2))]
        return self.surrounded(value, sides, lowest=lowest), VALID

    def surrounded(self, value: Value, sides: Sequence[tuple[int, int]], *, lowest: bool = False) -> Value:
        """Return a tensor with zeros, or the least number, around it: so many before and after on each axis."""
        number, value = self.read(value)
        shape = [size + sum(side) for size, side in zip(value.shape, sides, strict=True)]
        result = self.output(shape, value.order, value.grid)
        table = self.file.constant(f"{self.name}_sides", np.array([sides[axis] for axis in value.order], np.int32))
        least = None
        if lowest and value.grid is None:
            least = np.array([np.finfo(np.float32).min], np.float32)
        elif lowest and value.grid is not None and value.grid.levels.low < value.grid.levels.zero_point:
            least = np.array([value.grid.levels.low + value.grid.offset], np.int8)
        if least is None:
            self.file.operation("PAD", [number, table], [result.tensor], 2 if value.grid else 1)
        else:
            filler = self.file.constant(f"{self.name}_least", least, value.grid)
            self.file.operation("PADV2", [number, table, filler], [result.tensor], 2 if value.grid else 1)
        return result

    # --- floating point -----------------------------------------------------------------------------------------------

    def floats(self, tensor: Tensor) -> Value:
        """Return a tensor in floating point."""
        value = self.value(tensor)
        if value.grid is None:
            return value
        return self._once(("dequantized", value), lambda: self._dequantized(value))

    def _dequantized(self, value: Value) -> Value:
        plain = self.plain(value)
        number = self.file.tensor(self.name, plain.written, np.float32)
        self.file.operation("DEQUANTIZE", [plain.tensor], [number], 2)
        return replace(plain, tensor=number, grid=None)

    def _clipped(self, value: Value, low: float, high: float) -> Value:
        """Return a tensor in floating point clipped to two limits."""
        kind = {(0.0, math.inf): "RELU", (0.0, 6.0): "RELU6"}.get((low, high))
        if kind is not None:
            result = replace(value, tensor=self.file.tensor(self.name, value.written, np.float32))
            self.file.operation(kind, [value.tensor], [result.tensor])
            return result
        for kind, limit in (("MAXIMUM", low), ("MINIMUM", high)):
            if math.isfinite(limit):
                bound = self.file.constant(f"{self.name}_limit", np.array([limit], np.float32))
                result = replace(value, tensor=self.file.tensor(self.name, value.written, np.float32))
                self.file.operation(kind, [value.tensor, bound], [result.tensor])
                value = result
        return value

    def clipped(self, tensor: Tensor, low: float, high: float) -> Tensor:
        """Return a tensor behind a clip, which a grid behind it may do by itself."""
        if isinstance(tensor, Deferred):
            return tensor.clipped(low, high)
        return self._clipped(self.floats(tensor), low, high)

    # --- grids --------------------------------------------------------------------------------------------------------

    def quantized(self, tensor: Tensor, levels: Levels) -> Value:
        """Return a tensor on the grid of a quantizer of the student."""
        if isinstance(tensor, Deferred):
            return tensor.write(levels.clipped(tensor.low, tensor.high))
        value = self.value(tensor)
        if value.grid is None:
            grid = grid_of(levels, self.name)
            number = self.file.tensor(self.name, value.written, np.int8, grid.plain)
            self.file.operation("QUANTIZE", [value.tensor], [number], 1)
            return self.finished(replace(value, tensor=number, grid=grid.plain), grid)
        if _is_same(value.grid.levels, levels):
            return value
        return self._once(("requantized", value, levels), lambda: self.requantized(value, grid_of(levels, self.name)))

    def requantized(self, value: Value, grid: Grid) -> Value:
        """Return the integers of ``value`` on another grid, rounded once."""
        assert value.grid is not None
        if value.grid == grid:
            return value
        step = moving_step(value.grid, grid)
        factor = Grid(step, 0, Levels(step, 0, 0, 255))
        constant = self.file.constant(f"{self.name}_factor", np.array([MOVING], np.int8), factor)
        number = self.file.tensor(self.name, value.written, np.int8, grid)
        options = {"fusedActivationFunction": activation(grid.activation)}
        self.file.operation("MUL", [value.tensor, constant], [number], 2, **options)
        return replace(value, tensor=number, grid=grid)

    def finished(self, value: Value, grid: Grid) -> Value:
        """Return what an operation wrote on the plain form of ``grid``, clipped to it."""
        return value if grid == value.grid else self.requantized(value, grid)

    def plain(self, value: Value) -> Value:
        """Return the same integers in the student's unit."""
        if value.grid is None or value.grid.unit == 1:
            return value
        grid = value.grid.plain
        return self._once(("plain", value), lambda: self.requantized(value, grid))


def _is_same(there: Levels, wanted: Levels) -> bool:
    """Whether every tensor on ``there`` is on ``wanted`` already."""
    same = (there.step, there.zero_point) == (wanted.step, wanted.zero_point)
    return same and there.low >= wanted.low and there.high <= wanted.high
