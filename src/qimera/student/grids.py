"""Quantizers of a student -> the int8 grids of tensors in a LiteRT file, placed where clips cost nothing."""

import math
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor
from torch.fx import GraphModule, Node

from qimera.errors import UnsupportedModelError
from qimera.graph.nodes import MATRIX_PRODUCTS, WEIGHTED, aten, layer_name, node_at
from qimera.quantization.fake_quantize import LearnedStepFakeQuantize
from qimera.quantization.scheme import JOINS, POOLINGS, RELUS, before_moves
from qimera.student.exact import levels_of

LOWEST, HIGHEST = -128, 127

MOVING = 64
"""An int8 constant with a step of about 1/64: multiplying by it is how integers reach another grid, rounded once."""

LARGEST_WINDOW = 1 << 8
"""Positions up to which an average is written as a depthwise convolution, which rounds once; means round twice."""

_BIAS_LIMIT = 1 << 30

CLIPS = {*RELUS, aten.clamp.default}
MAXIMA = {aten.amax.default, aten.adaptive_max_pool2d.default}
_CLIPPING = {*WEIGHTED, *MATRIX_PRODUCTS, *JOINS, *(POOLINGS - MAXIMA)}
"""Operations whose kernel does what is clipped behind them."""


@dataclass(frozen=True)
class Levels:
    """What a quantizer of the student says: the levels that it uses, of uint8."""

    step: float
    zero_point: int
    low: int
    high: int

    def clipped(self, low: float, high: float) -> "Levels":
        """Return the levels that are left behind a clip to ``low`` and ``high``, since rounding keeps the order."""
        inverse = np.float32(1) / np.float32(self.step)
        with np.errstate(over="ignore"):
            bounds = [float(np.rint(np.float32(each) * inverse)) + self.zero_point for each in (low, high)]
        lowest, highest = (int(min(max(each, self.low), self.high)) for each in bounds)
        return replace(self, low=lowest, high=highest)

    def rounded(self, numbers: np.ndarray) -> np.ndarray:
        """Return the numbers on the levels that are nearest to these."""
        levels = np.rint(numbers / np.float32(self.step)) + self.zero_point
        return (levels.clip(self.low, self.high) - self.zero_point) * np.float32(self.step)


@dataclass(frozen=True)
class Grid:
    """The grid of an int8 tensor in a file: ``scale * (integer - zero_point)``, in a unit of its own."""

    scale: float
    zero_point: int
    levels: Levels
    activation: str = "NONE"
    """The fused activation function that clips to the levels, for what writes the tensor."""

    @property
    def offset(self) -> int:
        """What is added to a level of uint8."""
        return self.zero_point - self.levels.zero_point

    @property
    def unit(self) -> float:
        """The file's unit of this tensor in that of the student; other than 1 only where an activation needs it."""
        return self.scale / self.levels.step

    @property
    def plain(self) -> "Grid":
        """The same integers in the student's unit, for operations that cannot clip to both ends."""
        return replace(self, scale=self.levels.step, activation="NONE")


def grid_of(levels: Levels, name: str = "this model") -> Grid:
    """Return the grid on which kernels clip to ``levels`` by themselves.

    Integers saturate at the ends of int8, so one end of a narrow grid is put there. The other end is clipped by an
    activation function: that of an unsigned grid by ReLU; that of a signed grid by the clip to -1 and 1, of which the
    farther end from zero is made 1.

    Args:
        levels: What the student clips to.
        name: What writes the tensor, for messages.

    Raises:
        UnsupportedModelError: all levels are above zero, or all are below it.
    """
    below, above = levels.zero_point - levels.low, levels.high - levels.zero_point
    if below + above >= HIGHEST - LOWEST:
        return _placed(levels, LOWEST - levels.low)
    if below == 0:
        return _placed(levels, HIGHEST - levels.high, "RELU")
    if below < 0 or above < 0:
        raise UnsupportedModelError(
            f"{name}: LiteRT's kernels clip to ranges that hold zero, and this is clipped to another one; "
            "quantize with --target onnxruntime and export to ONNX instead"
        )
    offset = LOWEST - levels.low if above >= below else HIGHEST - levels.high
    return replace(_placed(levels, offset, "RELU_N1_TO_1"), scale=1 / max(below, above))


def _placed(levels: Levels, offset: int, activation: str = "NONE") -> Grid:
    return Grid(levels.step, levels.zero_point + offset, levels, activation)


def widening(largest: int, largest_bias: int = 0) -> int:
    """Return the largest power of two by which weights of few bits fit int8 without -128, and biases int32.

    Kernels that multiply by a fixed-point number and round twice are more exact for larger sums.

    Args:
        largest: Largest absolute value of the weight's integers.
        largest_bias: Largest absolute value of the bias's integers.
    """
    room = min(HIGHEST / max(1, largest), _BIAS_LIMIT / max(1, largest_bias))
    return 1 << math.floor(math.log2(room)) if room >= 1 else 1


def fits_nibbles(lowest: int, highest: int) -> bool:
    """Whether a weight with integers between these can be stored as int4, two to a byte."""
    return lowest >= -8 and highest <= 7


def moving_step(before: Grid, after: Grid) -> float:
    """Return the step of a constant ``MOVING``, by which integers are multiplied to get from one grid to another."""
    return before.levels.step / before.scale / MOVING * after.unit


@dataclass(frozen=True)
class Place:
    """A quantizer of activations, and the limits of the clips in front of it that a kernel does."""

    quantizer: LearnedStepFakeQuantize
    low: float = -math.inf
    high: float = math.inf
    name: str = ""
    """What writes the tensor."""

    def grid(self) -> Grid:
        """Return the grid of the file's tensor, by the quantizer's present step."""
        q = self.quantizer
        levels = Levels(float(q.scale.detach()), int(q.zero_point), q.quant_min, q.quant_max)
        return grid_of(levels.clipped(self.low, self.high), self.name)

    def levels(self, x: Tensor) -> Tensor:
        """Return values on the grid as levels, counted from the zero point."""
        return levels_of(x, self.quantizer.scale.detach())

    def values(self, levels: Tensor) -> Tensor:
        """Return levels as values."""
        return levels.float() * self.quantizer.scale.detach()


def place_of(module: GraphModule, argument: object) -> Place | None:
    """Return the grid on which all values of ``argument`` lie; None if it is on none."""
    node = before_moves(argument) if isinstance(argument, Node) else None
    if node is None or node.op != "call_module":
        return None
    quantizer = module.get_submodule(str(node.target))
    if not isinstance(quantizer, LearnedStepFakeQuantize) or quantizer.broadcast:
        return None
    low, high, source = -math.inf, math.inf, before_moves(node_at(node, 0))
    while source.target in CLIPS:
        limits = _limits(source)
        low, high, source = max(low, limits[0]), min(high, limits[1]), before_moves(node_at(source, 0))
    if source.target not in _CLIPPING:
        low, high = -math.inf, math.inf
    return Place(quantizer, low, high, layer_name(source))


def _limits(clip: Node) -> tuple[float, float]:
    """Return the least and the greatest number that a clip returns."""
    if clip.target in (aten.relu.default, aten.relu6.default):
        return 0.0, math.inf if clip.target is aten.relu.default else 6.0
    default = (-1.0, 1.0) if clip.target is aten.hardtanh.default else (-math.inf, math.inf)
    given = (*clip.args[1:], None, None)[:2]
    low, high = (float(x) if isinstance(x, int | float) else other for x, other in zip(given, default, strict=True))
    return low, high


def place_behind(module: GraphModule, node: Node) -> Place | None:
    """Return the grid on which an integer kernel of ``node`` writes; None if it returns floats."""
    end = node
    while len(end.users) == 1 and next(iter(end.users)).target in CLIPS:
        end = next(iter(end.users))
    places = {place_of(module, user) if user.op == "call_module" else None for user in end.users}
    return places.pop() if len(places) == 1 else None
