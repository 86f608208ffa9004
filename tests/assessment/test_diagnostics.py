import dataclasses

import pytest
import torch
from torch import Tensor, nn

from qimera.assessment.diagnostics import Diagnosis, diagnose, features_of, margins_of
from qimera.config.input_spec import InputSpec
from qimera.config.settings import DirectSettings, LabelSettings, SynthesisSettings
from qimera.pipeline import synthesize
from qimera.synthesis.bank import SampleBank
from qimera.synthesis.losses import bns_loss, channel_moments
from qimera.teacher.sources import EMBEDDED_MODELS, load_model
from qimera.teacher.teacher import Teacher
from tests.networks import SPEC

RIGHT = EMBEDDED_MODELS["mnist_cnn"].input_spec


def digits(spec: InputSpec, count: int) -> tuple[SampleBank, Teacher]:
    teacher = Teacher.capture(load_model("mnist_cnn"), spec)
    direct = DirectSettings(num_steps=40, batch_size=count, precision="float32")
    return synthesize(teacher, settings=SynthesisSettings(num_optimized=count, direct=direct)), teacher


@pytest.fixture(scope="module")
def good() -> tuple[SampleBank, Teacher]:
    return digits(RIGHT, 64)


@pytest.fixture(scope="module")
def diagnosis(good: tuple[SampleBank, Teacher]) -> Diagnosis:
    return diagnose(*good)


def test_a_good_bank_has_no_warnings(diagnosis: Diagnosis) -> None:
    assert diagnosis.warnings == ()
    assert diagnosis.num_samples == 64
    assert diagnosis.recognised > 85
    assert 20 < diagnosis.superposed < 60
    assert diagnosis.near_boundary_superposed > 2 * diagnosis.near_boundary_single
    assert 0 < diagnosis.diversity < 1


def test_every_failed_check_has_a_warning_and_no_other(good: tuple[SampleBank, Teacher], diagnosis: Diagnosis) -> None:
    assert set(diagnosis.checks) == {"statistics", "classes", "recognised", "boundaries", "variety"}
    assert all(check.is_good for check in diagnosis.checks.values())
    bank, teacher = good
    pixels = bank.pixels.clone()
    pixels[: len(bank) // 2] = 255 - pixels[0]
    repeated = dataclasses.replace(bank, pixels=pixels, logits=0 * bank.logits)
    found = diagnose(repeated, teacher)
    failed = {name for name, check in found.checks.items() if not check.is_good}
    assert {"statistics", "recognised", "variety"} <= failed
    assert len(found.warnings) == len(failed)


@pytest.mark.parametrize(
    ("mean", "std", "pixel_range"), [(0.0, 1.0, (0.0, 1.0)), (0.5, 0.5, (0.0, 1.0)), (0.0, 1.0, (0.0, 255.0))]
)
def test_wrong_mean_and_std_are_detected(mean: float, std: float, pixel_range: tuple[float, float]) -> None:
    wrong = InputSpec(shape=RIGHT.shape, mean=(mean,), std=(std,), pixel_range=pixel_range)
    warnings = diagnose(*digits(wrong, 16)).warnings
    assert any("a wrong mean, std or pixel range is the most common reason" in warning for warning in warnings)


def test_too_few_steps_are_not_blamed_on_mean_and_std(teacher: Teacher) -> None:
    few = SynthesisSettings(num_optimized=32, direct=DirectSettings(num_steps=1, batch_size=32))
    bank = synthesize(teacher, settings=few)
    (warning,) = [each for each in diagnose(bank, teacher).warnings if each.startswith("statistics")]
    assert "More synthesis steps bring them closer" in warning


def test_large_images_may_be_further_off_for_they_settle_slowly(teacher: Teacher) -> None:
    settings = SynthesisSettings(num_optimized=64, direct=DirectSettings(num_steps=2, batch_size=64))
    bank = synthesize(teacher, settings=settings)
    small = diagnose(bank, teacher)
    mean = sum(small.statistics_gap.values()) / len(small.statistics_gap)
    assert 0.02 < mean < 0.2
    assert "statistics" in small.doubts[0]
    large = dataclasses.replace(bank, input_spec=bank.input_spec.replace(shape=(3, 96, 96)))
    assert not [doubt for doubt in diagnose(large, teacher).doubts if "statistics" in doubt]


def test_the_gap_of_all_norms_is_the_statistics_loss(good: tuple[SampleBank, Teacher], diagnosis: Diagnosis) -> None:
    bank, teacher = good
    with torch.no_grad():
        _, (entering, *_) = teacher.forward_with_taps(bank.take(slice(None)).images)
        expected = float(bns_loss(entering, teacher.batch_norms, relative=True))
    assert list(diagnosis.statistics_gap) == [tap.name for tap in teacher.batch_norms]
    mean = sum(diagnosis.statistics_gap.values()) / len(teacher.batch_norms)
    assert mean == pytest.approx(expected, rel=1e-3)  # summed up in parts


class NormCalledTwice(nn.Module):
    """A batch norm of which the second input has other means and variances than the first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, momentum=None), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return self.fc(self.norm(3 * x + 2).mean((2, 3)))


def test_a_norm_that_is_called_twice_is_judged_by_both_of_its_inputs() -> None:
    torch.manual_seed(0)
    model, pixels = NormCalledTwice(), torch.randint(0, 256, (64, *SPEC.shape)).to(torch.uint8)
    model.train()(SPEC.normalize(pixels))
    teacher = Teacher.capture(model, SPEC)
    bank = SampleBank.from_pixels(pixels, torch.eye(4)[torch.arange(64) % 4], teacher, SynthesisSettings(), 0)
    assert [tap.name for tap in teacher.batch_norms] == ["norm", "norm"]
    tap = teacher.batch_norms[0]
    with torch.no_grad():
        _, (entering, *_) = teacher.forward_with_taps(SPEC.normalize(pixels))
    means, variances = zip(*(channel_moments(each) for each in entering), strict=True)
    mean, var = torch.stack(means).mean(0), torch.stack(variances).mean(0)
    gap = ((mean - tap.mean).square() + (var.sqrt() - tap.var.sqrt()).square()) / (var + tap.var)
    assert diagnose(bank, teacher).statistics_gap == {"norm": pytest.approx(float(gap.mean()), rel=1e-3)}


class ScoresTokens(nn.Module):
    """The classifier reads every row of an image, and its scores are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.fc = nn.Linear(48, 6), nn.Linear(6, 4)

    def tokens(self, x: Tensor) -> Tensor:
        return self.hidden(x.transpose(1, 2).flatten(2)).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.tokens(x)).mean(1)


def test_features_of_a_classifier_of_tokens_are_averages_over_tokens() -> None:
    model, images = ScoresTokens().eval(), torch.randn(3, *SPEC.shape)
    expected = model.tokens(images).mean(1)
    torch.testing.assert_close(features_of(images, Teacher.capture(model, SPEC)), expected.detach())


def test_counts_are_those_of_the_labels(good: tuple[SampleBank, Teacher], diagnosis: Diagnosis) -> None:
    bank, _ = good
    for number, count in enumerate(diagnosis.class_counts):
        assert count == sum(int(label.argmax()) == number for label in bank.soft_labels)
    pixels = bank.pixels.flatten().tolist()
    assert diagnosis.clipped == pytest.approx(100 * sum(value in (0, 255) for value in pixels) / len(pixels), rel=1e-4)


def test_samples_that_repeat_are_counted_and_warned_of(good: tuple[SampleBank, Teacher]) -> None:
    bank, teacher = good
    pixels = bank.pixels.clone()
    pixels[40:] = pixels[:24]
    pixels[40:, 0, 0, 0] ^= 3  # nearly
    found = diagnose(dataclasses.replace(bank, pixels=pixels), teacher)
    assert found.near_duplicates == 24
    assert any("24 samples nearly repeat an earlier one" in warning for warning in found.warnings)


def test_missing_classes_are_warned_of(good: tuple[SampleBank, Teacher]) -> None:
    bank, teacher = good
    labels = torch.eye(10)[torch.arange(64) % 7]
    found = diagnose(dataclasses.replace(bank, soft_labels=labels), teacher)
    assert found.class_counts[7:] == (0, 0, 0)
    assert any("3 of 10 classes have no sample" in warning for warning in found.warnings)
    assert any("single-class samples" in warning for warning in found.warnings)


def test_superposed_samples_away_from_all_boundaries_are_warned_of(good: tuple[SampleBank, Teacher]) -> None:
    bank, teacher = good
    sure = torch.where(torch.eye(10)[bank.logits.argmax(1)] > 0, 20.0, 0.0)
    found = diagnose(dataclasses.replace(bank, logits=sure), teacher)
    assert found.near_boundary_superposed == 0
    assert any("0 % of the superposed samples lie near a boundary" in warning for warning in found.warnings)


def test_a_bank_without_superposed_samples_is_described_too(good: tuple[SampleBank, Teacher]) -> None:
    bank, teacher = good
    found = diagnose(dataclasses.replace(bank, soft_labels=bank.soft_labels.round()), teacher)
    assert (found.superposed, found.near_boundary_superposed) == (0, 0)
    mixed = SynthesisSettings(
        num_optimized=8,
        labels=LabelSettings(superposition_probability=1.0),
        direct=DirectSettings(num_steps=1, batch_size=8),
    )
    few = synthesize(teacher, settings=mixed)
    found = diagnose(few, teacher)
    assert found.confidence >= 0
    assert found.superposed > 50


def test_a_margin_is_the_lead_of_the_first_class() -> None:
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2]]).log()
    torch.testing.assert_close(margins_of(logits), torch.tensor([0.5, 0.0]))
