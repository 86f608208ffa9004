"""Exact sums: what a student computes where no gradients are recorded."""

import math

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from qimera.config.input_spec import InputSpec
from qimera.config.settings import QuantizationSettings
from qimera.export.onnx_model import onnx_model
from qimera.graph.nodes import WEIGHTED
from qimera.quantization.fake_quantize import LearnedStepFakeQuantize
from qimera.student.exact import ExactLayer, ExactProduct, _ExactAddition, with_exact_sums
from qimera.student.student import Student
from qimera.teacher.teacher import Teacher
from tests import shared
from tests.networks import NETWORKS, NUM_CLASSES


def student_of(name: str, bits: int, scheme: str = "hardware") -> tuple[Student, Tensor]:
    return shared.student_of(name, f"w{bits}a{bits}", scheme), shared.noise()


class _OnLevels(torch.fx.Interpreter):
    """Runs an exact graph and checks that every layer was given what it is said to be given: whole numbers."""

    def call_module(self, target: str, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:
        result = super().call_module(target, args, kwargs)
        module = self.fetch_attr(target)
        if isinstance(module, ExactLayer):
            steps = [quantizer.scale for quantizer in module.quantizers[:2]]
            for value, step in zip(args, steps, strict=False):
                levels = value / step
                # 255 levels, each with a relative rounding error of two multiplications
                torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
        return result


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_reads_whole_numbers_of_steps(name: str) -> None:
    student, images = student_of(name, 4)
    exact = with_exact_sums(student.module)
    layers = [each for each in exact.modules() if isinstance(each, ExactLayer)]
    assert len(layers) == sum(node.target in WEIGHTED for node in student.module.graph.nodes)
    with torch.no_grad():
        _OnLevels(exact).run(images)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("bits", [3, 8])
def test_exact_sums_are_those_of_float64(name: str, bits: int) -> None:
    """A layer's sums in float64, rounded once, are what no order of summation can change."""
    student, images = student_of(name, bits)
    for node, layer in _layers_with_inputs(student, images):
        x, weight, *rest = node
        steps = [quantizer.scale.detach().double() for quantizer in layer.quantizers[:2]]
        levels = [(value.double() / step).round() for value, step in zip((x, weight), steps, strict=True)]
        bias = rest[0] if rest else None
        expected = layer.layer(levels[0] * steps[0], levels[1] * steps[1], *_in_double(bias, rest))
        actual = layer(x, weight, *rest)
        result = layer.quantizers[2]
        if result is not None:
            # half a step from rounding, and from a few roundings to float32
            step = result.scale.detach().double()
            torch.testing.assert_close(actual.double() / step, expected / step, rtol=1e-6, atol=0.5 + 1e-4)
            continue
        # two roundings to float32 of the product of a sum and two steps
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


class LargeSums(nn.Module):
    """A layer all of whose inputs and weights are large and of one sign, in front of the logits or of another."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        width = {"linear": 2000, "wide linear": 9000, "convolution": 400, "transposed": 800}[kind]
        self.stem = nn.Conv2d(3, width, 1)
        self.wide = {
            "linear": nn.Linear(width, NUM_CLASSES),
            "wide linear": nn.Linear(width, NUM_CLASSES),
            "convolution": nn.Conv2d(width, 8, 3),
            "transposed": nn.ConvTranspose2d(width, 8, 2, groups=2),
        }[kind]
        self.head = nn.Identity() if "linear" in kind else nn.Linear(8, NUM_CLASSES)
        for parameter, low, high in (
            (self.stem.weight, 0.1, 0.3),
            (self.stem.bias, 0.1, 0.3),
            (self.wide.weight, 0.7, 1),
        ):
            nn.init.uniform_(parameter, low, high)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        if isinstance(self.wide, nn.Linear):
            return self.wide(x.mean((2, 3)))
        return self.head(self.wide(x).relu().mean((2, 3)))


def large_sums(kind: str) -> tuple[Student, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, images = LargeSums(kind), 0.7 + 0.3 * torch.rand(16, 3, 8, 8)
    spec = InputSpec(shape=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    student = Student(Teacher.capture(model, spec), QuantizationSettings(weight_bits=8, activation_bits=8))
    student.initialize_ranges_([images])
    return student, images


@pytest.mark.parametrize("kind", ["linear", "wide linear", "convolution", "transposed"])
def test_sums_that_float32_cannot_hold_are_rounded_once(kind: str) -> None:
    """Added up in float32 they would be rounded many times, and be off by some hundreds."""
    student, images = large_sums(kind)
    (x, weight, bias, *rest), layer = _layers_with_inputs(student, images)[1]
    activation, weight_step, result = (each and each.scale.detach() for each in layer.quantizers)
    step = (activation * weight_step.reshape(-1)).repeat(len(bias) // weight_step.numel())
    levels = ((value / each).round().long() for value, each in ((x, activation), (weight, weight_step), (bias, step)))
    sums = layer.layer(*levels, *rest)
    assert int(sums.abs().max()) > 1 << 24
    shape = (-1, 1, 1) if sums.ndim == 4 else (-1,)
    if result is None:
        expected = sums.float() * step.view(shape)
    else:
        expected = (sums.float() * (step / result).view(shape)).round() * result
    assert torch.equal(layer(x, weight, bias, *rest), expected)


@pytest.mark.parametrize("kind", ["linear", "wide linear", "convolution"])
def test_large_sums_are_those_of_onnx_runtime(kind: str) -> None:
    """Its kernels add up int32, turn each sum into a float32 and multiply that by one number."""
    student, images = large_sums(kind)
    session = onnxruntime.InferenceSession(ir.to_proto(onnx_model(student)).SerializeToString())
    (expected,) = session.run(None, {"input": images.numpy()})
    with torch.no_grad():
        assert np.array_equal(student(images).numpy(), expected)


@pytest.mark.parametrize("seed", range(20))
def test_additions_are_those_of_onnx_runtime(seed: int) -> None:
    """All pairs of levels: now and then a sum lies within a rounding error of the middle between two levels."""
    rng = torch.Generator().manual_seed(seed)
    first, second, result = (_random_grid(rng) for _ in range(3))
    a, b = (levels.flatten() for levels in torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij"))
    with torch.no_grad():
        on_grids = [_values(levels, grid) for levels, grid in ((a, first), (b, second))]
        levels = _ExactAddition(first, second, result)(*on_grids) / result.scale + result.zero_point
    expected = _qlinear("QLinearAdd", a, b, first, second, result)
    assert np.array_equal(levels.round().clamp(0, 255).to(torch.uint8).numpy(), expected)


def _random_grid(rng: torch.Generator) -> LearnedStepFakeQuantize:
    grid = LearnedStepFakeQuantize(dtype=torch.uint8, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine)
    grid.log_scale.data.copy_(torch.rand((), generator=rng) - 3)
    grid.zero_point.copy_(torch.randint(60, 160, (), generator=rng))
    return grid


def _values(levels: Tensor, grid: LearnedStepFakeQuantize) -> Tensor:
    return (levels - grid.zero_point) * grid.scale


@pytest.mark.parametrize("inner", [40, 700])
def test_products_are_those_of_onnx_runtime(inner: int) -> None:
    """Sums of 700 products reach beyond what float32 holds exactly."""
    rng = torch.Generator().manual_seed(inner)
    first, second, result = (_random_grid(rng) for _ in range(3))
    result.log_scale.data += math.log(inner)
    a, b = (torch.randint(256, shape, generator=rng) for shape in ((30, inner), (inner, 20)))
    with torch.no_grad():
        values = ExactProduct(first, second, result)(_values(a, first), _values(b, second))
        levels = (values / result.scale + result.zero_point).round().clamp(0, 255).to(torch.uint8)
        sums = ExactProduct(first, second, None)(_values(a, first), _values(b, second))
    exact = (a - first.zero_point).double() @ (b - second.zero_point).double()
    assert torch.equal(sums, exact.float() * (first.scale * second.scale).detach())
    assert np.array_equal(levels.numpy(), _qlinear("QLinearMatMul", a, b, first, second, result))
    assert len(levels.unique()) > 50


def _qlinear(operation: str, a: Tensor, b: Tensor, *grids: LearnedStepFakeQuantize) -> np.ndarray:
    """Return the levels to which ONNX Runtime's kernel takes ``a`` and ``b``."""
    names = ["a", "a_scale", "a_zero", "b", "b_scale", "b_zero", "c_scale", "c_zero"]
    constants = {
        f"{name}_{kind}": value
        for name, grid in zip("abc", grids, strict=True)
        for kind, value in (("scale", grid.scale.detach().numpy()), ("zero", grid.zero_point.numpy().astype(np.uint8)))
    }
    domain = "com.microsoft" if operation == "QLinearAdd" else ""
    node = onnx.helper.make_node(operation, names, ["c"], domain=domain)
    shapes = {"a": a.shape, "b": b.shape, "c": [None] * a.ndim}
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, shapes[name]) for name in "abc"]
    initializers = [onnx.numpy_helper.from_array(np.array(value), name) for name, value in constants.items()]
    graph = onnx.helper.make_graph([node], "kernel", values[:2], values[2:], initializers)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"a": a.numpy().astype(np.uint8), "b": b.numpy().astype(np.uint8)})
    return np.asarray(result)


def _in_double(bias: Tensor | None, rest: list[object]) -> list[object]:
    return [None if bias is None else bias.double(), *rest[1:]]


def _layers_with_inputs(student: Student, images: Tensor) -> list[tuple[list[object], ExactLayer]]:
    found: list[tuple[list[object], ExactLayer]] = []

    class Recorder(torch.fx.Interpreter):
        def call_module(self, target: str, args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
            module = self.fetch_attr(target)
            if isinstance(module, ExactLayer):
                found.append((list(args), module))
            return super().call_module(target, args, kwargs)

    with torch.no_grad():
        Recorder(with_exact_sums(student.module)).run(images)
    assert found
    return found


@pytest.mark.parametrize("scheme", ["hardware", "paper"])
def test_in_training_and_in_evaluation_a_student_answers_alike(scheme: str) -> None:
    student, images = student_of("residual", 8, scheme)
    recorded = student.train()(images).detach()
    with torch.no_grad():
        exact = student.eval()(images)
    # where a sum lies between two levels, a rounding error may carry it to either
    assert float((recorded - exact).abs().max()) < 0.02 * float(exact.std())
    assert torch.equal(recorded, exact) == (scheme == "paper")


def test_what_is_learned_later_reaches_the_exact_sums() -> None:
    student, images = student_of("residual", 4)
    with torch.no_grad():
        before = student(images)
        for parameter in student.weights:
            parameter.mul_(1.5)
        assert not torch.equal(student(images), before)
