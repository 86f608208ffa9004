import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from qimera.synthesis.augmentation import blend_at_random, flip_at_random, shift_batch, shift_each

SEEDS = st.integers(0, 1000)
SIZES = st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(5, 9), st.integers(5, 9))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images_of(size: tuple[int, int, int, int]) -> Tensor:
    """Return images whose pixels all differ."""
    return torch.arange(torch.Size(size).numel(), dtype=torch.float32).view(size)


def mirrored_index(position: int, size: int) -> int:
    """Position inside of an image for one outside of it, mirrored at the border without repeating it."""
    return -position if position < 0 else 2 * (size - 1) - position if position >= size else position


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    """Move an image pixel by pixel."""
    _, height, width = image.shape
    rows = [mirrored_index(row + down, height) for row in range(height)]
    columns = [mirrored_index(column + right, width) for column in range(width)]
    return torch.stack([torch.stack([image[:, row, column] for column in columns], 1) for row in rows], 1)


def all_shifts(image: Tensor, max_shift: int) -> dict[tuple[int, int], Tensor]:
    reach = range(-max_shift, max_shift + 1)
    return {(down, right): shifted(image, down, right) for down in reach for right in reach}


def found_shift(before: Tensor, after: Tensor, max_shift: int) -> tuple[int, int]:
    (found,) = [offset for offset, image in all_shifts(before, max_shift).items() if torch.equal(image, after)]
    return found


@given(size=SIZES, seed=SEEDS)
def test_a_flip_mirrors_left_to_right_or_leaves_the_image_alone(size: tuple[int, int, int, int], seed: int) -> None:
    images = images_of(size)
    for before, after in zip(images, flip_at_random(images, seeded(seed)), strict=True):
        assert torch.equal(after, before) or torch.equal(after, before[:, :, range(size[3] - 1, -1, -1)])


def test_about_half_of_the_images_are_flipped() -> None:
    images = images_of((1000, 1, 1, 2))
    changed = (flip_at_random(images, seeded(0)) != images).any(3).float().mean()
    assert float(changed) == pytest.approx(0.5, abs=0.08)  # five standard deviations


@given(size=SIZES, seed=SEEDS, max_shift=st.integers(0, 2))
def test_a_batch_moves_as_one(size: tuple[int, int, int, int], seed: int, max_shift: int) -> None:
    images = images_of(size)
    moved = shift_batch(images, max_shift, seeded(seed))
    assert len({found_shift(a, b, max_shift) for a, b in zip(images, moved, strict=True)}) == 1


@given(size=SIZES, seed=SEEDS, max_shift=st.integers(0, 2))
def test_each_image_moves_within_the_reach(size: tuple[int, int, int, int], seed: int, max_shift: int) -> None:
    images = images_of(size)
    moved = shift_each(images, max_shift, seeded(seed))
    assert moved.shape == images.shape
    for before, after in zip(images, moved, strict=True):
        found_shift(before, after, max_shift)


def test_all_offsets_occur_and_images_move_apart() -> None:
    images = images_of((200, 1, 5, 5))
    moved = shift_each(images, 1, seeded(0))
    found = {found_shift(a, b, 1) for a, b in zip(images, moved, strict=True)}
    assert len(found) == 9
    assert len({found_shift(images[0], shift_batch(images[:1], 1, seeded(s))[0], 1) for s in range(200)}) == 9


@pytest.mark.parametrize(
    "augment", [flip_at_random, lambda x, g: shift_each(x, 2, g), lambda x, g: shift_batch(x, 2, g)]
)
def test_the_generator_alone_decides(augment) -> None:  # type: ignore[no-untyped-def]
    images = images_of((8, 1, 6, 6))
    torch.manual_seed(0)
    first = augment(images, seeded(3))
    torch.manual_seed(1)
    assert torch.equal(augment(images, seeded(3)), first)
    assert any(not torch.equal(augment(images, seeded(seed)), first) for seed in range(10))
    assert torch.equal(images, images_of((8, 1, 6, 6)))


def test_the_gradient_of_a_shift_returns_to_the_pixels_it_came_from() -> None:
    images = images_of((2, 1, 6, 6)).requires_grad_()
    shift_batch(images, 2, seeded(0)).sum().backward()
    assert images.grad is not None
    assert float(images.grad.sum()) == 72


# --- blending ---------------------------------------------------------------------------------------------------------


def blended(count: int, probability: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Blend images whose every pixel is their number; their soft labels are one class per image."""
    images = torch.arange(float(count))[:, None, None, None].expand(count, 2, 3, 3)
    return blend_at_random(images, torch.eye(count), probability, seeded(seed))


@given(seed=SEEDS, half=st.integers(1, 6))
def test_image_and_label_are_blended_in_the_same_shares(seed: int, half: int) -> None:
    count = 2 * half
    images, labels = blended(count, 1.0, seed)
    torch.testing.assert_close(labels.sum(1), torch.ones(count))
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        assert bool((image == image[0, 0, 0]).all())
        assert float(label[number]) >= 0.5
        # rounding of the interpolation
        assert float(image[0, 0, 0]) == pytest.approx(float(label @ torch.arange(float(count))), abs=1e-5)


def test_with_probability_zero_nothing_is_blended() -> None:
    images, labels = blended(50, 0.0)
    assert torch.equal(images[:, 0, 0, 0], torch.arange(50.0))
    assert torch.equal(labels, torch.eye(50))


def test_the_share_of_blended_images_is_the_probability() -> None:
    _, labels = blended(4000, 0.3)
    assert float((labels.amax(1) < 1).float().mean()) == pytest.approx(0.3, abs=0.037)  # five standard deviations
