"""rounding.py: first integers whose errors make up for each other."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qimera import InputSpec, QuantizationSettings, Student, Teacher
from qimera.errors import DivergenceError
from qimera.graph.nodes import has_bias, has_parameter, tensor_of, with_outputs
from qimera.quantization.fake_quantize import LearnedStepFakeQuantize
from qimera.student.positions import choose_positions, inputs_at, outputs_at
from qimera.student.rounding import _DAMPINGS, _round_rows, adapted, suiting_damping
from tests.networks import Fragile

INPUT_OF_9_BY_8 = InputSpec(shape=(3, 9, 8), mean=(0.5,) * 3, std=(0.25,) * 3)
SPEC = InputSpec(shape=(3, 16, 16), mean=(0.5,) * 3, std=(0.25,) * 3)


class Mixed(nn.Module):
    """One layer of every kind that is rounded, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.full = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 24, 3, padding=2, dilation=2, groups=4)
        self.depthwise = nn.Conv2d(24, 24, (1, 3), padding=(0, 1), groups=24)
        self.pointwise = nn.Conv2d(24, 32, 1, bias=False)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.linear = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.full(x)))
        x = F.relu(self.pointwise(F.relu(self.depthwise(F.relu(self.grouped(x))))))
        out: Tensor = self.linear(F.adaptive_avg_pool2d(F.relu(self.up(x)), 4).flatten(1))
        return out


@pytest.fixture(scope="module")
def mixed() -> Teacher:
    torch.manual_seed(0)
    return Teacher.capture(Mixed(), SPEC)


def images_of(seed: int, count: int = 32) -> Tensor:
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(16, 16), mode="bilinear")


def error_of(teacher: Teacher, bits: int, rounding: bool) -> float:
    """Return the share of the logits' variance that a student of these bits misses, on other images."""
    student = Student(teacher, QuantizationSettings(weight_bits=bits, activation_bits=8))
    if rounding:
        student.initialize_layers_(images_of(0), torch.Generator().manual_seed(0))
    else:
        student.initialize_ranges_([images_of(0)])
    with torch.no_grad():
        mine, theirs = student(images_of(1)), teacher(images_of(1))
    return float((mine - theirs).square().mean() / theirs.var(0).mean())


@pytest.mark.parametrize("bits", [3, 4])
def test_rounding_leaves_a_fraction_of_the_error_of_nearest_integers(mixed: Teacher, bits: int) -> None:
    assert error_of(mixed, bits, rounding=True) < 0.5 * error_of(mixed, bits, rounding=False)


def test_at_eight_bits_it_does_no_harm(mixed: Teacher) -> None:
    assert error_of(mixed, 8, rounding=True) < 1.05 * error_of(mixed, 8, rounding=False)


def test_a_layer_that_reads_no_numbers_is_named() -> None:
    torch.manual_seed(0)
    student = Student(Teacher.capture(Fragile(), SPEC), QuantizationSettings(weight_bits=4, activation_bits=4))
    with pytest.raises(
        DivergenceError, match=r"second: its inputs become NaN or too large .* more bits \(layer_bits\)"
    ):
        student.initialize_layers_(images_of(0), torch.Generator().manual_seed(0))


class CallsTwice(nn.Module):
    """A convolution that is called twice, each time before a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.linear = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * F.relu(self.shared(F.relu(self.first(x))))
        x = 2 * F.relu(self.shared(x))
        return self.linear(x.mean((2, 3)))


def test_a_weight_that_is_read_twice_is_rounded_for_its_first_call() -> None:
    torch.manual_seed(0)
    teacher = Teacher.capture(CallsTwice().eval(), SPEC)
    assert error_of(teacher, 4, rounding=True) < 0.1 * error_of(teacher, 4, rounding=False)


def test_every_rounded_weight_is_a_multiple_of_its_step(mixed: Teacher) -> None:
    student = Student(mixed, QuantizationSettings(weight_bits=3, activation_bits=4))
    student.initialize_layers_(images_of(0), torch.Generator().manual_seed(0))
    on_grid = []
    for weight, step in student.weight_steps():
        counted = weight.detach() / step
        on_grid.append(bool((counted - counted.round()).abs().max() < 1e-4))
        assert counted.abs().max() < 4 + 1e-4 or not on_grid[-1]
    assert sorted(on_grid) == [False, *([True] * 5)]  # the transposed convolution keeps its weights


def test_the_same_generator_gives_the_same_integers(mixed: Teacher) -> None:
    students = [Student(mixed, QuantizationSettings()) for _ in range(2)]
    for student in students:
        student.initialize_layers_(images_of(0), torch.Generator().manual_seed(7))
    first, second = (student.module.state_dict() for student in students)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("num_positions", "least", "most"), [(20_000, 0.0, 0.1), (48, 1.0, 10.0)])
def test_layers_seen_at_few_positions_are_damped_more(num_positions: int, least: float, most: float) -> None:
    rng = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 64, generator=rng)
    inputs = torch.randn(1, num_positions, 64, generator=rng) @ mixing
    missing = 0.1 * inputs @ torch.randn(64, 8, generator=rng)
    missing += missing.std() * torch.randn(missing.shape, generator=rng)
    damping = suiting_damping(inputs, missing)
    assert damping in _DAMPINGS
    assert least <= damping <= most


def test_a_layer_that_misses_nothing_and_sees_nothing_is_damped_too() -> None:
    assert suiting_damping(torch.zeros(2, 1, 3), torch.zeros(2, 1, 4)) in _DAMPINGS


def test_a_dead_channel_keeps_its_weights() -> None:
    """Its inputs are alike and next to nothing: weight decay brings channels there that no loss holds back."""
    inputs = 1e-21 * (1 + 1e-3 * torch.randn(1, 64, 9, generator=torch.Generator().manual_seed(0)))
    weight = torch.ones(1, 1, 3, 3)
    found, _ = adapted(weight, None, inputs, torch.zeros(1, 64, 1), suiting_damping(inputs, torch.zeros(1, 64, 1)))
    assert torch.equal(found, weight)


@torch.no_grad()
def test_rounding_comes_close_to_the_best_of_all_integers() -> None:
    """Against every combination of three levels for five weights, whose inputs vary together."""
    rng = torch.Generator().manual_seed(0)
    quantizer = LearnedStepFakeQuantize(
        dtype=torch.int8, quant_min=-1, quant_max=1, qscheme=torch.per_channel_symmetric, ch_axis=0, shape=(1, 5)
    )
    levels = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=5)))
    found, nearest, best = 0.0, 0.0, 0.0
    for _ in range(50):
        mixing = torch.randn(5, 5, generator=rng)
        moments = mixing @ mixing.T + 0.1 * torch.eye(5)
        row = torch.rand(1, 1, 5, generator=rng) * 2 - 1
        rounded = _round_rows(row, quantizer, moments[None], 1).detach()

        def missed(values: Tensor, row: Tensor = row, moments: Tensor = moments) -> Tensor:
            gap = values.reshape(-1, 5) - row[0]
            return ((gap @ moments) * gap).sum(1)

        found += float(missed(rounded))
        nearest += float(missed(row.round()))
        best += float(missed(levels).min())
    assert best <= found < 0.5 * (best + nearest)


# --- what a layer sees ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 3)),
        nn.Conv2d(6, 12, 3, padding=1, groups=3, bias=False),
        nn.Conv2d(6, 4, 1),
        nn.Flatten(),
    ],
    ids=["two numbers each", "groups", "single pixels", "linear"],
)
def test_what_a_layer_sees_times_its_weight_is_what_it_returns_there(layer: nn.Module) -> None:
    model = nn.Sequential(layer, *([] if isinstance(layer, nn.Flatten) else [nn.Flatten()]))
    features = model(torch.zeros(1, 6, 9, 8)).shape[1]
    teacher = Teacher.capture(nn.Sequential(nn.Conv2d(3, 6, 1), *model, nn.Linear(features, 4)), INPUT_OF_9_BY_8)
    nodes = [node for node in teacher.module.graph.nodes if has_parameter(node)]
    node = nodes[-1 if isinstance(layer, nn.Flatten) else 1]
    images = torch.randn(5, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    _, (entering, leaving) = with_outputs(teacher.module, [node.args[0].name, node.name])(images)
    weight = tensor_of(teacher.module, node.args[1])
    bias = tensor_of(teacher.module, node.args[2]) if has_bias(node) else None
    chosen = choose_positions(node, leaving, 20, torch.Generator().manual_seed(1))
    seen = inputs_at(node, weight, entering, chosen)
    assert len(set(chosen.tolist())) == seen.shape[1] <= 20
    products = seen @ weight.reshape(len(seen), -1, seen.shape[2]).mT
    # rtol and atol: sums are in another order
    torch.testing.assert_close(products, outputs_at(node, weight, bias, leaving, chosen), rtol=1e-4, atol=1e-5)


def test_adapted_weights_are_those_of_ridge_regression() -> None:
    """The weight's change solves least squares with a row for each input's damping; the bias takes the mean left."""
    rng = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(4, 5, generator=rng), torch.randn(4, generator=rng)
    inputs, target = torch.randn(1, 50, 5, generator=rng), torch.randn(1, 50, 4, generator=rng)
    power = inputs[0].square().mean()
    rows = torch.cat([inputs[0], (0.3 * power * 50).sqrt() * torch.eye(5)])
    missing = torch.cat([target[0] - inputs[0] @ weight.T, torch.zeros(5, 4)])
    change = torch.linalg.lstsq(rows, missing).solution.T
    found, shifted = adapted(weight, bias, inputs, target, 0.3)
    torch.testing.assert_close(found, weight + change, rtol=1e-4, atol=1e-5)  # normal equations in float32
    left = target[0] - inputs[0] @ (weight + change).T
    torch.testing.assert_close(shifted, bias + left.mean(0), rtol=1e-4, atol=1e-5)
