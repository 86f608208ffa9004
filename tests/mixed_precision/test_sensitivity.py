import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qimera.config.settings import SynthesisSettings
from qimera.errors import ConfigError, DivergenceError
from qimera.graph.folding import fold_batch_norms
from qimera.graph.nodes import with_outputs
from qimera.machine.progress import Progress
from qimera.mixed_precision.allocation import allocate_bits
from qimera.mixed_precision.sensitivity import Sensitivity, measure_sensitivity
from qimera.quantization.fake_quantize import LearnedStepFakeQuantize
from qimera.quantization.losses import kl_loss
from qimera.student.rounding import Compensation
from qimera.synthesis.bank import SampleBank
from qimera.teacher.teacher import Teacher
from tests import shared
from tests.networks import SPEC, Fragile


@pytest.fixture(scope="module")
def measured(teacher: Teacher, bank: SampleBank) -> Sensitivity:
    return measure_sensitivity(teacher, bank, seed=0)


def test_every_layer_has_a_loss_for_every_width_of_its_weight_and_of_its_input(
    measured: Sensitivity, teacher: Teacher
) -> None:
    names = [layer.name for layer in teacher.layers]
    assert list(measured.weights) == names
    assert list(measured.activations) == names[1:]  # the first reads the network's input, whose bits are fixed
    for losses in (*measured.weights.values(), *measured.activations.values()):
        assert len(losses) == 7
        assert min(losses) >= 0


def test_fewer_bits_do_more_harm_by_far(measured: Sensitivity) -> None:
    for losses in (*measured.weights.values(), *measured.activations.values()):
        assert losses[0] > 3 * losses[3] > 9 * losses[6]  # 2, 5 and 8 bits


def test_the_loss_of_bits_is_that_of_the_weight_plus_that_of_the_input(measured: Sensitivity) -> None:
    weight, entering = measured.weights["conv2"], measured.activations["conv2"]
    assert measured.loss("conv2", 3) == weight[1]
    assert measured.loss("conv2", 3, 5) == weight[1] + entering[3]


def test_the_loss_at_eight_bits_of_the_last_layers_input_is_the_divergence_of_the_logits(
    teacher: Teacher, bank: SampleBank, measured: Sensitivity
) -> None:
    """Nothing follows that could make up for it, so that it can be computed without the machinery."""
    rng = torch.Generator().manual_seed(0)
    fit_on, judge_on = next(bank.batches(128, rng)).images.chunk(2)
    module = fold_batch_norms(teacher.module)
    entering = str(module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[0].args[0])
    with torch.no_grad():
        logits, (seen,) = with_outputs(module, [entering])(judge_on)
        _, (fitted,) = with_outputs(module, [entering])(fit_on)
        parameters = dict(teacher.module.named_parameters())
        low, high = float(fitted.min().clamp(max=0)), float(fitted.max())
        losses = []
        for shrink in torch.linspace(0.9, 1, 11).tolist():  # the search may clip a little
            scale = (high - low) * shrink / 255
            grid = (seen / scale).round().clamp(0, 255) * scale
            answers = F.linear(grid, parameters["fc.weight"], parameters["fc.bias"])
            losses.append(float(kl_loss(answers, logits, 1.0)))
    assert 0.5 * min(losses) < measured.activations["fc"][6] < 2 * max(losses)


def test_the_same_seed_gives_the_same_losses_and_every_layer_is_reported(
    teacher: Teacher, bank: SampleBank, measured: Sensitivity
) -> None:
    reports: list[Progress] = []
    again = measure_sensitivity(teacher, bank, activations=False, seed=0, progress=reports.append)
    assert again.weights == measured.weights
    assert again.activations == {}
    assert [(each.stage, each.step, each.total) for each in reports] == [("sensitivity", i, 6) for i in range(1, 7)]


def test_a_bank_of_a_single_image_is_enough(teacher: Teacher, bank: SampleBank) -> None:
    settings = SynthesisSettings(num_optimized=0)
    nothing = SampleBank.from_pixels(bank.pixels[:0], bank.soft_labels[:0], teacher, settings, seed=0)
    found = measure_sensitivity(teacher, nothing.with_images(bank.pixels[:1], teacher), activations=False)
    assert all(losses[0] > losses[-1] for losses in found.weights.values())


@pytest.mark.parametrize("name", ["transposed convolution", "shared convolution", "norms before convolutions"])
def test_layers_of_every_kind_are_measured(name: str) -> None:
    teacher = shared.teacher_of(name)
    images = torch.randn(16, *SPEC.shape, generator=torch.Generator().manual_seed(0))
    labels = torch.full((16, teacher.num_classes), 1 / teacher.num_classes)
    samples = SampleBank.from_images(images, labels, teacher, SynthesisSettings(), 0)
    found = measure_sensitivity(teacher, samples)
    assert set(found.weights) == {layer.name for layer in teacher.layers}
    assert all(max(losses[:2]) > 10 * losses[6] > 0 for losses in found.weights.values())


class Doubled(nn.Module):
    """A convolution whose channels come in pairs of nearly the same, and one that reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.norm(self.first(x)) + 4)))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def test_an_error_that_the_next_layer_can_undo_costs_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Always positive, the eight channels are linear in three: the second layer can take any error of the first out."""
    torch.manual_seed(0)
    teacher = Teacher.capture(Doubled(), SPEC)
    images = torch.randn(128, *SPEC.shape, generator=torch.Generator().manual_seed(0)).clamp(SPEC.low, SPEC.high)
    bank = SampleBank.from_images(images, torch.full((128, 4), 0.25), teacher, SynthesisSettings(), 0)
    undone = measure_sensitivity(teacher, bank, activations=False)
    monkeypatch.setattr("qimera.mixed_precision.sensitivity._NUM_FOLLOWERS", 0)
    alone = measure_sensitivity(teacher, bank, activations=False)
    # Not all of it: the second layer stays near what it was (damping in rounding.py).
    assert max(undone.weights["first"]) < 0.75 * max(alone.weights["first"])
    assert undone.weights["head"] == alone.weights["head"]


@pytest.fixture(scope="module")
def fragile() -> tuple[Teacher, SampleBank, Sensitivity]:
    torch.manual_seed(0)
    teacher = Teacher.capture(Fragile(), SPEC)
    images = torch.randn(32, *SPEC.shape, generator=torch.Generator().manual_seed(0)).clamp(SPEC.low, SPEC.high)
    bank = SampleBank.from_images(images, torch.full((32, 4), 0.25), teacher, SynthesisSettings(), 0)
    return teacher, bank, measure_sensitivity(teacher, bank)


def test_bits_at_which_the_answers_are_no_numbers_cost_without_limit(
    fragile: tuple[Teacher, SampleBank, Sensitivity],
) -> None:
    measured = fragile[2]
    assert set(measured.weights["first"]) == {math.inf}
    entering = measured.activations["first"]
    assert entering[:4] == (math.inf,) * 4
    assert max(entering[4:]) < 1e-3
    assert max(*measured.weights["second"], *measured.weights["head"]) < 1e-3
    assert Sensitivity.model_validate_json(measured.model_dump_json()) == measured


def test_a_budget_takes_no_bits_at_which_the_answers_are_no_numbers(
    fragile: tuple[Teacher, SampleBank, Sensitivity],
) -> None:
    teacher, bank, measured = fragile
    with pytest.raises(DivergenceError, match="become NaN or infinite when first is quantized, at all of 2 to 8 bits"):
        allocate_bits(teacher, bank, "bops=0.02", sensitivity=measured)
    only_at_6 = (math.inf,) * 4 + (1e-7, 1e-8, 1e-9)
    better = measured.replace(weights={**measured.weights, "first": only_at_6})
    with pytest.raises(
        ConfigError, match=r"bops=0\.008 cannot be met: .* some bits of first, .*; give bops=0\."
    ) as given:
        allocate_bits(teacher, bank, "bops=0.008", sensitivity=better)
    reachable = re.findall(r"give (bops=[\d.]+) to", str(given.value))[0]
    found = {each.name: each for each in allocate_bits(teacher, bank, reachable, sensitivity=better).layers}
    assert min(found["first"].weight_bits, found["first"].activation_bits) == 6
    assert math.isfinite(sum(each.loss for each in found.values()))


def test_a_weight_is_rounded_once_for_each_width_that_is_measured(
    teacher: Teacher, bank: SampleBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    rounded = Compensation.rounded

    def count(self: Compensation, quantizer: LearnedStepFakeQuantize) -> tuple[Tensor, Tensor | None]:
        widths.append(quantizer.quant_max)
        return rounded(self, quantizer)

    monkeypatch.setattr(Compensation, "rounded", count)
    measure_sensitivity(teacher, bank, activations=False)
    assert widths == [1, 3, 7, 31] * len(teacher.layers)
