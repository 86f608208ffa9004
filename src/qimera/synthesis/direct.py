"""Images optimised directly: pixels that the teacher gives the wanted soft label and batch-norm statistics."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from qimera.settings import DirectSettings
from qimera.synthesis.augmentation import flip_at_random, shift_batch
from qimera.synthesis.losses import bns_loss, soft_cross_entropy, total_variation
from qimera.synthesis.synthesizer import check_finite
from qimera.teacher import Teacher


def optimize_images(
    start: Float[Tensor, "batch channel height width"],
    soft_label: Float[Tensor, "batch num_classes"],
    teacher: Teacher,
    settings: DirectSettings,
    generator: torch.Generator,
    report: Callable[[int, dict[str, Tensor]], None] = lambda step, losses: None,
) -> Float[Tensor, "batch channel height width"]:
    """Return ``start`` after ``settings.num_steps`` Adam steps, every pixel within the valid range.

    ZeroQ (Cai et al. 2020) with labels, superposed ones too; in every step the batch is shifted and mirrored at
    random, so that no sample depends on the teacher's grid.

    Raises:
        DivergenceError: a term is NaN or infinite.
    """
    low, high = teacher.input_spec.low.to(start.device), teacher.input_spec.high.to(start.device)
    images = start.detach().clone(memory_format=torch.channels_last).requires_grad_(True)
    optimizer = torch.optim.Adam([images], settings.learning_rate, betas=(0.5, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.num_steps)
    for step in range(settings.num_steps):
        seen = flip_at_random(images, generator) if settings.flip else images
        seen = shift_batch(seen, settings.max_shift, generator) if settings.max_shift else seen
        logits, entering = teacher.forward_with_taps(seen)
        losses = {
            "direct_ce": soft_cross_entropy(logits, soft_label),
            "direct_bns": bns_loss(entering, teacher.batch_norms, relative=True),
            "direct_tv": total_variation(seen),
        }
        weights = (settings.ce_weight, settings.bns_weight, settings.tv_weight)
        loss = sum((weight * term for weight, term in zip(weights, losses.values(), strict=True)), torch.zeros(()))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            images.copy_(torch.minimum(torch.maximum(images, low), high))
        report(step + 1, check_finite({name: term.detach() for name, term in losses.items()}, step + 1))
    return images.detach()
