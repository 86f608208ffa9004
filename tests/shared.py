"""What many tests of one process share, made once: teachers and students of ``NETWORKS``. None of it may change.

``fixtures.py`` checks after every file that nothing has.
"""

import copy
import hashlib
from collections.abc import Mapping
from functools import cache

import pytest
import torch
from torch import Tensor

from qimera.config.bits import parse_bits
from qimera.config.input_spec import InputSpec
from qimera.config.settings import QuantizationSettings
from qimera.quantization import scheme
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank
from qimera.teacher.teacher import Teacher
from tests.networks import SPEC, random_network

_kept: dict[str, tuple[Mapping[str, Tensor], dict[str, Tensor]]] = {}

_fitted: dict[tuple[str, InputSpec, bytes, QuantizationSettings], Student] = {}


def keep(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Remember what tensors are now; ``changed`` names those that are something else later."""
    _kept[name] = tensors, {key: value.detach().clone() for key, value in tensors.items()}


def changed() -> list[str]:
    """Return the names of tensors that have changed since they were shared."""
    return [
        f"{name}: {key}"
        for name, (now, before) in _kept.items()
        for key, value in before.items()
        if not torch.equal(now[key], value)
    ]


def tensors_of(shared: Teacher | SampleBank) -> dict[str, Tensor]:
    """Return every tensor of a teacher, statistics and classifier too, or of a bank and its generator."""
    if isinstance(shared, SampleBank):
        own = {name: getattr(shared, name) for name in ("pixels", "soft_labels", "logits")}
        return {**own, **({} if shared.synthesizer is None else shared.synthesizer.state_dict())}
    statistics = {f"{tap.name}.{key}": getattr(tap, key) for tap in shared.batch_norms for key in ("mean", "var")}
    return {**shared.state_dict(), **statistics, "classifier": shared.classifier.weight}


@cache
def teacher_of(name: str) -> Teacher:
    """Return the teacher of one of ``NETWORKS`` with random weights."""
    teacher = Teacher.capture(random_network(name), SPEC)
    keep(f"teacher of {name}", tensors_of(teacher))
    return teacher


def noise(count: int = 16) -> Tensor:
    """Return images that the ranges of students are fitted to."""
    return torch.randn(count, *SPEC.shape, generator=torch.Generator().manual_seed(0))


def student_of(name: str, bits: str = "w4a4", scheme: str = "hardware") -> Student:
    """Return a student of one of ``NETWORKS``, its ranges fitted to ``noise``."""
    weight_bits, activation_bits = parse_bits(bits)
    settings = QuantizationSettings(weight_bits=weight_bits, activation_bits=activation_bits, scheme=scheme)
    return fitted(teacher_of(name), noise(), settings)


def fitted(teacher: Teacher, images: Tensor, settings: QuantizationSettings) -> Student:
    """Return a student whose ranges are fitted to these images: a copy, which a test may change."""
    seen = hashlib.sha256(images.contiguous().numpy().tobytes()).digest()
    key = teacher.hash, teacher.input_spec, seen, settings
    if key not in _fitted:
        student = Student(teacher, settings)
        student.initialize_ranges_([images])
        _fitted[key] = student
    return copy.deepcopy(_fitted[key])


def student_with_minus_128(teacher: Teacher, patch: pytest.MonkeyPatch) -> Student:
    """Return a student with weights of -128, as there were before their grid ended at -127."""
    patch.setattr(scheme, "weight_range", lambda bits: (-128, 127))
    student = Student(teacher, QuantizationSettings())
    student.initialize_ranges_([noise()])
    weight, step = student.weight_steps()[0]
    weight.data[0] = -128 * step[0]
    return student
