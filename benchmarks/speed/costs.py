"""What a step costs, where its time goes, and what a result costs against the paper's schedule.

    python -m benchmarks.speed.costs steps resnet20_cifar10       # seconds, multiply-adds and bytes of each step
    python -m benchmarks.speed.costs steps mobilenet_v1_075_imagenet --batch 16
    python -m benchmarks.speed.costs results resnet20_cifar10     # recipes against 80,000 steps of the paper's
    python -m benchmarks.speed.costs start                        # seconds until `import qimera` is done

Steps of all kinds take turns, so that other work on the machine slows all of them alike, and a figure is the median of
wall times. ``convolutions`` are those of the same step alone (the teacher's once, the student's with both gradients),
each called by itself on inputs of its shape: what torch reaches on this machine. The paper's steps are those of recipe
``paper``: a generator's and a student's for each batch. Results are JSON files in results.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measurement import keep, prepare
from benchmarks.speed.tables import SPEED
from qimera import QuantizationSettings, SampleBank, Student, Teacher, evaluate, recipe, synthesize
from qimera.config.bits import parse_bits
from qimera.config.settings import DistillationSettings, SynthesisSettings
from qimera.graph.nodes import WEIGHTED
from qimera.machine.acceleration import autocast
from qimera.machine.modes import Compile
from qimera.machine.seeds import Stream, generator_for
from qimera.pipeline import quantize_with
from qimera.synthesis.direct import noise_images, optimize_images
from qimera.synthesis.synthesizer import Synthesizer, SynthesizerTraining
from qimera.training.distillation import Course

PAPER_STEPS = 80_000
"""Of 200 samples: 400 epochs of 200 steps (Choi et al. 2021)."""

CPU = torch.device("cpu")
MANY = 1_000_000
"""Steps that a training is said to have, so that it is compiled where that pays."""

Run = Callable[[int], list[float]]
"""Makes so many steps and returns the seconds of each."""


@dataclass(frozen=True)
class Stage:
    """One kind of step."""

    batch: int
    run: Run
    once: Callable[[], object] | None
    """One step that is not compiled, whose operations can be counted; None where they are those of another."""


def main() -> None:
    """Measure what was asked for."""
    options = _options()
    torch.set_num_threads(options.threads)
    {"steps": _steps, "results": _results, "start": _start}[options.what](options)


# --- steps ------------------------------------------------------------------------------------------------------------


def _steps(options: argparse.Namespace) -> None:
    """Measure every kind of step."""
    teacher, _, _ = prepare(options)
    batch = options.batch or recipe("paper", teacher.input_spec, teacher.num_classes).distillation.batch_size
    stages = _stages(teacher, batch, options.bits)
    medians = _race({name: stage.run for name, stage in stages.items()}, options.rounds, options.steps)
    rows = {}
    for name, stage in stages.items():
        work = _work(stage.once) if stage.once else {}
        rows[name] = {
            "batch": stage.batch,
            "seconds": round(medians[name], 5),
            "milliseconds_per_sample": round(1000 * medians[name] / stage.batch, 4),
            **work,
        }
        print(name, rows[name], flush=True)
    ours = sum(medians[name] / stages[name].batch for name in ("images", "student"))
    paper = sum(medians[name] / stages[name].batch for name in ("paper: generator", "paper: student"))
    convolutions = medians["convolutions"] / medians["student"]
    values = {
        "network": options.network,
        "bits": options.bits,
        "stages": rows,
        "paper_over_ours_per_sample_and_step": round(paper / ours, 2),
        "convolutions_over_student_step": round(convolutions, 3),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    said = f"paper over ours {paper / ours:.1f}, convolutions {100 * convolutions:.0f} % of a student step"
    keep(SPEED / f"{options.network}-steps.json", values, said)


def _stages(teacher: Teacher, batch: int, bits: str) -> dict[str, Stage]:
    """Return all kinds of steps at one batch size; the paper's student sees what its generator draws."""
    spec, classes = teacher.input_spec, teacher.num_classes
    paper, ours = recipe("paper", spec, classes), recipe("fast", spec, classes)
    bank = drawn_bank(teacher, paper.synthesis, batch)
    qimera_bank = drawn_bank(teacher, recipe("qimera", spec, classes).synthesis, batch)
    published = paper.distillation.model_copy(
        update={"num_steps": MANY, "batch_size": batch, "generator_steps_per_step": 0}
    )
    learned = ours.distillation.model_copy(update={"num_steps": MANY, "batch_size": batch, "start": "nearest"})
    return {
        "paper: generator": _generator(teacher, bank, batch),
        "paper: student": _student(teacher, bank, bits, published, "paper"),
        "qimera: generator": _generator(teacher, qimera_bank, batch),
        "qimera: samples drawn": _drawing(qimera_bank, batch),
        "images": _images(teacher, ours.synthesis, batch),
        "student": _student(teacher, bank, bits, learned, "hardware"),
        "convolutions": Stage(batch, _timed(Convolutions(teacher, batch, learned)), None),
    }


def make_training(teacher: Teacher, bank: SampleBank, batch: int, mode: Compile = "auto") -> SynthesizerTraining:
    """Return the training of a bank's generator for many steps."""
    assert bank.synthesizer is not None
    asked = bank.settings.generator.model_copy(update={"batch_size": batch, "compile": mode})
    settings = bank.settings.model_copy(update={"generator": asked})
    return SynthesizerTraining(bank.synthesizer.to(teacher.device), teacher, settings, 0, num_steps=MANY)


def _generator(teacher: Teacher, bank: SampleBank, batch: int) -> Stage:
    return Stage(
        batch, _timed(make_training(teacher, bank, batch).step), make_training(teacher, bank, batch, "never").step
    )


def _drawing(bank: SampleBank, batch: int) -> Stage:
    synthesizer, draws = bank.synthesizer, torch.Generator().manual_seed(0)
    assert synthesizer is not None

    @torch.no_grad()
    def draw() -> None:
        synthesizer(synthesizer.draw(batch, draws))

    return Stage(batch, _timed(draw), draw)


def make_course(
    teacher: Teacher,
    bank: SampleBank,
    bits: str,
    scheme: str,
    settings: DistillationSettings,
    device: torch.device = CPU,
    training: SynthesizerTraining | None = None,
) -> Course:
    """Return a student's training."""
    weights, activations = parse_bits(bits)
    student = Student(teacher, QuantizationSettings(weight_bits=weights, activation_bits=activations, scheme=scheme))
    student.initialize_ranges_([bank.take(slice(0, 32)).images] * 4)
    student.to(device)
    return Course(student, teacher.on(device), bank, settings, torch.Generator().manual_seed(0), training)


def drawn_bank(teacher: Teacher, settings: SynthesisSettings, batch: int) -> SampleBank:
    """Return samples of a generator that is not trained: a step takes as long on any."""
    synthesizer = Synthesizer(teacher, settings, generator_for(0, Stream.GENERATOR)).eval()
    images = noise_images(2 * batch, teacher.input_spec.shape, 3, torch.Generator().manual_seed(0))
    labels = torch.full((len(images), teacher.num_classes), 1 / teacher.num_classes)
    settings = settings.model_copy(update={"num_held_out": 0})
    return SampleBank.from_pixels(teacher.input_spec.to_pixels(images), labels, teacher, settings, 0, synthesizer)


def _student(
    teacher: Teacher,
    bank: SampleBank,
    bits: str,
    settings: DistillationSettings,
    scheme: str,
) -> Stage:
    course = partial(make_course, teacher, bank, bits, scheme)
    plain = settings.model_copy(update={"compile": "never"})
    return Stage(settings.batch_size, _timed(course(settings).step), course(plain).step)


def _images(teacher: Teacher, settings: SynthesisSettings, batch: int) -> Stage:
    generator, direct = torch.Generator().manual_seed(0), settings.direct
    images = noise_images(batch, teacher.input_spec.shape, direct.num_scales, generator)
    labels = torch.full((batch, teacher.num_classes), 1 / teacher.num_classes)

    def run(count: int, compiled: bool = True) -> list[float]:
        moments = [time.perf_counter()]
        asked = direct.model_copy(update={"num_steps": count, "compile": "auto" if compiled else "never"})

        def after_step(*_: object) -> None:
            moments.append(time.perf_counter())

        optimize_images(images, labels, teacher, asked, generator, after_step, num_calls=MANY)
        return [after - before for before, after in pairwise(moments)]

    return Stage(batch, run, partial(run, 1, False))


class Convolutions:
    """Every convolution and linear layer of one student step, each on its own."""

    def __init__(self, teacher: Teacher, batch: int, settings: DistillationSettings) -> None:
        self.settings, self.calls = settings, []
        images = torch.zeros(batch, *teacher.input_spec.shape).contiguous(memory_format=torch.channels_last)
        recorder = _Recorder(teacher.module)
        with torch.no_grad():
            recorder.run(images)
        self.calls = recorder.calls

    def __call__(self) -> None:
        """Compute all of them once without gradients, as the teacher does, and once with both."""
        narrow = autocast(self.settings.precision, CPU)
        with torch.no_grad(), narrow:
            for target, tensors, rest in self.calls:
                target(*tensors, *rest)
        for target, tensors, rest in self.calls:
            leaves = [each.detach().requires_grad_(True) for each in tensors]
            output = target(*leaves, *rest)
            torch.autograd.grad(output, leaves, output.detach())


class _Recorder(torch.fx.Interpreter):
    """Keeps what every layer is called with."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.calls: list[tuple[Any, list[Tensor], list[Any]]] = []

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.target in WEIGHTED:
            args = [self.env[arg] if isinstance(arg, torch.fx.Node) else arg for arg in n.args]
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            self.calls.append((n.target, tensors, [arg for arg in args if not isinstance(arg, Tensor)]))
        return super().run_node(n)


def _timed(step: Callable[[], object]) -> Run:
    def run(count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        return seconds

    return run


def _race(runs: dict[str, Run], rounds: int, steps: int) -> dict[str, float]:
    """Let all take turns, and return the median seconds of each; the first steps, which compile, do not count."""
    for name, run in runs.items():
        print(f"warm up: {name}", flush=True)
        run(2)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name] += run(steps)
    return {name: statistics.median(each) for name, each in seconds.items()}


class _Bytes(TorchDispatchMode):
    """Counts the bytes that operations read and write, where each is a pass of its own."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)]
        self.count += sum(each.numel() * each.element_size() for each in tensors)
        return result


def _work(step: Callable[[], object]) -> dict[str, float]:
    """Return the work of one step, as it is before anything is fused."""
    with FlopCounterMode(display=False) as flops:
        step()
    with _Bytes() as moved:
        step()
    return {"giga_multiply_adds": round(flops.get_total_flops() / 2e9, 3), "gigabytes": round(moved.count / 1e9, 3)}


# --- results ----------------------------------------------------------------------------------------------------------


def _results(options: argparse.Namespace) -> None:
    """Price what recipes reach in steps of the paper, measured before and after each of them."""
    teacher, images, full = prepare(options)
    paper = recipe("paper", teacher.input_spec, teacher.num_classes)
    batch = paper.distillation.batch_size
    bank = drawn_bank(teacher, paper.synthesis, batch)
    training = make_training(teacher, bank, batch)
    published = paper.distillation.model_copy(update={"generator_steps_per_step": 0})
    student = _student(teacher, bank, options.bits, published, "paper")
    weight_bits, activation_bits = parse_bits(options.bits)
    quantization = QuantizationSettings(weight_bits=weight_bits, activation_bits=activation_bits)
    priced, rows = [], []

    def price() -> None:
        pair = zip(_timed(training.step)(options.steps), student.run(options.steps), strict=True)
        priced.extend(sum(each) for each in pair)

    training.step()
    student.run(1)
    price()
    for name in options.recipes:
        chosen = recipe(name, teacher.input_spec, teacher.num_classes)
        start = time.perf_counter()
        samples = synthesize(teacher, settings=chosen.synthesis)
        between = time.perf_counter()
        made = quantize_with(teacher, samples, quantization, chosen.distillation)
        end = time.perf_counter()
        top1 = evaluate(made, images, teacher.input_spec).top1
        row = {"recipe": name, "drop": round(full - top1, 2)}
        rows.append(row | {"bank_seconds": round(between - start, 1), "student_seconds": round(end - between, 1)})
        print(rows[-1], flush=True)
        price()
    step = statistics.median(priced)
    for row in rows:
        seconds = row["bank_seconds"] + row["student_seconds"]
        row["paper_over_ours"] = round(PAPER_STEPS * step / seconds)
    values = {"network": options.network, "bits": options.bits, "paper_seconds_per_step": round(step, 4), "rows": rows}
    said = ", ".join(f"{row['recipe']} {row['drop']} at 1/{row['paper_over_ours']}" for row in rows)
    keep(SPEED / f"{options.network}-{options.bits}-results.json", values, said)


# --- start ------------------------------------------------------------------------------------------------------------


def _start(options: argparse.Namespace) -> None:
    """Measure imports, in turns."""
    commands = {
        "import torch": [sys.executable, "-c", "import torch"],
        "import qimera": [sys.executable, "-c", "import qimera"],
        "qimera --help": [sys.executable, "-m", "qimera", "--help"],
    }

    def run(command: list[str]) -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    medians = _race({name: _timed(partial(run, command)) for name, command in commands.items()}, options.rounds, 1)
    values = {name: round(seconds, 3) for name, seconds in medians.items()}
    keep(SPEED / "start.json", values, ", ".join(f"{name} {value} s" for name, value in values.items()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "results", "start"))
    parser.add_argument("network", nargs="?", default="resnet20_cifar10")
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--batch", type=int, help="of every step; the paper's when absent")
    parser.add_argument("--steps", type=int, default=3, help="of one turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--recipes", nargs="+", default=["ptq", "fast"])
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
