"""A program: steps of a small student and of a generator, plain and compiled -> how far apart, and what broke graphs.

    python -m tests.compiled_step BACKEND

with a backend of ``torch.compile``: inductor writes C++ and has it compiled, which takes half a minute; with
aot_eager_decomp_partition the same graphs, traced, differentiated and split as for inductor, are run by PyTorch.
The gradients of a generator's network are by inductor in any case, which takes seconds. Forked by test_acceleration.py,
for the type checks of the test run cannot be compiled.
"""

import json
import sys
from functools import partial

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from qimera.config.settings import DistillationSettings, GeneratorSettings, QuantizationSettings
from qimera.machine.acceleration import compiled
from qimera.machine.modes import Compile
from qimera.student.student import Student
from qimera.synthesis.generator import Generator
from qimera.teacher.teacher import Teacher
from qimera.training.distillation import Lesson
from tests.device_steps import generator_with_gradients
from tests.networks import NUM_CLASSES, SPEC, toy_pixels, trained_tiny_net


def main(arguments: list[str]) -> None:
    """Print what became of both."""
    torch.set_num_threads(1)
    found: dict[str, object] = {"image": image_distances()}
    torch.compile = partial(torch.compile, backend=arguments[0])
    teacher = Teacher.capture(trained_tiny_net(), SPEC)
    found |= {"student": student_step(teacher), "generator": generator_steps(teacher)}
    print(json.dumps(found))  # noqa: T201


def compiled_graphs() -> dict[str, object]:
    """Return how many graphs were compiled since the counters were cleared, and what broke them into parts."""
    return {"graphs": counters["stats"]["unique_graphs"], "breaks": list(counters["graph_break"])}


def image_distances() -> dict[str, float]:
    """Return how far compiled gradients of a generator's weights are from plain ones, relative to these."""
    latent, label = torch.randn(8, 16), torch.full((8, NUM_CLASSES), 1 / NUM_CLASSES)
    weights = torch.randn(8, *SPEC.shape)
    found = []
    for wanted in (False, True):
        torch.manual_seed(0)
        network = Generator(16, SPEC, GeneratorSettings(base_channels=8), NUM_CLASSES)
        (compiled(network, wanted, latent.device)(latent, label) * weights).sum().backward()
        named = network.named_parameters()
        found.append({name: each.grad for name, each in named if name.endswith("weight") and each.grad is not None})
    plain, fused = found
    return {name: float((plain[name] - fused[name]).norm() / plain[name].norm()) for name in plain}


def generator_steps(teacher: Teacher) -> dict[str, object]:
    """Return the losses of a generator in every step, distances of its first gradients, and what broke the step."""
    counters.clear()
    (plain, gradients), (fused, fused_gradients) = (
        generator_with_gradients(teacher, mode) for mode in ("never", "always")
    )
    # of biases in front of a batch norm, gradients are rounding errors
    moved = {name: value for name, value in gradients.items() if value.norm() > 1e-4}
    distances = {name: float((value - fused_gradients[name]).norm() / value.norm()) for name, value in moved.items()}
    return {"losses": {"plain": plain, "compiled": fused}, "distances": distances, **compiled_graphs()}


def student_step(teacher: Teacher) -> dict[str, object]:
    """Return both losses, the relative distance between the gradients, and why a compiled step fell into parts."""
    counters.clear()
    plain, gradients = loss_and_gradients(teacher, "never")
    fused, fused_gradients = loss_and_gradients(teacher, "always")
    distances = {}
    for kind in ("weight", "bias", "log_scale"):
        one, other = (
            torch.cat([value.flatten() for name, value in found.items() if name.endswith(kind)])
            for found in (gradients, fused_gradients)
        )
        distances[kind] = float((one - other).norm() / one.norm())
    return {"plain": plain, "fused": fused, "distances": distances, **compiled_graphs()}


def loss_and_gradients(teacher: Teacher, mode: Compile) -> tuple[float, dict[str, Tensor]]:
    """Return the loss of some images and its gradient by every parameter of a fresh W3A3 student."""
    student = Student(teacher, QuantizationSettings(weight_bits=3, activation_bits=3))
    images = SPEC.normalize(toy_pixels(32, seed=3)[0])
    student.initialize_ranges_([images])
    lesson = Lesson(student, DistillationSettings())
    teach, losses = (compiled(each, mode == "always", images.device) for each in (lesson.teach, lesson.losses))
    total, _ = losses(images, torch.full((32, NUM_CLASSES), 1 / NUM_CLASSES), *teach(images))
    total.backward()
    return float(total.detach()), {name: p.grad for name, p in student.module.named_parameters() if p.grad is not None}


if __name__ == "__main__":
    main(sys.argv[1:])
