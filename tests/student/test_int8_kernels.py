"""The arithmetic of LiteRT's int8 kernels against the kernels themselves: files of one operation."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from qimera.student.grids import MOVING, Grid, Levels
from qimera.student.int8_kernels import Arithmetic, FixedPoint, Xnnpack

pytest.importorskip("ai_edge_litert", reason="pip install 'qimera[litert]'")

from ai_edge_litert.interpreter import Interpreter, OpResolverType

from qimera.lowering.flatbuffer import FlatFile, Steps

ALL = np.arange(-128, 128)


@dataclass(frozen=True)
class Kernels:
    """Those of one runtime, and the arithmetic that should be theirs."""

    name: str
    arithmetic: Arithmetic

    def run(self, content: bytes, *inputs: np.ndarray) -> np.ndarray:
        if self.name == "tflite-micro":
            runtime = pytest.importorskip("tflite_micro", reason="pip install 'qimera[tflm]'").runtime
            micro = runtime.Interpreter.from_bytes(content, arena_size=20_000_000)
            for number, value in enumerate(inputs):
                micro.set_input(value, number)
            micro.invoke()
            return np.asarray(micro.get_output(0)).astype(int)
        kinds = {"XNNPACK": OpResolverType.AUTO, "built-in": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES}
        interpreter = Interpreter(model_content=content, experimental_op_resolver_type=kinds[self.name])
        interpreter.allocate_tensors()
        for details, value in zip(interpreter.get_input_details(), inputs, strict=True):
            interpreter.set_tensor(details["index"], value)
        interpreter.invoke()
        return np.asarray(interpreter.get_tensor(interpreter.get_output_details()[0]["index"])).astype(int)


XNNPACK = Kernels("XNNPACK", Xnnpack())
BUILT_IN = Kernels("built-in", FixedPoint(is_built_in=True))
MICRO = Kernels("tflite-micro", FixedPoint())

every_kernel = pytest.mark.parametrize("kernels", [XNNPACK, BUILT_IN, MICRO], ids=lambda each: each.name)


def grid(rng: np.random.Generator, scale: float = 1.0) -> Grid:
    """Return a grid with a random step of about a tenth, and a zero point inside."""
    step = float(np.float32(scale * rng.uniform(0.07, 0.14)))
    return Grid(step, int(rng.integers(-60, 60)), Levels(step, 0, 0, 255))


def file_of(kind: str, inputs: Sequence[tuple[tuple[int, ...], Grid | None]], result: Grid, **options: object) -> bytes:
    """Return a file with one operation of tensors, whose result has the shape of the first."""
    file = FlatFile()
    entering = {
        f"input_{number}": file.tensor(f"input_{number}", shape, np.float32 if of is None else np.int8, of)
        for number, (shape, of) in enumerate(inputs)
    }
    leaving = file.tensor("result", inputs[0][0], np.int8, result)
    file.operation(kind, list(entering.values()), [leaving], 1 if kind == "QUANTIZE" else 2, **options)
    return file.content(entering, {"result": leaving}, "")


def clipped(levels: Tensor, result: Grid) -> np.ndarray:
    return np.clip(levels.double().numpy().astype(int) + result.zero_point, -128, 127)


@every_kernel
@pytest.mark.parametrize("kind", ["ADD", "SUB", "MUL"])
@pytest.mark.parametrize("seed", range(4))
def test_joins_of_all_pairs_of_levels_are_those_of_the_kernels(kernels: Kernels, kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = grid(rng), grid(rng)
    result = grid(rng, [2.0, 0.3, 1.0, 20.0][seed])
    a, b = (each.reshape(1, 1, 256, 256).astype(np.int8) for each in np.meshgrid(ALL, ALL, indexing="ij"))
    content = file_of(kind, [(a.shape, first), (b.shape, second)], result)
    levels = [torch.from_numpy(x.astype(np.float32)) - of.zero_point for x, of in ((a, first), (b, second))]
    steps = (first.scale, second.scale, result.scale)
    if kind == "MUL":
        expected = kernels.arithmetic.product(*levels, steps)
    else:
        expected = kernels.arithmetic.sum(levels[0], -levels[1] if kind == "SUB" else levels[1], steps)
    assert np.array_equal(kernels.run(content, a, b), clipped(expected, result))


@every_kernel
def test_integers_on_another_grid_are_those_of_the_kernels(kernels: Kernels) -> None:
    """As the files do it: multiplied by a constant."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        entering, factor, result = grid(rng), grid(rng, 0.1), grid(rng, 0.5)
        x, constant = ALL.reshape(1, 1, 1, 256).astype(np.int8), np.full((1, 1, 1, 256), MOVING, np.int8)
        plain = Grid(factor.scale, 0, factor.levels)
        content = file_of("MUL", [(x.shape, entering), (x.shape, plain)], result)
        levels = torch.from_numpy(x.astype(np.float32)) - entering.zero_point
        steps = (entering.scale, factor.scale, result.scale)
        expected = kernels.arithmetic.product(levels, torch.tensor(float(MOVING)), steps)
        assert np.array_equal(kernels.run(content, x, constant), clipped(expected, result))


def layer_file(
    kind: str, bias: np.ndarray, steps: np.ndarray, entering: Grid, result: Grid
) -> tuple[bytes, np.ndarray]:
    """Return a file whose layer comes to its bias alone, and an input of zeros."""
    file, count = FlatFile(), len(bias)
    shape = {"FULLY_CONNECTED": (1, 8), "CONV_2D": (1, 1, 1, 8)}.get(kind, (1, 1, 1, count))
    weight = {"FULLY_CONNECTED": (count, 8), "CONV_2D": (count, 1, 1, 8), "TRANSPOSE_CONV": (count, 1, 1, 8)}
    shape = (1, 1, 1, 8) if kind == "TRANSPOSE_CONV" else shape
    source = file.tensor("input", shape, np.int8, entering)
    axis = 3 if kind == "DEPTHWISE_CONV_2D" else 0
    filled = np.ones(weight.get(kind, (1, 1, 1, count)), np.int8)
    parameters = [
        file.constant("weight", filled, Steps(steps, axis)),
        file.constant("bias", bias, Steps(np.float32(entering.scale) * steps)),
    ]
    leaving = file.tensor("result", (1, count) if len(shape) == 2 else (1, 1, 1, count), np.int8, result)
    inputs = [source, *parameters]
    if kind == "TRANSPOSE_CONV":
        size = file.constant("size", np.array([1, 1, 1, count], np.int32))
        inputs = [size, parameters[0], source, parameters[1]]
    dilation = {"dilationHFactor": 1, "dilationWFactor": 1}
    options: dict[str, object] = {} if kind == "FULLY_CONNECTED" else {"padding": 1, "strideH": 1, "strideW": 1}
    if kind in ("CONV_2D", "DEPTHWISE_CONV_2D"):
        options |= dilation | ({"depthMultiplier": 1} if kind == "DEPTHWISE_CONV_2D" else {})
    file.operation(kind, inputs, [leaving], 3, **options)
    return file.content({"input": source}, {"result": leaving}, ""), np.full(shape, entering.zero_point, np.int8)


@every_kernel
@pytest.mark.parametrize("kind", ["CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV"])
@pytest.mark.parametrize("size", [-0.7, -3.0, -7.0])
def test_sums_of_layers_are_rounded_as_by_the_kernels(kernels: Kernels, kind: str, size: float) -> None:
    """Some thousands of sums, each with a step of its own, over all levels of the result and beyond."""
    rng = np.random.default_rng(0)
    entering, result, count = grid(rng), grid(rng), 4000
    steps = np.exp(rng.uniform(size - 0.7, size, count)).astype(np.float32)
    factor = np.float64(entering.scale) * steps / np.float64(result.scale)
    bias = (rng.uniform(-140, 140, count) / factor).astype(np.int32)
    content, zeros = layer_file(kind, bias, steps, entering, result)
    expected = kernels.arithmetic.layer(
        torch.from_numpy(bias.astype(np.float64)), entering.scale, torch.from_numpy(steps), result.scale
    )
    actual = kernels.run(content, zeros).reshape(-1)
    assert np.array_equal(actual, clipped(expected, result))
    assert len(np.unique(actual)) > 60


@every_kernel
@pytest.mark.parametrize("side", [17, 20])
def test_means_over_many_positions_are_those_of_the_kernels(kernels: Kernels, side: int) -> None:
    rng = np.random.default_rng(side)
    channels = 409
    for ratio in (0.2, 0.3217):  # with the first, many sums lie in the middle between two levels
        entering = grid(rng)
        result = Grid(entering.scale * ratio, int(rng.integers(-60, 60)), entering.levels)
        spread = rng.integers(-128, 128, (1, side, side, channels)) * rng.uniform(0.05, 0.3, channels)
        x = np.clip(spread + entering.zero_point, -128, 127).astype(np.int8)
        file = FlatFile()
        source = file.tensor("input", x.shape, np.int8, entering)
        leaving = file.tensor("result", (1, 1, 1, channels), np.int8, result)
        axes = file.constant("axes", np.array([1, 2], np.int32))
        file.operation("MEAN", [source, axes], [leaving], 2, keepDims=True)
        sums = torch.from_numpy(x.astype(np.float32).sum((0, 1, 2)) - side**2 * entering.zero_point)
        zero_points = (entering.zero_point, result.zero_point)
        expected = kernels.arithmetic.mean(sums, side**2, entering.scale, zero_points, result.scale)
        actual = kernels.run(file.content({"input": source}, {"result": leaving}, ""), x).reshape(-1)
        assert np.array_equal(actual, clipped(expected, result))


@every_kernel
def test_numbers_are_brought_onto_grids_as_by_the_kernels(kernels: Kernels) -> None:
    """Middles between two levels, and the numbers next to them."""
    result = grid(np.random.default_rng(1))
    middles = ((np.arange(-200, 200) + 0.5) * np.float32(result.scale)).astype(np.float32)
    around = [np.nextafter(middles, np.float32(end)) for end in (-np.inf, np.inf)]
    x = np.concatenate([middles, *around]).reshape(1, 1, 1, -1)
    expected = kernels.arithmetic.quantize(torch.from_numpy(x), result.scale)
    assert np.array_equal(kernels.run(file_of("QUANTIZE", [(x.shape, None)], result), x), clipped(expected, result))
