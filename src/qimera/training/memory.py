"""Picks batch sizes that fit into memory, by simulating the allocations of one step."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qimera.config.settings import DirectSettings, DistillationSettings, GeneratorSettings, SynthesisSettings
from qimera.student.student import Student
from qimera.synthesis.parts import optimizes
from qimera.synthesis.synthesizer import Synthesizer
from qimera.teacher.teacher import Teacher

logger = logging.getLogger(__name__)

_GIB = 2**30
_FEWEST = 2
"""Fewest images of a batch: a single one has no variance."""

_KEPT_BY_STUDENT = 2
"""Its quantizers keep as much again as they write."""

_S = TypeVar("_S", DirectSettings, GeneratorSettings, DistillationSettings)


def images_in_memory(settings: SynthesisSettings, teacher: Teacher) -> SynthesisSettings:
    """Return the settings with batches of optimised images that fit into ``memory_gib``."""
    if not optimizes(settings):
        return settings
    written = _written_for_images(teacher)
    direct = _fitting(settings.direct, "direct.batch_size", written, settings.memory_gib)
    return settings.model_copy(update={"direct": direct})


def draws_in_memory(settings: SynthesisSettings, teacher: Teacher, synthesizer: Synthesizer) -> SynthesisSettings:
    """Return the settings with batches of the generator's training that fit into ``memory_gib``."""
    written = _written_for_draws(teacher, synthesizer)
    generator = _fitting(settings.generator, "generator.batch_size", written, settings.memory_gib)
    return settings.model_copy(update={"generator": generator})


def lessons_in_memory(settings: DistillationSettings, student: Student) -> DistillationSettings:
    """Return the settings with batches of the student's training that fit into ``memory_gib``."""
    if not settings.num_steps:
        return settings
    written = _written_for_lessons(student)
    return _fitting(settings, "batch_size", _KEPT_BY_STUDENT * written, settings.memory_gib)


def _written_for_images(teacher: Teacher) -> int:
    return written_bytes(lambda: teacher.forward_with_taps(_few_images(teacher)))


def _written_for_draws(teacher: Teacher, synthesizer: Synthesizer) -> int:
    drawn = synthesizer.draw(_FEWEST, torch.Generator().manual_seed(0))
    synthesizer.eval()  # else its batch norms would count this batch
    return written_bytes(lambda: (synthesizer(drawn), teacher.forward_with_taps(_few_images(teacher))))


def _written_for_lessons(student: Student) -> int:
    return written_bytes(lambda: student.module(_few_images(student)))


def _few_images(network: Teacher | Student) -> Tensor:
    return torch.zeros(_FEWEST, *network.input_spec.shape, device=network.device)


def _fitting(settings: _S, name: str, written: int, limit_gib: float) -> _S:
    """Return settings whose batch fits into the limit, given what ``_FEWEST`` images write; say so if it is smaller.

    A step keeps nearly all that its forward pass writes until the gradients are there: 0.7 to 0.9 of it for images that
    are optimised, and 1.2 to 1.7 times as much for a student (ResNet-20, MobileNetV1 and EfficientNet-Lite0, steps that
    are not compiled). Parameters, and what torch itself takes, come on top.
    """
    per_image = written / _FEWEST
    fitting = max(_FEWEST, int(limit_gib * _GIB / per_image))
    if fitting >= settings.batch_size:
        return settings
    asked, needed = settings.batch_size, settings.batch_size * per_image / _GIB
    logger.warning(
        f"{name}: {asked} images at a time would need about {needed:.1f} GiB, and memory_gib is {limit_gib:g}; "
        f"{fitting} at a time instead"
    )
    return settings.model_copy(update={"batch_size": fitting})


def written_bytes(run: Callable[[], object]) -> int:
    """Return the bytes that the operations of ``run`` write into new tensors; none of them is computed."""
    written = _Written()
    with FakeTensorMode(allow_non_fake_inputs=True), written:
        run()
    return written.num_bytes


class _Written(TorchDispatchMode):
    """Adds up the sizes of results that are neither views nor written in place."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        results = func(*args, **(kwargs or {}))
        if all(each.alias_info is None for each in func._schema.returns):
            tensors = [each for each in tree_leaves(results) if isinstance(each, Tensor)]
            self.num_bytes += sum(each.numel() * each.element_size() for each in tensors)
        return results
