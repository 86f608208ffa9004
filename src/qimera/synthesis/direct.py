"""Images optimised directly: pixels that the teacher gives the wanted soft label and batch-norm statistics."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from qimera.config.settings import DirectSettings
from qimera.machine.acceleration import autocast, begin_step, compiled, is_compiled
from qimera.machine.checkpoint import Checkpoint, State
from qimera.machine.divergence import check_finite
from qimera.synthesis.augmentation import flip_at_random, shift_batch
from qimera.synthesis.losses import realism_terms, soft_cross_entropy, total_of, total_variation
from qimera.synthesis.pixels import sum_of_scales, within_limits
from qimera.teacher.teacher import Teacher

COLOUR = 0.3
"""Strength of the noise that each channel has of its own, beside what all channels share."""


_LARGE_PIXELS_THAT_PAY = 300_000_000
"""Pixels of all steps together from which compiling pays for large images, whose plain step is nearly as fast.

One thread of a busy machine: MobileNetV1's is compiled in 28 s of CPU time and saves 0.09 us a pixel."""

_PIXELS_THAT_PAY_WITHOUT_BATCH_NORMS = 45_000_000
"""The same for networks of matrix products, which have little to fuse: CCT-4's is compiled in 22 s and saves 0.5 us."""


def is_step_compiled(settings: DirectSettings, num_steps: int, num_images: int, teacher: Teacher) -> bool:
    """Return whether ``num_steps`` steps of ``num_images`` images are compiled."""
    spec = teacher.input_spec
    pixels = num_images * spec.shape[1] * spec.shape[2]
    paying = {}
    if spec.has_large_images:
        paying = {"pixels_that_pay": _LARGE_PIXELS_THAT_PAY}
    elif not teacher.batch_norms:
        paying = {"pixels_that_pay": _PIXELS_THAT_PAY_WITHOUT_BATCH_NORMS}
    return is_compiled(settings.compile, num_steps, pixels, teacher.device, **paying)


def optimize_images(
    start: Float[Tensor, "batch channel height width"],
    soft_label: Float[Tensor, "batch num_classes"],
    teacher: Teacher,
    settings: DirectSettings,
    rng: torch.Generator,
    report: Callable[[int, dict[str, Tensor]], None] = lambda step, losses: None,
    num_calls: int = 0,
    checkpoint: Checkpoint | None = None,
) -> Float[Tensor, "batch channel height width"]:
    """Return ``start`` after ``settings.num_steps`` Adam steps, every pixel within the valid range.

    ZeroQ (Cai et al. 2020) with labels, superposed ones too; in every step the batch is shifted and mirrored at
    random, so that no sample depends on the teacher's grid.

    Args:
        start: Normalised images.
        soft_label: What the teacher should answer.
        teacher: Whose answers and statistics count.
        settings: Steps, rates and weights.
        rng: Draws shifts and mirrors.
        report: Called after every step.
        num_calls: Steps of all batches of this size together, by which compiling is decided; 0 if this is the only one.
        checkpoint: Keeps the state between steps; from one of the same call the steps go on.

    Raises:
        DivergenceError: a term is NaN or infinite.
    """
    low, high = teacher.input_spec.low.to(start.device), teacher.input_spec.high.to(start.device)
    scales = _scales(start, settings.num_scales)
    optimizer = torch.optim.Adam(scales, settings.learning_rate, betas=(0.5, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.num_steps)
    wanted = is_step_compiled(settings, num_calls or settings.num_steps, len(start), teacher)
    judge = compiled(_losses, wanted, start.device)
    checkpoint = checkpoint or Checkpoint()
    done = _restore_(scales, optimizer, schedule, rng, checkpoint.load())
    with checkpoint.guarding():
        for step in range(done + 1, settings.num_steps + 1):
            begin_step(start.device)
            images = _compose(scales, low, high)
            seen = flip_at_random(images, rng) if settings.flip else images
            seen = shift_batch(seen, settings.max_shift, rng) if settings.max_shift else seen
            loss, losses = judge(seen, soft_label, teacher, settings)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            report(step, check_finite(losses, step, settings.num_steps))
            checkpoint.after_step(partial(_state, step, scales, optimizer, schedule, rng))
    return _compose(scales, low, high).detach()


def _state(
    step: int,
    scales: list[Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    rng: torch.Generator,
) -> State:
    return {
        "step": step,
        "scales": scales,
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "generator": rng.get_state(),
    }


@torch.no_grad()
def _restore_(
    scales: list[Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    rng: torch.Generator,
    state: State,
) -> int:
    """Bring all of them to ``state``; return the steps that were done by then."""
    if not state:
        return 0
    for scale, kept in zip(scales, state["scales"], strict=True):
        scale.copy_(kept)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    rng.set_state(state["generator"])
    return int(state["step"])


def _losses(
    images: Tensor, soft_label: Tensor, teacher: Teacher, settings: DirectSettings
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of all terms, and each of them without its weight or gradient."""
    with autocast(settings.precision, images.device):
        logits, taps = teacher.forward_with_taps(images)
    terms = {"direct_ce": (settings.ce_weight, soft_cross_entropy(logits.float(), soft_label))}
    terms |= realism_terms("direct", taps, teacher, settings, relative=True)
    terms["direct_tv"] = (settings.tv_weight, total_variation(images))
    return total_of(terms)


def noise_images(
    num_images: int, shape: tuple[int, int, int], num_scales: int, rng: torch.Generator
) -> Float[Tensor, "batch channel height width"]:
    """Return Gaussian noise of half the variance of normalised images.

    With several scales each coarser octave is twice as strong, and channels share most of it, as in photographs.
    """
    channels, height, width = shape
    images = torch.zeros(num_images, *shape)
    for level, size in enumerate(_sizes(height, width, num_scales)):
        noise = torch.randn(num_images, channels, *size, generator=rng)
        if num_scales > 1:
            noise = COLOUR * noise + torch.randn(num_images, 1, *size, generator=rng)
        images += 2.0**level * F.interpolate(noise, size=(height, width), mode="bilinear")
    return images.mul_(0.5**0.5 / float(images.std()))


def _sizes(height: int, width: int, num_scales: int) -> list[tuple[int, int]]:
    """Return the resolutions, each half of the one before, down to one pixel."""
    return [(-(-height // 2**level), -(-width // 2**level)) for level in range(num_scales)]


def _scales(start: Tensor, num_scales: int) -> list[Tensor]:
    """Return the image itself and corrections at halved resolutions, all zero, whose sum is ``start``."""
    batch, channels, height, width = start.shape
    coarse = [start.new_zeros(batch, channels, *size) for size in _sizes(height, width, num_scales)[1:]]
    return [each.requires_grad_(True) for each in (start.detach().clone(), *coarse)]


def _compose(scales: list[Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Return the images that the scales add up to, within the valid range."""
    return within_limits(sum_of_scales(scales), low, high).contiguous(memory_format=torch.channels_last)
