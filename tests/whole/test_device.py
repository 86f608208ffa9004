"""Training elsewhere than on the CPU; "meta" stands for it, which computes nothing and refuses tensors of the CPU."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qimera.assessment.diagnostics import features_of
from qimera.config.settings import (
    DirectSettings,
    DistillationSettings,
    GeneratorSettings,
    QuantizationSettings,
    SynthesisSettings,
)
from qimera.errors import ConfigError
from qimera.machine.acceleration import find_device
from qimera.machine.seeds import Stream, generator_for
from qimera.mixed_precision.sensitivity import measure_sensitivity
from qimera.pipeline import quantize, synthesize
from qimera.student.student import Student
from qimera.synthesis import direct as direct_module, synthesizer as synthesizer_module
from qimera.synthesis.bank import SampleBank
from qimera.synthesis.direct import noise_images, optimize_images
from qimera.synthesis.synthesizer import Synthesizer, SynthesizerTraining
from qimera.teacher import teacher as teacher_module
from qimera.teacher.teacher import Teacher
from qimera.training import distillation as distillation_module
from qimera.training.distillation import Course, StepwiseAdam
from tests.command_line import qimera, said
from tests.networks import SPEC, TinyNet

OTHER = torch.device("meta")
SYNTHESIS = SynthesisSettings(
    num_generated=8,
    num_optimized=8,
    generator=GeneratorSettings(batch_size=8, num_steps=1),
    direct=DirectSettings(num_steps=2, batch_size=8, precision="float32", compile="never"),
)


class WithPositions(nn.Module):
    """A network that makes tensors of its own while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm(self.conv(x)))
        y = y + torch.arange(y.shape[3], dtype=torch.float32)
        return self.fc(y.mean((2, 3)))


@pytest.fixture(scope="module", params=[TinyNet, WithPositions])
def teacher(request: pytest.FixtureRequest) -> Teacher:
    torch.manual_seed(0)
    return Teacher.capture(request.param(), SPEC)


@pytest.fixture(scope="module")
def bank(teacher: Teacher) -> SampleBank:
    return synthesize(teacher, settings=SYNTHESIS)


@pytest.fixture(autouse=True)
def not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let steps do without what "meta" cannot: nothing is found infinite without numbers."""
    for module in (direct_module, synthesizer_module, distillation_module):
        monkeypatch.setattr(module, "check_finite", lambda losses, step, last: losses)
    for module in (direct_module, distillation_module):
        monkeypatch.setattr(module, "autocast", lambda precision, device: nullcontext())
    monkeypatch.setattr(distillation_module, "StepwiseAdam", partial(_unfused, distillation_module.StepwiseAdam))


def _unfused(kind: type[StepwiseAdam], groups: list[dict[str, Any]], units: list[Any]) -> StepwiseAdam:
    """Return an optimizer that "meta" has operations for; those of the CPU and of GPUs are fused."""
    return kind([group | {"fused": False} for group in groups], units)


def test_a_teacher_on_another_device_leaves_the_first_where_it_is(teacher: Teacher) -> None:
    other = teacher.on(OTHER)
    logits, (entering, *_) = other.forward_with_taps(torch.zeros(2, *SPEC.shape, device=OTHER))
    assert {each.device for each in (logits, *entering)} == {OTHER}
    assert {tensor.device for tap in other.batch_norms for tensor in (tap.mean, tap.var)} == {OTHER}
    assert (other.hash, other.device, teacher.device) == (teacher.hash, OTHER, torch.device("cpu"))
    assert teacher(torch.zeros(2, *SPEC.shape)).device == torch.device("cpu")
    assert teacher.on(torch.device("cpu")) is teacher


def test_what_moves_is_a_copy(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's numbers take the place of the CPU's in the same parameters; those of "meta" are new ones."""
    moved = []
    monkeypatch.setattr(teacher_module, "to_device_", lambda module, device: moved.append(module))
    teacher.on(OTHER)
    own, others = ({id(each) for each in (*m.parameters(), *m.buffers())} for m in (teacher.module, moved[0]))
    assert not own & others
    assert teacher.module.state_dict().keys() == moved[0].state_dict().keys()


def test_images_are_optimised_there(teacher: Teacher) -> None:
    rng = torch.Generator().manual_seed(0)
    start = noise_images(8, SPEC.shape, 3, rng).to(OTHER)
    label = torch.full((8, teacher.num_classes), 1 / teacher.num_classes, device=OTHER)
    direct = SYNTHESIS.direct.model_copy(update={"flip": True})
    assert optimize_images(start, label, teacher.on(OTHER), direct, rng).device == OTHER


@pytest.mark.parametrize("changes", [{}, {"conditional_norm_from": 2}, {"extracted_embeddings": False}])
def test_a_generator_is_trained_there_beside_a_student(teacher: Teacher, changes: dict[str, object]) -> None:
    settings = SYNTHESIS.model_copy(update={"generator": SYNTHESIS.generator.model_copy(update=changes)})
    synthesizer = Synthesizer(teacher, settings, generator_for(0, Stream.GENERATOR)).to(OTHER)
    student = Student(teacher, QuantizationSettings())
    student.to(OTHER)
    training = SynthesizerTraining(synthesizer, teacher.on(OTHER), settings, 0, student)
    training.settings = training.settings.model_copy(update={"adversarial_weight": 0.1})
    assert {each.device for each in training.step().values()} == {OTHER}
    assert all(each.grad is None or each.grad.device == OTHER for each in synthesizer.parameters())


@pytest.mark.parametrize("scheme", ["hardware", "paper"])
@pytest.mark.parametrize("fresh_share", [0.0, 0.5])
def test_a_student_is_trained_there(teacher: Teacher, bank: SampleBank, scheme: str, fresh_share: float) -> None:
    settings = DistillationSettings(
        num_steps=10,
        batch_size=4,
        fresh_share=fresh_share,
        precision="float32",
        compile="never",
        optimizer="adam" if scheme == "hardware" else "sgd",
        feature_weight=1.0 if scheme == "hardware" else 0.0,
    )
    student = Student(teacher, QuantizationSettings(scheme=scheme))
    student.initialize_ranges_([bank.take(slice(0, 4)).images])
    student.to(OTHER)
    course = Course(student, teacher.on(OTHER), bank, settings, torch.Generator().manual_seed(0))
    assert {each.device for each in course.step().values()} == {OTHER}
    assert {each.device for each in student.module.state_dict().values()} == {OTHER}
    with torch.no_grad():
        assert student(torch.zeros(2, *SPEC.shape, device=OTHER)).device == OTHER


def test_a_teacher_that_was_moved_is_asked_there(teacher: Teacher, bank: SampleBank) -> None:
    """Up to the first number that is wanted on the CPU, which "meta" does not have."""
    moved = teacher.on(OTHER)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        features_of(bank.take(slice(0, 4)).images, moved)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        bank.with_images(bank.pixels[:4], moved)
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        measure_sensitivity(moved, bank)


def test_units_of_weights_come_back_to_the_device_of_the_weights() -> None:
    weight = nn.Parameter(torch.zeros(2, device=OTHER))
    optimizer = _unfused(StepwiseAdam, [{"params": [weight], "lr": 1.0}], [(weight, torch.ones(2, device=OTHER))])
    optimizer.load_state_dict(optimizer.state_dict() | {"units": [torch.ones(2)]})
    assert optimizer.units[0].device == OTHER


def test_the_cpu_by_name_makes_the_same(teacher: Teacher, bank: SampleBank) -> None:
    settings = DistillationSettings(num_steps=2, batch_size=4, compile="never")
    named = synthesize(teacher, settings=SYNTHESIS, device="cpu")
    assert torch.equal(named.pixels, bank.pixels)
    one, other = quantize(teacher, bank, settings=settings), quantize(teacher, bank, settings=settings, device="cpu")
    states = one.module.state_dict(), other.module.state_dict()
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


@pytest.mark.parametrize("name", ["cuda:99", "gpu"])
@pytest.mark.parametrize(
    "words", [("quantize", "mnist_cnn", "--output", "run"), ("evaluate", "run", "--data", "test.npz")]
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_made_or_read(
    name: str, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"device: {name} cannot be used .*there (are|is only) cpu"):
        find_device(name)
    result = qimera(*words, "--device", name)
    assert result.exit_code == 2
    assert f"device: {name} cannot be used" in said(result)
    assert not list(tmp_path.iterdir())
