"""A bank in parts: each from a seed of its own, so that parts may be made anywhere, in any order, and one by one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qimera.config.settings import SynthesisSettings
from qimera.machine.checkpoint import Checkpoint
from qimera.synthesis.direct import noise_images, optimize_images
from qimera.synthesis.superposition import draw_mixtures, soft_labels, take_turns
from qimera.synthesis.synthesizer import Synthesizer
from qimera.teacher.teacher import Teacher

ReportStep = Callable[[int, dict[str, Tensor]], None]
"""Told the step that is done, and its losses."""


@dataclass(frozen=True)
class Part:
    """Samples that are made together."""

    number: int
    first: Int[Tensor, " sample"]
    """The first class of each."""
    is_optimized: bool
    """Whether they are optimised directly, or drawn from the generator."""
    num_alike: int
    """Parts of the bank that are as large and made in the same way."""


def parts_of(settings: SynthesisSettings, num_classes: int, rng: torch.Generator) -> list[Part]:
    """Return the parts of a bank, generated samples first, classes taking turns through all of them (deviation D8).

    Held-out samples are made as the samples before them, in parts of their own, so that those before do not depend on
    how many there are.
    """
    drawn = _sizes(settings.num_generated, settings.generator.batch_size)
    optimized = _sizes(settings.num_optimized, settings.direct.batch_size)
    if _holds_out_optimized(settings):
        optimized += _sizes(settings.num_held_out, settings.direct.batch_size)
    else:
        drawn += _sizes(settings.num_held_out, settings.generator.batch_size)
    kinds = [(size, False) for size in drawn] + [(size, True) for size in optimized]
    if not kinds:
        return []
    turns = take_turns(sum(size for size, _ in kinds), num_classes, rng).split([size for size, _ in kinds])
    return [
        Part(number, first, kind[1], kinds.count(kind))
        for number, (first, kind) in enumerate(zip(turns, kinds, strict=True))
    ]


def optimizes(settings: SynthesisSettings) -> bool:
    """Return whether any sample is optimised directly."""
    return settings.num_optimized > 0 or (settings.num_held_out > 0 and _holds_out_optimized(settings))


def needs_generator(settings: SynthesisSettings) -> bool:
    """Return whether any sample is drawn from the generator, or starts as one that is."""
    return settings.num_generated > 0 or (settings.direct.start == "generator" and optimizes(settings))


def _holds_out_optimized(settings: SynthesisSettings) -> bool:
    return settings.num_optimized > 0 or settings.num_generated == 0


def _sizes(total: int, size: int) -> list[int]:
    """Return the sizes of the parts of at most ``size`` that ``total`` splits into, which differ by one at most.

    No part is a single sample, unless ``total`` is 1 or ``size`` is 2.
    """
    count = -(-total // size)
    return [total // count + (index < total % count) for index in range(count)]


def make_part(
    part: Part,
    teacher: Teacher,
    settings: SynthesisSettings,
    synthesizer: Synthesizer | None,
    rng: torch.Generator,
    report: ReportStep,
    checkpoint: Checkpoint,
) -> tuple[Float[Tensor, "sample channel height width"], Float[Tensor, "sample num_classes"]]:
    """Return normalised images and their soft labels.

    Args:
        part: What to make.
        teacher: Whose answers and statistics count.
        settings: Of the bank.
        synthesizer: Draws samples, or what they start from, where the settings say so.
        rng: Of this part alone.
        report: Called after every step of optimised samples.
        checkpoint: Of this part alone.
    """
    direct = settings.direct
    if synthesizer is not None and (not part.is_optimized or direct.start == "generator"):
        with torch.no_grad():
            images, soft_label = synthesizer(synthesizer.draw(len(part.first), rng, part.first))
    else:
        label, weight = draw_mixtures(part.first, teacher.num_classes, settings.labels, rng)
        soft_label = soft_labels(label, weight, teacher.num_classes)
        images = noise_images(len(part.first), teacher.input_spec.shape, direct.num_scales, rng)
    if part.is_optimized:
        num_calls = part.num_alike * direct.num_steps
        images, soft_label = images.to(teacher.device), soft_label.to(teacher.device)
        images = optimize_images(images, soft_label, teacher, direct, rng, report, num_calls, checkpoint)
    return images.cpu(), soft_label.cpu()
