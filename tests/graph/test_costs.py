"""Expectations are written out by hand: outputs times what each sums over."""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qimera.config.input_spec import InputSpec
from qimera.graph.costs import is_multiplying, multiply_adds, total_multiply_adds
from qimera.teacher.libraries import build
from qimera.teacher.teacher import Teacher


class Applied(nn.Module):
    """A function as a network, with the parameters that it needs."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(torch.zeros(shape) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.weights)


def graph_of(model: nn.Module, shape: tuple[int, ...], *, core: bool = False) -> GraphModule:
    model = model.eval().requires_grad_(False)
    program = torch.export.export(model, (torch.zeros(2, *shape),), dynamic_shapes=({0: Dim.DYNAMIC},))
    module = (program.run_decompositions() if core else program).module(check_guards=False)
    assert isinstance(module, GraphModule)
    return module


LAYERS = {
    "1d convolution": (nn.Conv1d(6, 10, 3), (6, 20), 10 * 18 * 6 * 3),
    "2d convolution": (nn.Conv2d(6, 10, (3, 5), padding=(1, 2)), (6, 8, 9), 10 * 8 * 9 * 6 * 3 * 5),
    "3d convolution": (nn.Conv3d(2, 3, 2), (2, 4, 5, 6), 3 * 3 * 4 * 5 * 2 * 8),
    "groups": (nn.Conv2d(6, 12, 3, groups=3), (6, 8, 8), 12 * 36 * 2 * 9),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6, padding=1), (6, 8, 8), 6 * 64 * 9),
    "stride and dilation": (nn.Conv2d(3, 5, 3, stride=2, dilation=2), (3, 13, 13), 5 * 25 * 3 * 9),
    "same padding": (nn.Conv2d(3, 5, 3, padding="same"), (3, 7, 7), 5 * 49 * 3 * 9),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), (4, 5), 5 * 4 * 6 * 3),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 5, 7), 35 * 4 * 6 * 4),
    "transposed 2d in groups": (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 7), 35 * 4 * 3 * 9),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2), (2, 3, 3, 3), 27 * 2 * 3 * 8),
    "linear": (nn.Linear(12, 7), (12,), 12 * 7),
    "linear on tokens": (nn.Linear(12, 7), (9, 12), 9 * 12 * 7),
    "linear on a map": (nn.Linear(12, 7, bias=False), (5, 4, 12), 20 * 12 * 7),
    "bilinear": (Applied(lambda x, w: F.bilinear(x, x, w), (3, 8, 8)), (5, 8), 5 * 3 * 64),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_multiplies_what_each_of_its_outputs_sums_over(name: str) -> None:
    model, shape, expected = LAYERS[name]
    assert total_multiply_adds(graph_of(model, shape)) == expected
    if name not in ("bilinear",):  # which becomes an elementwise product and a sum
        assert total_multiply_adds(graph_of(model, shape, core=True)) == expected


def windows(x: Tensor, weight: Tensor) -> Tensor:
    """Half of the tokens of each image at a time, in one axis with the images, as in Swin transformers."""
    return F.linear(x.reshape(-1, 4, 6), weight)


PRODUCTS = {
    "of matrices": (lambda x: x @ x.transpose(1, 2), (), 8 * 8 * 6),
    "of batches of heads": (lambda x: x[:, None] @ x[:, None].transpose(2, 3), (), 8 * 8 * 6),
    "with a parameter": (lambda x, w: x @ w, [(6, 5)], 8 * 6 * 5),
    "with a vector": (lambda x, w: x @ w, [(6,)], 8 * 6),
    "bmm": (lambda x: torch.bmm(x, x.transpose(1, 2)), (), 8 * 8 * 6),
    "mm": (lambda x, w: torch.mm(x.flatten(1), w), [(48, 5)], 48 * 5),
    "mv": (lambda x, w: torch.mv(x.flatten(1), w), [(48,)], 48),
    "addmm": (lambda x, b, w: torch.addmm(b, x.flatten(1), w), [(5,), (48, 5)], 48 * 5),
    "addmv": (lambda x, b, w: torch.addmv(b, x.flatten(1), w), [(1,), (48,)], 48),
    "baddbmm": (lambda x, b: torch.baddbmm(b, x, x.transpose(1, 2), alpha=0.5), [(1, 8, 8)], 8 * 8 * 6),
    "einsum": (lambda x: torch.einsum("bid,bjd->bij", x, x), (), 8 * 8 * 6),
    "einsum without a result": (lambda x, w: torch.einsum("bid, de", x, w), [(6, 5)], 8 * 6 * 5),
    "einsum with dots": (lambda x, w: torch.einsum("...d,...de->...e", x, w), [(8, 6, 5)], 8 * 6 * 5),
    "einsum with one factor": (lambda x: torch.einsum("bid->bdi", x), (), 0),
    "einsum of three": (
        lambda x, v, w: torch.einsum("bid,de,ef->bif", x, v, w),
        [(6, 5), (5, 4)],
        8 * 6 * 5 + 8 * 5 * 4,
    ),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x[:, :3], x[:, :3, :2]), (), 8 * 3 * 6 + 8 * 3 * 2),
    "causal attention": (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), (), 2 * 8 * 8 * 6),
    "windows": (windows, [(5, 6)], 8 * 6 * 5),
    "elementwise": (lambda x, w: (x * w + x * x).softmax(-1).mean(1), [(6,)], 0),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_of_matrices_counts_with_or_without_a_weight(name: str) -> None:
    function, shapes, expected = PRODUCTS[name]
    assert total_multiply_adds(graph_of(Applied(function, *shapes), (8, 6))) == expected


@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")
def test_a_recurrent_layer_counts_every_matrix_in_every_step() -> None:
    both_ways = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)
    model = Applied(lambda x: x)
    model.inner, model.function = both_ways, lambda x: both_ways(x)[0]
    first, second = 2 * 4 * 5 * (6 + 5), 2 * 4 * 5 * (10 + 5)
    assert total_multiply_adds(graph_of(model, (8, 6))) == 8 * (first + second)


def test_a_layer_that_is_called_twice_counts_twice() -> None:
    layer = nn.Linear(6, 6)
    module = graph_of(nn.Sequential(layer, nn.ReLU(), layer), (8, 6))
    assert [multiply_adds(node) for node in module.graph.nodes if is_multiplying(node)] == [8 * 36, 8 * 36]


class UpAndGroups(nn.Module):
    """A transposed convolution and groups, in one network."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 3, stride=2),
            nn.BatchNorm2d(12),
            nn.Conv2d(12, 24, 3, groups=4),
            nn.ConvTranspose2d(24, 8, 4, stride=2, padding=1, groups=2),
            nn.ReLU(),
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def test_a_network_multiplies_as_much_as_pytorch_counts() -> None:
    assert_counts_as_pytorch(UpAndGroups(), 64)


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("test_resnet", 64), ("test_efficientnet", 64), ("test_vit", 160)),
        *(pytest.param(name, 64, marks=pytest.mark.slow) for name in ("resnet18", "mobilenetv3_small_050")),
    ],
)
def test_an_architecture_multiplies_as_much_as_pytorch_counts(name: str, size: int) -> None:
    assert_counts_as_pytorch(build("timm", name, None), size)


def assert_counts_as_pytorch(model: nn.Module, size: int) -> None:
    model.eval()
    spec = InputSpec(shape=(3, size, size), mean=(0.5,) * 3, std=(0.5,) * 3)
    teacher = Teacher.capture(model, spec)
    # It does not know the CPU's kernel of attention, which computes both products in one.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, 3, size, size))
    assert 2 * total_multiply_adds(teacher.module) == counter.get_total_flops()
