"""What only a GPU can show; ``pytest -m gpu tests/test_gpu.py`` where there is one."""

import io
from dataclasses import astuple
from pathlib import Path

import pytest
import torch

from qimera.assessment.data import LabelledImages
from qimera.config.settings import (
    DirectSettings,
    DistillationSettings,
    GeneratorSettings,
    QuantizationSettings,
    SynthesisSettings,
)
from qimera.machine.progress import silent
from qimera.pipeline import quantize, synthesize
from qimera.runs.directory import RunDirectory
from qimera.runs.execution import carry_out, evaluate_run
from qimera.student.student import Student
from qimera.teacher.sources import load_model
from qimera.teacher.teacher import Teacher
from qimera.training.distillation import Course
from tests.command_line import tiny_settings
from tests.networks import SPEC, toy_pixels, trained_tiny_net
from tests.program_result import result_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
]


@pytest.mark.parametrize("kind", ["images", "generator", "student", "both"])
def test_a_gpu_learns_as_the_cpu_does_in_whole_graphs(kind: str) -> None:
    expected = result_of("tests.device_steps", "cpu", kind, "plain")["losses"]["plain"]
    found = result_of("tests.device_steps", "cuda", kind, "plain", "compiled")
    for losses in found["losses"].values():
        assert losses[0] == pytest.approx(expected[0], rel=0.1)  # on another processor the samples differ a little
        assert losses == pytest.approx(expected, rel=0.35)  # a value over the edge between two levels, and what follows
        assert sum(losses) == pytest.approx(sum(expected), rel=0.1)
    assert found["breaks"] == []
    assert found["skips"] == 0


def test_a_gpu_makes_a_student_that_computes_on_the_cpu() -> None:
    synthesis = SynthesisSettings(
        num_generated=8,
        num_optimized=8,
        generator=GeneratorSettings(batch_size=8, num_steps=1),
        direct=DirectSettings(num_steps=2, batch_size=8),
    )
    teacher = Teacher.capture(trained_tiny_net(), SPEC)
    bank = synthesize(teacher, settings=synthesis, device="cuda")
    settings = DistillationSettings(num_steps=20, batch_size=8, fresh_share=0.5, generator_steps_per_step=1)
    student = quantize(teacher, bank, settings=settings, device="cuda")
    assert student.device == torch.device("cpu")
    assert torch.isfinite(student(bank.take(slice(0, 4)).images)).all()


def test_a_gpu_scores_as_the_cpu_does(tmp_path: Path) -> None:
    settings = tiny_settings()
    teacher = Teacher.capture(load_model("mnist_cnn"), settings.input)
    run = RunDirectory.start(tmp_path / "run", settings)
    carry_out(run, teacher, None, silent)
    pixels = torch.randint(0, 256, (200, 28, 28, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = LabelledImages(pixels.numpy(), torch.arange(200).numpy() % 10)
    expected, found = (evaluate_run(run, images, silent, torch.device(name)) for name in ("cpu", "cuda"))
    # Whole numbers are summed either way; the teacher's sums are of another order.
    assert astuple(found) == pytest.approx(astuple(expected), abs=1)


def test_images_join_a_bank_from_a_gpu_as_from_the_cpu() -> None:
    teacher, images = Teacher.capture(trained_tiny_net(), SPEC), toy_pixels(10, seed=0)[0]
    nothing = SynthesisSettings(num_optimized=0)
    expected, found = (synthesize(teacher, settings=nothing, images=images.to(name)) for name in ("cpu", "cuda"))
    assert found.hash == expected.hash


def test_a_training_goes_on_as_if_it_had_never_stopped() -> None:
    teacher, device = Teacher.capture(trained_tiny_net(), SPEC), torch.device("cuda")
    bank = synthesize(teacher, settings=SynthesisSettings(num_optimized=32, direct=DirectSettings(num_steps=5)))

    def course() -> Course:
        student = Student(teacher, QuantizationSettings())
        student.initialize_ranges_([bank.take(slice(0, 32)).images])
        student.to(device)
        settings = DistillationSettings(num_steps=20, batch_size=8, compile="never")
        return Course(student, teacher.on(device), bank, settings, torch.Generator().manual_seed(0))

    def losses(course: Course) -> list[float]:
        return [sum(float(loss) for loss in course.step().values()) for _ in range(10)]

    whole, second = course(), course()
    losses(whole)
    kept = io.BytesIO()
    torch.save(whole.state_dict(), kept)
    kept.seek(0)
    second.load_state_dict(torch.load(kept, map_location="cpu", weights_only=True))
    assert losses(second) == pytest.approx(losses(whole), rel=0.02)


def test_a_model_on_a_gpu_is_captured_as_it_would_be_from_the_cpu() -> None:
    model = trained_tiny_net()
    expected = Teacher.capture(model, SPEC).hash
    assert Teacher.capture(model.to("cuda"), SPEC).hash == expected
    assert next(model.parameters()).device.type == "cuda"
