"""A program: steps of one kind on one device -> their losses, plain and compiled, and what kept them from a graph.

    python -m tests.device_steps cuda student plain compiled

A program of its own because the type checks of the test run cannot be compiled.
"""

import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from qimera.config.settings import (
    DirectSettings,
    DistillationSettings,
    GeneratorSettings,
    QuantizationSettings,
    SynthesisSettings,
)
from qimera.machine.acceleration import find_device
from qimera.machine.modes import Compile
from qimera.machine.seeds import Stream, generator_for
from qimera.pipeline import synthesize
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank
from qimera.synthesis.direct import noise_images, optimize_images
from qimera.synthesis.synthesizer import Synthesizer, SynthesizerTraining
from qimera.teacher.teacher import Teacher
from qimera.training.distillation import Course
from tests.networks import SPEC, trained_tiny_net

NUM_STEPS = 12


def main(name: str, kind: str, modes: list[str]) -> None:
    """Print the losses of every step."""
    torch.set_num_threads(1)
    device = find_device(name)
    teacher = Teacher.capture(trained_tiny_net(), SPEC)
    direct = DirectSettings(num_steps=20, batch_size=32, compile="never", precision="float32")
    bank = synthesize(teacher, settings=SynthesisSettings(num_optimized=64, num_held_out=0, direct=direct))
    kinds: dict[str, Callable[[Compile], list[float]]] = {
        "images": lambda mode: images(teacher.on(device), direct.model_copy(update={"compile": mode})),
        "generator": lambda mode: generator(teacher.on(device), mode),
        "student": lambda mode: student(teacher, bank, device, mode, fresh=False),
        "both": lambda mode: student(teacher, bank, device, mode, fresh=True),
    }
    settings: dict[str, Compile] = {"plain": "never", "compiled": "always"}
    found = {mode: kinds[kind](settings[mode]) for mode in modes}
    breaks, skips = list(counters["graph_break"]), counters["inductor"]["cudagraph_skips"]
    print(json.dumps({"losses": found, "breaks": breaks, "skips": skips}))  # noqa: T201


def images(teacher: Teacher, settings: DirectSettings) -> list[float]:
    """Return the losses of images in every step."""
    draws = torch.Generator().manual_seed(0)
    start = noise_images(32, SPEC.shape, settings.num_scales, draws).to(teacher.device)
    label = torch.full((32, teacher.num_classes), 1 / teacher.num_classes, device=teacher.device)
    losses: list[float] = []
    optimize_images(start, label, teacher, settings, draws, lambda _, terms: losses.append(_sum(terms)))
    return losses


def generator(teacher: Teacher, mode: Compile) -> list[float]:
    """Return the losses of a generator in every step."""
    return generator_with_gradients(teacher, mode)[0]


def generator_with_gradients(teacher: Teacher, mode: Compile) -> tuple[list[float], dict[str, Tensor]]:
    """Return the losses of a generator in every step, and the gradient of every parameter in the first."""
    training = _training(teacher, mode)
    losses = [_sum(training.step())]
    parameters = training.synthesizer.named_parameters()
    gradients = {name: each.grad.clone() for name, each in parameters if each.grad is not None}
    return losses + [_sum(training.step()) for _ in range(NUM_STEPS - 1)], gradients


def _training(teacher: Teacher, mode: Compile) -> SynthesizerTraining:
    generator = GeneratorSettings(batch_size=32, num_steps=NUM_STEPS, compile=mode, precision="float32")
    settings = SynthesisSettings(generator=generator)
    synthesizer = Synthesizer(teacher, settings, generator_for(0, Stream.GENERATOR)).to(teacher.device)
    return SynthesizerTraining(synthesizer, teacher, settings, 0)


def student(teacher: Teacher, bank: SampleBank, device: torch.device, mode: Compile, *, fresh: bool) -> list[float]:
    """Return the losses of a student in every step."""
    settings = DistillationSettings(
        num_steps=NUM_STEPS,
        batch_size=32,
        fresh_share=1.0 if fresh else 0.0,
        generator_steps_per_step=int(fresh),
        compile=mode,
        precision="float32",
    )
    trained = Student(teacher, QuantizationSettings(weight_bits=4, activation_bits=4))
    trained.initialize_ranges_([bank.take(slice(0, 32)).images])
    trained.to(device)
    worker, draws = teacher.on(device), torch.Generator().manual_seed(0)
    course = Course(trained, worker, bank, settings, draws, _training(worker, mode) if fresh else None)
    return [_sum(course.step()) for _ in range(NUM_STEPS)]


def _sum(terms: dict[str, Tensor]) -> float:
    return sum(float(term) for term in terms.values())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
