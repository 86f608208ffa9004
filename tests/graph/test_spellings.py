"""Each spelling of an operation is computed as PyTorch computes it, and quantized as the usual spelling is."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qimera.config.settings import QuantizationSettings
from qimera.errors import UnsupportedModelError
from qimera.graph.nodes import aten
from qimera.quantization.scheme import quantizer_of
from qimera.student.student import Student
from qimera.teacher.teacher import Teacher
from tests.networks import SPEC, Head, Lambda, calibrated


def between(*layers: nn.Module, channels: int = 8) -> nn.Module:
    """Return a small network with ``layers`` behind its stem."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return calibrated(
            nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *layers, Head(channels))
        )


def weighted(name: str, weight: Tensor) -> nn.Module:
    """Return a layer that multiplies by a parameter of its own, as ``name`` says."""
    products = {"matmul": lambda x, w: x @ w, "addmm": lambda x, w: torch.addmm(w[0], x, w)}
    return Lambda(products[name], weight=weight)


INF = float("inf")
TOKENS = Lambda(lambda x: x.flatten(2).transpose(1, 2))
MEAN = Lambda(lambda x: x.mean((2, 3)))
MAP = Lambda(lambda x: x[:, :, None, None])
ATTENTION: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: F.scaled_dot_product_attention(x, x, x),
    "scaled": lambda x: F.scaled_dot_product_attention(x, 2 * x, x, scale=0.7),
    "causal": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "hiding tokens": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=torch.eye(x.shape[1]) > 0),
    "with a bias": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=torch.linspace(-1, 1, x.shape[1])),
    "hiding some": lambda x: F.scaled_dot_product_attention(
        x, x, x, attn_mask=x.mean(2)[:, None] > x.mean((1, 2))[:, None, None]
    ),
}
SPELLINGS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "padding same": (lambda: between(nn.Conv2d(8, 8, 3, padding="same")), 3),
    "padding same, dilated and grouped": (lambda: between(nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=2)), 3),
    "padding same around an even kernel": (lambda: between(nn.Conv2d(8, 8, (4, 2), padding="same")), 3),
    "padding valid": (lambda: between(nn.Conv2d(8, 8, 3, padding="valid")), 3),
    "one dimension": (
        lambda: between(
            Lambda(lambda x: x.flatten(2)), nn.Conv1d(8, 8, 3, padding="same"), Lambda(lambda x: x[..., None])
        ),
        3,
    ),
    "grouped transposed convolution": (lambda: between(nn.ConvTranspose2d(8, 8, 2, 2, groups=4), nn.BatchNorm2d(8)), 3),
    "transposed convolution with output padding": (
        lambda: between(nn.ConvTranspose2d(8, 8, 3, 2, 1, output_padding=1, groups=2)),
        3,
    ),
    "product of tokens with a parameter": (
        lambda: between(TOKENS, weighted("matmul", torch.randn(8, 8)), Lambda(lambda x: x.transpose(1, 2)[..., None])),
        3,
    ),
    "einsum with a parameter": (
        lambda: between(
            TOKENS,
            Lambda(lambda x, w: torch.einsum("bnc,cd->bdn", x, w), weight=torch.randn(8, 8)),
            Lambda(lambda x: x[..., None]),
        ),
        3,
    ),
    "addmm with parameters": (lambda: between(MEAN, weighted("addmm", torch.randn(8, 8)), MAP), 3),
    "average pooling with a divisor": (lambda: between(nn.AvgPool2d(3, 2, 1, divisor_override=2)), 2),
    "average pooling that rounds up": (lambda: between(nn.AvgPool2d(3, 2, ceil_mode=True)), 2),
    "average pooling that rounds up and counts zeros": (lambda: between(nn.AvgPool2d(3, 2, 1, ceil_mode=True)), 2),
    "average pooling of which no window begins in the padding": (
        lambda: between(nn.Conv2d(8, 8, 2), nn.AvgPool2d(2, 2, 1, ceil_mode=True)),
        3,
    ),
    "average pooling that counts no zeros": (lambda: between(nn.AvgPool2d(3, 2, 1, count_include_pad=False)), 2),
    "global maximum": (lambda: between(nn.AdaptiveMaxPool2d(1)), 2),
    "maximum of even windows": (lambda: between(nn.AdaptiveMaxPool2d((4, 2))), 2),
    "maximum of uneven windows": (lambda: between(nn.AdaptiveMaxPool2d(3)), 2),
    "maximum with positions": (lambda: between(Lambda(lambda x: F.max_pool2d(x, 2, return_indices=True)[0])), 2),
    "maximum with padding of one side": (
        lambda: between(nn.Conv2d(8, 8, 1), Lambda(lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-INF), 3, 2))),
        3,
    ),
    "clamps": (lambda: between(nn.Conv2d(8, 8, 3), Lambda(lambda x: x.clamp(0, 6).clamp(min=0))), 3),
    "a fixed filter": (
        lambda: between(Lambda(lambda x, w: F.conv2d(x, w, groups=8), weight=torch.ones(8, 1, 2, 2), fixed=True)),
        3,
    ),
}


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 8, 3, (2,), (1,)), nn.ConvTranspose2d(8, 8, 3, (2,), (1,))])
def test_lists_of_one_size_become_lists_of_height_and_width(layer: nn.Module) -> None:
    nodes = Teacher.capture(between(layer), SPEC).module.graph.nodes
    (node,) = (each for each in nodes if each.args[3:4] == ([2, 2],))
    assert node.args[4] == [1, 1]


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel:UserWarning")  # from torch
def test_every_spelling_is_captured_and_quantized(name: str) -> None:
    build, num_layers = SPELLINGS[name]
    model = build()
    teacher = Teacher.capture(model, SPEC)
    images = torch.randn(4, *SPEC.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(images)
        assert (teacher(images) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert len(teacher.layers) == num_layers
        student = Student(teacher, QuantizationSettings(weight_bits=8, activation_bits=8))
        student.initialize_ranges_([images])
        assert (student(images) - expected).abs().max() <= 0.1 * expected.abs().max()
    assert len(student.layer_names()) == num_layers


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_taken_apart_into_products_of_integers(name: str) -> None:
    attention = Lambda(ATTENTION[name])
    model = between(TOKENS, attention, Lambda(lambda x: x.transpose(1, 2)[..., None]))
    teacher = Teacher.capture(model, SPEC)
    targets = [node.target for node in teacher.module.graph.nodes]
    assert (targets.count(aten.matmul.default), targets.count(aten.softmax.int)) == (2, 1)
    assert aten.scaled_dot_product_attention.default not in targets
    images = torch.randn(4, *SPEC.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), model(images), rtol=1e-4, atol=1e-5)
    student = Student(teacher, QuantizationSettings(weight_bits=8, activation_bits=5))
    products = [node for node in student.module.graph.nodes if node.target is aten.matmul.default]
    factors = [quantizer_of(student.module, factor) for node in products for factor in node.args]
    assert [(each.quant_min, each.quant_max) for each in factors] == [(0, 31)] * 4


def heads(x: Tensor) -> Tensor:
    """Return attention of two heads whose axes stay where they are."""
    x = x.unflatten(2, (2, 4))
    scores = torch.einsum("bnhc, bmhc -> bhnm", x, x.tanh())
    return torch.einsum("bhnm, bmhc -> bnhc", scores, x)


SUMS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "of tokens with tokens": (lambda x: torch.einsum("bnc,bmc->bnm", x, x.tanh()), 1),
    "of heads": (heads, 2),
    "along rows of a map": (
        lambda x: torch.einsum("bhwc,bhvc->wbvh", *2 * [x.unflatten(1, (16, 16))]).transpose(0, 1),
        1,
    ),
    "over two axes": (lambda x: torch.einsum("bhwc,bhwd->bdc", *2 * [x.unflatten(1, (16, 16))]), 1),
    "with a table": (lambda x: torch.einsum("bhwc,hvc->bhwv", x.unflatten(1, (16, 16)), torch.ones(16, 3, 8)), 1),
    "with dots": (lambda x: torch.einsum("...nc,...mc->...nm", x, x), 1),
    "of three": (lambda x: torch.einsum("bnc,bmc,bmd->bnd", x, x, x), 0),
    "of a token with itself": (lambda x: torch.einsum("bnc,bnc->bn", x, x), 0),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_over_products_of_two_tensors_is_a_product_of_matrices(name: str) -> None:
    function, num_products = SUMS[name]
    model = between(TOKENS, Lambda(function), Lambda(lambda x: x.reshape(x.shape[0], -1)[:, :8, None, None]))
    teacher = Teacher.capture(model, SPEC)
    targets = [node.target for node in teacher.module.graph.nodes]
    assert targets.count(aten.matmul.default) == num_products
    assert (aten.einsum.default in targets) == (num_products == 0)
    images = torch.randn(4, *SPEC.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), model(images), rtol=1e-4, atol=1e-5)  # another order of sums


def operations(name: str) -> set[object]:
    return {node.target for node in Teacher.capture(SPELLINGS[name][0](), SPEC).module.graph.nodes}


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel:UserWarning")  # from torch
def test_the_usual_spellings_are_what_is_left() -> None:
    assert operations("padding same").isdisjoint({aten.conv2d.padding})
    assert aten.constant_pad_nd.default in operations("padding same around an even kernel")
    assert aten.amax.default in operations("global maximum")
    assert {aten.relu.default, aten.hardtanh.default} <= operations("clamps")


def test_an_average_that_no_kernel_computes_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"avg_pool2d: average pooling with ceil_mode and divisor_override"):
        Teacher.capture(between(nn.AvgPool2d(3, 2, 1, ceil_mode=True, divisor_override=2)), SPEC)


def test_a_program_in_core_operations_is_the_network_that_it_was_made_from() -> None:
    model = between(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), MEAN, nn.Linear(8, 8), nn.LayerNorm(8), MAP)
    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model.requires_grad_(False), (torch.zeros(2, *SPEC.shape),), dynamic_shapes=(batch,))
    core = program.run_decompositions()
    teacher, plain = Teacher.capture(core.module(check_guards=False), SPEC), Teacher.capture(model, SPEC)
    assert [tap.name for tap in teacher.batch_norms] == [tap.name for tap in plain.batch_norms]
    assert [(layer.name, layer.kind) for layer in teacher.layers] == [(each.name, each.kind) for each in plain.layers]
    images = torch.randn(3, *SPEC.shape)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), model(images), rtol=1e-4, atol=1e-5)  # another order of sums
