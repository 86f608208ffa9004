"""A program: the training step of a small student, plain and compiled -> how far apart, and whether it is one graph.

A program of its own because the type checks of the test run cannot be compiled.
"""

import json

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from qimera.acceleration import Compile, compiled
from qimera.distillation import Lesson
from qimera.quantization.student import Student
from qimera.settings import DistillationSettings, QuantizationSettings
from qimera.teacher import Teacher
from tests.networks import NUM_CLASSES, SPEC, toy_pixels, trained_tiny_net


def main() -> None:
    """Print both losses, the relative distance between the gradients, and why a compiled step fell into parts."""
    torch.set_num_threads(1)
    teacher = Teacher.capture(trained_tiny_net(), SPEC)
    plain, gradients = loss_and_gradients(teacher, "never")
    fused, fused_gradients = loss_and_gradients(teacher, "always")
    distances = {}
    for kind in ("weight", "bias", "log_scale"):
        one, other = (
            torch.cat([value.flatten() for name, value in found.items() if name.endswith(kind)])
            for found in (gradients, fused_gradients)
        )
        distances[kind] = float((one - other).norm() / one.norm())
    breaks = list(counters["graph_break"])
    print(json.dumps({"plain": plain, "fused": fused, "distances": distances, "breaks": breaks}))  # noqa: T201


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
    main()
