"""Steps per second of training loops: every operation called by itself, and compiled (on a GPU, as CUDA graphs).

    python -m benchmarks.speed.loops resnet20_cifar10 --device cuda
    python -m benchmarks.speed.loops mobilenet_v1_075_imagenet --device cuda --batch 32

Whole steps, with their draws, optimizers and schedules: those of recipe ``paper`` (a generator's and a student's), and
those of images and students of recipe ``fast``. Loops take turns; the figure is the median of the turns. Results are
JSON files in results, whose tables tables.py writes.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.measurement import device_name, keep, prepare
from benchmarks.speed.costs import MANY, drawn_bank, make_course, make_training
from benchmarks.speed.tables import SPEED
from qimera import Teacher, recipe
from qimera.config.settings import DirectSettings
from qimera.machine.acceleration import find_device
from qimera.machine.modes import Compile
from qimera.synthesis.direct import noise_images, optimize_images
from qimera.training.distillation import Course

Steps = Callable[[int], object]
"""Makes so many steps."""


def main() -> None:
    """Measure, and keep what was found."""
    options = _options()
    teacher, _, _ = prepare(options)
    device = find_device(options.device)
    loops: dict[str, dict[str, Steps]] = {}
    modes: dict[str, Compile] = {"plain": "never", "compiled": "always"}
    for name, mode in modes.items():
        for step, steps in _loops(teacher, device, options, mode).items():
            if step in options.loops:
                loops.setdefault(step, {})[name] = steps
    rows = {step: _race(pair, device, options) for step, pair in loops.items()}
    values = {
        "network": options.network,
        "bits": options.bits,
        "batch": options.batch,
        "device": device_name(options.device),
        "steps": rows,
    }
    said = ", ".join(f"{step} {row['plain']} -> {row['compiled']} steps/s" for step, row in rows.items())
    keep(SPEED / f"{options.network}-loops-{device.type}-{'-'.join(options.loops)}.json", values, said)


def _loops(teacher: Teacher, device: torch.device, options: argparse.Namespace, mode: Compile) -> dict[str, Steps]:
    """Return all kinds of loops at one batch size."""
    spec, classes, batch = teacher.input_spec, teacher.num_classes, options.batch
    paper, ours = recipe("paper", spec, classes), recipe("fast", spec, classes)
    bank, worker = drawn_bank(teacher, paper.synthesis, batch), teacher.on(device)
    training = make_training(worker, bank, batch, mode)
    adapted = {"num_steps": MANY, "batch_size": batch, "compile": mode}
    published = paper.distillation.model_copy(update=adapted)
    learned = ours.distillation.model_copy(update=adapted)
    return {
        "paper": _repeated(make_course(teacher, bank, options.bits, "paper", published, device, training)),
        "images": partial(_optimize, worker, ours.synthesis.direct.model_copy(update=adapted)),
        "student": _repeated(make_course(teacher, bank, options.bits, "hardware", learned, device)),
    }


def _repeated(course: Course) -> Steps:
    def steps(count: int) -> None:
        for _ in range(count):
            course.step()

    return steps


def _optimize(worker: Teacher, settings: DirectSettings, count: int) -> None:
    rng = torch.Generator().manual_seed(0)
    images = noise_images(settings.batch_size, worker.input_spec.shape, settings.num_scales, rng)
    labels = torch.full((len(images), worker.num_classes), 1 / worker.num_classes, device=worker.device)
    asked = settings.model_copy(update={"num_steps": count})
    optimize_images(images.to(worker.device), labels, worker, asked, rng)


def _race(loops: dict[str, Steps], device: torch.device, options: argparse.Namespace) -> dict[str, float]:
    """Let loops take turns; return the median steps per second of each, and the seconds of its first three steps."""
    first = {name: _seconds(steps, 3, device) for name, steps in loops.items()}
    turns: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(options.rounds):
        for name, steps in loops.items():
            turns[name].append(options.steps / _seconds(steps, options.steps, device))
    return {name: round(statistics.median(each), 2) for name, each in turns.items()} | {
        f"{name}_start_seconds": round(seconds, 1) for name, seconds in first.items()
    }


def _seconds(steps: Steps, count: int, device: torch.device) -> float:
    start = time.perf_counter()
    steps(count)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", nargs="?", default="resnet20_cifar10")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--loops", nargs="+", default=["paper", "images", "student"])
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--steps", type=int, default=50, help="of one turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
