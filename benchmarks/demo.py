"""The main job in three minutes: the embedded MNIST classifier becomes a W4A4 and a W2A2 file without an image.

    python -m benchmarks.demo [--seed 0]

Only scoring sees the 1,000 real images that no training ever saw. The students of the last row become ONNX files.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.mnist import load_mnist_split
from qimera import (
    DirectSettings,
    GeneratorSettings,
    LabelledImages,
    LabelSettings,
    QuantizationSettings,
    SampleBank,
    Student,
    SynthesisSettings,
    Teacher,
    evaluate,
    export_onnx,
    synthesize,
)
from qimera.cli.console import ProgressDisplay
from qimera.config.recipes import recipe
from qimera.machine.progress import ProgressCallback
from qimera.pipeline import quantize_with
from qimera.quantization.sizes import float_bytes, packed_bytes
from qimera.report.summary import readable_bytes
from qimera.teacher.sources import EMBEDDED_MODELS, load_model

MODEL = "mnist_cnn"
OUTPUT = Path("runs") / "demo"
NUM_SAMPLES = 256
NUM_STEPS = {4: 200, 2: 800}
"""Training steps by bits; the fewer bits, the more there is to mend."""

_GENERATOR = GeneratorSettings(num_steps=150, base_channels=32, learning_rate=3e-3)
_WITHOUT = _GENERATOR.replace(extracted_embeddings=False, disentanglement_mapping=False)


@dataclass(frozen=True)
class Row:
    """One way to make the samples; the student's training is the same for all."""

    name: str
    make_bank: Callable[[Teacher, int, ProgressCallback], SampleBank]
    trains: bool = True


def noise_bank(teacher: Teacher, seed: int, progress: ProgressCallback) -> SampleBank:
    """Gaussian noise: what is left when nothing is known about the data."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.randn(NUM_SAMPLES, *teacher.input_spec.shape, generator=rng)
    labels = torch.full((NUM_SAMPLES, teacher.num_classes), 1 / teacher.num_classes)
    return SampleBank.from_images(images, labels, teacher, SynthesisSettings(), seed)


def synthetic_bank(settings: SynthesisSettings) -> Callable[[Teacher, int, ProgressCallback], SampleBank]:
    """A bank made with these settings."""
    return lambda teacher, seed, progress: synthesize(teacher, settings=settings, seed=seed, progress=progress)


ROWS = (
    Row("round to nearest", noise_bank, trains=False),
    Row(
        "GDFQ generator",
        synthetic_bank(
            SynthesisSettings(
                num_generated=NUM_SAMPLES,
                num_optimized=0,
                labels=LabelSettings(superposition=False),
                generator=_WITHOUT,
            )
        ),
    ),
    Row(
        "Qimera, recipe qimera",
        synthetic_bank(
            SynthesisSettings(
                num_optimized=NUM_SAMPLES,
                generator=_GENERATOR,
                direct=DirectSettings(num_steps=20, start="generator"),
            )
        ),
    ),
    Row("Qimera, recipe fast", synthetic_bank(SynthesisSettings(num_optimized=NUM_SAMPLES))),
)


def main() -> None:
    """Quantize, score, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    warnings.simplefilter("ignore")
    spec = EMBEDDED_MODELS[MODEL].input_spec
    teacher = Teacher.capture(load_model(MODEL), spec)
    images = load_mnist_split().held_out
    table = _table(teacher, images)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    exported = []
    with ProgressDisplay() as progress:
        for row in ROWS:
            start = time.perf_counter()
            bank = row.make_bank(teacher, seed, progress)
            bank_seconds = time.perf_counter() - start
            for bits in NUM_STEPS:
                student, *cells = _measure(row, bits, teacher, bank, images, seed, bank_seconds, progress)
                table.add_row(*cells)
                if row is ROWS[-1]:
                    path = OUTPUT / f"{MODEL}-w{bits}a{bits}.onnx"
                    exported.append((path, export_onnx(student, path, bank)))
    Console().print(table)
    for path, verification in exported:
        print(f"{path}: {verification.text()}")


def _measure(
    row: Row,
    bits: int,
    teacher: Teacher,
    bank: SampleBank,
    images: LabelledImages,
    seed: int,
    bank_seconds: float,
    progress: ProgressCallback,
) -> tuple[Student, str, str, str, str, str]:
    settings = QuantizationSettings(weight_bits=bits, activation_bits=bits)
    training = recipe("fast", teacher.input_spec, teacher.num_classes).distillation
    training = training.replace(num_steps=NUM_STEPS[bits] if row.trains else 0)
    start = time.perf_counter()
    student = quantize_with(teacher, bank, settings, training, seed=seed, progress=progress)
    seconds = bank_seconds + time.perf_counter() - start
    result = evaluate(student, images, teacher.input_spec)
    return (
        student,
        row.name,
        f"W{bits}A{bits}",
        f"{result.top1:.1f}",
        readable_bytes(packed_bytes(teacher, settings)),
        f"{seconds:.0f}",
    )


def _table(teacher: Teacher, images: LabelledImages) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=f"{MODEL}: top-1 on {len(images):,} real images")
    table.add_column("method")
    for name in ("bits", "top-1 (%)", "size", "seconds"):
        table.add_column(name, justify="right")
    full = evaluate(teacher, images, teacher.input_spec)
    table.add_row("full precision", "W32A32", f"{full.top1:.1f}", readable_bytes(float_bytes(teacher)), "")
    return table


if __name__ == "__main__":
    main()
