import inspect
import re

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

from qimera.assessment.data import LabelledImages
from qimera.assessment.evaluation import Evaluation, evaluate, paired_interval
from qimera.config.input_spec import InputSpec
from qimera.errors import ConfigError, DivergenceError, UnsupportedModelError

SPEC = InputSpec(shape=(1, 8, 8), mean=(0.0,), std=(1.0,))


def numbered_images(labels: list[int]) -> LabelledImages:
    """Return images whose upper rows say at which position the image stands, and their lower ones how many 256s."""
    positions = np.arange(len(labels))[:, None, None, None] * np.ones((1, 8, 8, 1), dtype=np.int64)
    images = np.concatenate([positions[:, :4] % 256, positions[:, 4:] // 256], 1).astype(np.uint8)
    return LabelledImages(images, np.array(labels, dtype=np.int64))


class Answers:
    """Looks the logits of a numbered image up in a table."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __call__(self, images: Tensor) -> Tensor:
        low, high = ((images[:, 0, row, 0] * 255).round().long() for row in (0, 7))
        return self.table[256 * high + low]


class Classifier(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(1)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.bn(images).flatten(1))


def one_hot(classes: list[int], num_classes: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), num_classes).float()


def counted(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Top-k accuracy by counting, image by image, the classes that stand above the label."""
    hits = 0
    for row, label in zip(logits, labels, strict=True):
        above = sum(1 for c, value in enumerate(row) if value > row[label] or (value == row[label] and c < label))
        hits += above < k
    return 100 * hits / len(labels)


@given(seed=st.integers(0, 10**6), num_classes=st.integers(6, 12), batch_size=st.integers(1, 40))
def test_shares_are_what_counting_image_by_image_gives(seed: int, num_classes: int, batch_size: int) -> None:
    rng = np.random.default_rng(seed)
    # Few different values, so that equal logits are common.
    logits, teacher_logits = rng.integers(-3, 4, (2, 30, num_classes))
    labels = rng.integers(0, num_classes, 30)
    result = evaluate(
        Answers(torch.tensor(logits)),
        numbered_images(labels.tolist()),
        SPEC,
        teacher=Answers(torch.tensor(teacher_logits)),
        batch_size=batch_size,
    )
    assert result.num_images == 30
    assert result.top1 == pytest.approx(counted(logits, labels, 1))
    assert result.top5 == pytest.approx(counted(logits, labels, 5))
    assert result.teacher_top1 == pytest.approx(counted(teacher_logits, labels, 1))
    assert result.teacher_top5 == pytest.approx(counted(teacher_logits, labels, 5))
    assert result.agreement == pytest.approx(100 * (logits.argmax(1) == teacher_logits.argmax(1)).mean())


@pytest.mark.parametrize("kind", ["int8", "uint16", "uint64"])
def test_labels_may_be_whole_numbers_of_any_width(kind: str) -> None:
    data = LabelledImages(numbered_images([0, 1, 2]).images, np.array([0, 1, 0]).astype(kind))
    model = Answers(one_hot([0, 1, 2], 3))
    assert evaluate(model, data, SPEC, teacher=model).top1 == pytest.approx(200 / 3)


def test_a_model_agrees_with_itself() -> None:
    model = Classifier(10).eval()
    result = evaluate(model, numbered_images([0, 1, 2]), SPEC, teacher=model)
    assert result.agreement == 100
    assert (result.top1, result.top5) == (result.teacher_top1, result.teacher_top5)


def test_agreement_counts_shared_mistakes_too() -> None:
    wrong = Answers(one_hot([1, 1], 3))
    result = evaluate(wrong, numbered_images([0, 0]), SPEC, teacher=wrong)
    assert (result.top1, result.agreement) == (0, 100)


@pytest.mark.parametrize(("num_classes", "counts"), [(2, False), (5, False), (6, True)])
def test_top5_stands_only_where_six_classes_or_more_are(num_classes: int, counts: bool) -> None:
    result = evaluate(Answers(one_hot([0, 1], num_classes)), numbered_images([0, 1]), SPEC)
    assert (result.top5 is not None) == counts


def test_without_a_teacher_nothing_is_said_of_one() -> None:
    result = evaluate(Answers(one_hot([0], 10)), numbered_images([0]), SPEC)
    assert (result.agreement, result.teacher_top1, result.teacher_top5) == (None, None, None)


def test_pixels_are_normalised_as_in_training() -> None:
    seen = []

    def remember(images: Tensor) -> Tensor:
        seen.append(images)
        return torch.zeros(len(images), 2)

    spec = InputSpec(shape=(1, 8, 8), mean=(0.25,), std=(0.5,))
    evaluate(remember, LabelledImages(np.full((1, 8, 8, 1), 255, np.uint8), np.zeros(1, np.int64)), spec)
    torch.testing.assert_close(seen[0], torch.full((1, 1, 8, 8), 1.5))


def test_progress_is_told_after_each_batch() -> None:
    steps: list[tuple[int, int]] = []
    data = numbered_images([0, 1, 0, 1, 0])
    evaluate(Answers(one_hot([0] * 5, 2)), data, SPEC, batch_size=2, progress=lambda *step: steps.append(step))
    assert steps == [(2, 5), (4, 5), (5, 5)]


def test_evaluating_changes_neither_model_nor_teacher() -> None:
    model, teacher = Classifier(3).eval(), Classifier(3).eval()
    before = [value.clone() for value in [*model.state_dict().values(), *teacher.state_dict().values()]]
    evaluate(model, numbered_images([0, 1, 2]), SPEC, teacher=teacher)
    after = [*model.state_dict().values(), *teacher.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("role", ["model", "teacher"])
def test_a_network_in_training_mode_is_refused(role: str) -> None:
    networks = {"model": Classifier(3).eval(), "teacher": Classifier(3).eval()}
    networks[role].train()
    with pytest.raises(ConfigError, match=rf"{role}: layer bn is in training mode.*{role}\.eval\(\)"):
        evaluate(networks["model"], numbered_images([0]), SPEC, teacher=networks["teacher"])


@pytest.mark.parametrize("layer", [nn.Dropout1d(), nn.Dropout3d(), nn.AlphaDropout(), nn.RReLU()])
def test_a_layer_that_draws_in_training_mode_is_refused_there(layer: nn.Module) -> None:
    with pytest.raises(ConfigError, match="model: layer 1 is in training mode"):
        evaluate(nn.Sequential(Classifier(3).eval(), layer), numbered_images([0]), SPEC)


def test_a_teacher_of_other_classes_is_refused() -> None:
    with pytest.raises(ConfigError, match="teacher: has 4 classes, the model has 3"):
        evaluate(Answers(one_hot([0], 3)), numbered_images([0]), SPEC, teacher=Answers(one_hot([0], 4)))


def test_a_class_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="data: has classes up to 3, the model has 3 classes"):
        evaluate(Answers(one_hot([0], 3)), numbered_images([3]), SPEC)


@pytest.mark.parametrize("kind", [tuple, str])
def test_images_that_are_no_labelled_images_are_refused(kind: type) -> None:
    data = numbered_images([0])
    given = (data.images, data.labels) if kind is tuple else "test.npz"
    with pytest.raises(ConfigError, match=rf"data: expected LabelledImages, given {kind.__name__}; give Labelled"):
        inspect.unwrap(evaluate)(Answers(one_hot([0], 3)), given, SPEC)  # type-checked in tests, and nowhere else


def test_no_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="data: holds no images"):
        evaluate(Answers(one_hot([0], 3)), numbered_images([]), SPEC)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda images: (torch.zeros(len(images), 3),), "an object of type tuple"),
        (lambda images: images, r"returned \(2, 1, 8, 8\)"),
        (lambda images: torch.zeros(1, 3), r"must return logits of shape \(2, num_classes\).* returned \(1, 3\)"),
    ],
)
def test_an_answer_that_is_no_row_of_logits_per_image_is_refused(answer, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        evaluate(answer, numbered_images([0, 1]), SPEC)


def test_logits_that_are_nan_stop_the_evaluation() -> None:
    with pytest.raises(DivergenceError, match="model: a logit is NaN"):
        evaluate(Answers(torch.tensor([[0.0, float("nan")]])), numbered_images([0]), SPEC)


# --- what a drop can be trusted for -----------------------------------------------------------------------------------


def compared(right: list[bool], teacher_right: list[bool], labels: list[int], num_classes: int = 10) -> Evaluation:
    """Evaluate a model and a teacher that are right on these images and one class off on the others."""
    answers = [
        [label if is_right else (label + 1) % num_classes for label, is_right in zip(labels, flags, strict=True)]
        for flags in (right, teacher_right)
    ]
    model, teacher = (Answers(one_hot(each, num_classes)) for each in answers)
    return evaluate(model, numbered_images(labels), SPEC, teacher=teacher)


def test_ten_images_without_a_difference_do_not_prove_that_nothing_is_lost() -> None:
    few = compared([True] * 10, [True] * 10, list(range(10)))
    many = compared([True] * 1000, [True] * 1000, list(range(10)) * 100)
    assert few.teacher_top1 == few.top1 == 100
    assert few.drop_low < -10 < 10 < few.drop_high
    assert -1 < many.drop_low < 0 < many.drop_high < 1


def test_the_interval_of_the_drop_is_that_of_agresti_and_min() -> None:
    """Their method for matched proportions by hand: 12 images lost and 3 won of 100; half an image in each cell."""
    lost, won, total = 12.5, 3.5, 102
    error = np.sqrt(((lost + won) - (lost - won) ** 2 / total) / total**2)
    expected = 100 * ((lost - won) / total + np.array([-1.645, 1.645]) * error)
    assert paired_interval(12, 3, 100) == pytest.approx(tuple(expected))


@pytest.mark.parametrize("seed", range(3))
def test_a_teacher_that_guesses_is_warned_of_whatever_the_model_answers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, 500).tolist()
    found = compared([True] * 500, (rng.random(500) < 0.1).tolist(), labels)
    (warning,) = found.warnings
    assert re.match(r"data: the full-precision model gets \d+\.\d % of these 500 images right, and guessing", warning)


def test_a_teacher_that_always_says_the_commonest_class_is_guessing() -> None:
    labels = [0] * 90 + [1] * 10
    found = compared([label == 0 for label in labels], [label == 0 for label in labels], labels, num_classes=2)
    assert found.teacher_top1 == 90
    assert len(found.warnings) == 1


@pytest.mark.parametrize(("share", "num_classes"), [(0.3, 10), (0.75, 2), (0.1, 1000)])
def test_a_teacher_that_knows_the_images_is_not_warned_of(share: float, num_classes: int) -> None:
    labels = (np.arange(400) % num_classes).tolist()
    right = [index < 400 * share for index in np.random.default_rng(0).permutation(400)]
    assert compared(right, right, labels, num_classes).warnings == ()


def test_images_of_one_class_alone_can_be_evaluated() -> None:
    assert compared([True] * 20, [True] * 20, [3] * 20).warnings == ()
    assert len(compared([False] * 20, [False] * 20, [3] * 20).warnings) == 1


def test_images_whose_channels_come_first_are_refused() -> None:
    spec = InputSpec(shape=(1, 8, 8), mean=(0.0,), std=(1.0,))
    data = LabelledImages(np.zeros((2, 1, 8, 8), np.uint8), np.zeros(2, np.int64))
    with pytest.raises(
        ConfigError, match=r"shape \(1, 8, 8\) \(height, width, channel\), but the model takes 1 channels"
    ):
        evaluate(lambda images: images.flatten(1), data, spec)
