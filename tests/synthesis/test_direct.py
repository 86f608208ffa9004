import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from qimera.config.input_spec import InputSpec
from qimera.config.settings import DirectSettings
from qimera.errors import DivergenceError
from qimera.synthesis.direct import is_step_compiled, noise_images, optimize_images
from qimera.synthesis.losses import bns_loss, total_variation
from qimera.synthesis.pixels import sum_of_scales
from qimera.teacher.teacher import Teacher
from tests.networks import NUM_CLASSES, SPEC

PLAIN = {"num_scales": 1, "max_shift": 0, "flip": False, "precision": "float32"}
"""Every digit, and neither coarser resolutions nor augmentation: the pixels themselves take Adam's steps."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start_images(count: int = 12, seed: int = 0) -> Tensor:
    return 0.4 * torch.randn(count, *SPEC.shape, generator=seeded(seed))


def labels(count: int = 12) -> Tensor:
    """Return soft labels of two neighbouring classes, 0.7 and 0.3."""
    one_hot = torch.eye(NUM_CLASSES).repeat(count, 1)[:count]
    return 0.7 * one_hot + 0.3 * one_hot.roll(1, 1)


def optimized(teacher: Teacher, seed: int = 0, soft_label: Tensor | None = None, **values: object) -> Tensor:
    soft_label = labels() if soft_label is None else soft_label
    return optimize_images(start_images(len(soft_label)), soft_label, teacher, DirectSettings(**values), seeded(seed))


# --- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ce_weight", "bns_weight", "tv_weight"), [(0.1, 5.0, 0.01), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]
)
def test_the_first_step_goes_against_the_gradient_of_the_three_terms(
    teacher: Teacher, ce_weight: float, bns_weight: float, tv_weight: float
) -> None:
    """Adam's first step is the rate times g / (|g| + 1e-8); the loss is written out again here."""
    images = start_images().requires_grad_()
    logits, (entering, *_) = teacher.forward_with_taps(images)
    loss = -ce_weight * (labels() * logits.log_softmax(1)).sum(1).mean()
    for x, recorded in zip(entering, teacher.batch_norms, strict=True):
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        gap = (mean - recorded.mean) ** 2 + (var.sqrt() - recorded.var.sqrt()) ** 2
        loss = loss + bns_weight * (gap / (var + recorded.var)).mean() / len(entering)
    across = (images[..., 1:] - images[..., :-1]).abs().mean()
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
    loss = loss + tv_weight * (across + down)
    (gradient,) = torch.autograd.grad(loss, images)

    weights = {"ce_weight": ce_weight, "bns_weight": bns_weight, "tv_weight": tv_weight}
    moved = optimized(teacher, num_steps=1, learning_rate=0.01, **weights, **PLAIN) - start_images()
    inside = (start_images() > SPEC.low + 0.02) & (start_images() < SPEC.high - 0.02)
    assert float(inside.float().mean()) > 0.9
    expected = -0.01 * gradient / (gradient.abs() + 1e-8)
    # gradients as small as Adam's constant come out of another order of summation a little different
    assert float(((moved - expected).abs() < 1e-4)[inside].float().mean()) > 0.99


def test_the_images_come_to_show_the_shares_of_their_soft_labels(teacher: Teacher) -> None:
    weights = {"ce_weight": 1.0, "bns_weight": 0.0, "tv_weight": 0.0}
    images = optimized(teacher, num_steps=80, learning_rate=0.05, **weights, **PLAIN)
    with torch.no_grad():
        probability = teacher(images).softmax(1)
    # what 80 steps leave, out of a start at about one half
    assert float((probability - labels()).abs().mean()) < 0.03


def test_the_images_come_to_have_the_recorded_statistics(teacher: Teacher) -> None:
    weights = {"ce_weight": 0.0, "bns_weight": 1.0, "tv_weight": 0.0}
    images = optimized(teacher, num_steps=40, **weights, **PLAIN)
    with torch.no_grad():
        before = bns_loss(teacher.forward_with_taps(start_images())[1].batch_norms, teacher.batch_norms, relative=True)
        after = bns_loss(teacher.forward_with_taps(images)[1].batch_norms, teacher.batch_norms, relative=True)
    assert float(after) < 0.2 * float(before)


def test_total_variation_makes_the_images_smooth(teacher: Teacher) -> None:
    weights = {"ce_weight": 0.0, "bns_weight": 0.0, "tv_weight": 1.0}
    images = optimized(teacher, num_steps=20, **weights, **PLAIN)
    assert float(total_variation(images)) < 0.7 * float(total_variation(start_images()))


def test_the_rate_falls_along_a_cosine(teacher: Teacher) -> None:
    """The label's gradient hardly turns in a few small steps, so each pixel moves by the rate."""
    weights = {"ce_weight": 1.0, "bns_weight": 0.0, "tv_weight": 0.0, "learning_rate": 1e-4}
    moved = (optimized(teacher, num_steps=10, **weights, **PLAIN) - start_images()).abs()
    expected = sum(1e-4 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 10))) for step in range(10))
    torch.testing.assert_close(moved.quantile(0.5), torch.as_tensor(expected), rtol=0.05, atol=0)  # hardly turns


# --- what holds whatever the settings ---------------------------------------------------------------------------------


@given(
    num_steps=st.integers(1, 3),
    learning_rate=st.sampled_from([0.01, 1.0, 10.0]),
    max_shift=st.integers(0, 4),
    flip=st.booleans(),
    num_scales=st.integers(1, 4),
    seed=st.integers(0, 100),
)
def test_every_pixel_is_valid_after_any_number_of_steps(
    teacher: Teacher, num_steps: int, learning_rate: float, max_shift: int, flip: bool, num_scales: int, seed: int
) -> None:
    direct = DirectSettings(
        num_steps=num_steps, learning_rate=learning_rate, max_shift=max_shift, flip=flip, num_scales=num_scales
    )
    start = 3 * torch.randn(4, *SPEC.shape, generator=seeded(seed))
    images = optimize_images(start, labels(4), teacher, direct, seeded(seed))
    assert images.shape == start.shape
    assert bool((images >= SPEC.low).all())
    assert bool((images <= SPEC.high).all())
    assert not images.requires_grad


def test_the_start_is_left_alone(teacher: Teacher) -> None:
    start = start_images()
    optimize_images(start, labels(), teacher, DirectSettings(num_steps=2), seeded(0))
    assert torch.equal(start, start_images())


def test_no_gradient_reaches_the_teacher(teacher: Teacher) -> None:
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    optimized(teacher, num_steps=2)
    assert all(not each.requires_grad and each.grad is None for each in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_same_seed_same_images_and_another_seed_others(teacher: Teacher) -> None:
    one, two, other = (optimized(teacher, seed, num_steps=3) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("augmentation", [{"max_shift": 2}, {"flip": True}])
def test_augmentation_changes_what_the_teacher_sees(teacher: Teacher, augmentation: dict[str, object]) -> None:
    plain = optimized(teacher, num_steps=3, **PLAIN)
    assert not torch.equal(plain, optimized(teacher, num_steps=3, **{**PLAIN, **augmentation}))


def test_every_step_is_reported_with_its_three_terms(teacher: Teacher) -> None:
    reports: list[tuple[int, dict[str, Tensor]]] = []
    optimize_images(
        start_images(),
        labels(),
        teacher,
        DirectSettings(num_steps=3, **PLAIN),
        seeded(0),
        lambda step, losses: reports.append((step, losses)),
    )
    assert [step for step, _ in reports] == [1, 2, 3]
    first = reports[0][1]
    assert list(first) == ["direct_ce", "direct_bns", "direct_tv"]
    with torch.no_grad():
        logits, (entering, *_) = teacher.forward_with_taps(start_images().clamp(SPEC.low, SPEC.high))
    assert float(first["direct_ce"]) == pytest.approx(float(F.cross_entropy(logits, labels())), rel=1e-4)  # layout
    expected = float(bns_loss(entering, teacher.batch_norms, relative=True))
    assert float(first["direct_bns"]) == pytest.approx(expected, rel=1e-4)  # layout


def test_a_diverging_image_stops_with_the_name_of_the_term(teacher: Teacher) -> None:
    start = start_images()
    start[0] = float("nan")
    with pytest.raises(DivergenceError, match="direct_ce became nan at step 1"):
        optimize_images(start, labels(), teacher, DirectSettings(num_steps=2), seeded(0))


# --- the noise that images start from ---------------------------------------------------------------------------------


@given(
    channels=st.integers(1, 4),
    height=st.integers(8, 40),
    width=st.integers(8, 40),
    num_scales=st.integers(1, 7),
    seed=st.integers(0, 100),
)
def test_noise_has_half_the_variance_of_normalised_images(
    channels: int, height: int, width: int, num_scales: int, seed: int
) -> None:
    images = noise_images(4, (channels, height, width), num_scales, seeded(seed))
    assert images.shape == (4, channels, height, width)
    assert float(images.std()) == pytest.approx(0.5**0.5, rel=1e-4)
    assert torch.equal(images, noise_images(4, (channels, height, width), num_scales, seeded(seed)))


def test_noise_of_several_scales_is_smoother() -> None:
    rough, smooth = (noise_images(16, (3, 32, 32), scales, seeded(0)) for scales in (1, 4))
    assert float(total_variation(smooth)) < 0.5 * float(total_variation(rough))


# --- scales -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(100, 97), (13, 9)])
def test_the_sum_of_scales_is_that_of_each_image_enlarged(size: tuple[int, int]) -> None:
    """Large images are enlarged by products of matrices, small ones one by one."""
    height, width = size
    shapes = [(-(-height // 2**level), -(-width // 2**level)) for level in range(4)]
    scales = [torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0)) for shape in shapes]
    expected = sum(F.interpolate(each, size=size, mode="bilinear") for each in scales)
    torch.testing.assert_close(sum_of_scales(scales), expected, rtol=1e-5, atol=1e-5)  # sums in another order
    assert sum_of_scales(scales[:1]) is scales[0]


@pytest.mark.parametrize(
    ("side", "norm", "few", "many"),
    [(16, nn.BatchNorm2d(3), 300, 800), (16, nn.Identity(), 800, 2000), (224, nn.BatchNorm2d(3), 40, 320)],
    ids=["small", "without batch norms", "large"],
)
def test_many_steps_are_compiled_and_more_where_it_saves_less(side: int, norm: nn.Module, few: int, many: int) -> None:
    spec = InputSpec(shape=(3, side, side), mean=(0.5,) * 3, std=(0.25,) * 3)
    teacher = Teacher.capture(nn.Sequential(norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)), spec)
    compiled = [is_step_compiled(DirectSettings(), num_steps, 128, teacher) for num_steps in (few, many)]
    assert compiled == [False, True]
