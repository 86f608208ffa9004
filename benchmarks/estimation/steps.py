"""Does it pay to choose a training's step by the estimated drop? Both, every so many steps of one training.

    python -m benchmarks.estimation.steps resnet20_cifar10 --bits w3a3

Banks are those of drops.py; the result is one JSON file, from which benchmarks/tables.py writes a table
of docs/estimation.md.
"""

import argparse
import json
import warnings
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.estimation.drops import SUBJECTS, WORK, bank_of, logits_of, test_images
from benchmarks.measurement import command_line
from benchmarks.zoo import load_subject
from qimera import QuantizationSettings, Student, recipe
from qimera.assessment.estimation import estimate_on_held_out
from qimera.config.bits import parse_bits
from qimera.machine.progress import Progress
from qimera.pipeline import quantize_with
from qimera.training.distillation import distill_

RESULTS = Path(__file__).parent / "results" / "steps"


def main() -> None:
    """Train one student and write what was seen on the way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=SUBJECTS)
    parser.add_argument("--bits", default="w3a3")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--work", type=Path, default=WORK, help="where banks are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    values = {
        "network": options.network,
        "bits": options.bits,
        "seen": measure(options),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "command": command_line(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{options.network}-{options.bits}.json").write_text(json.dumps(values, indent=1) + "\n")


def measure(options: argparse.Namespace) -> list[dict[str, float]]:
    """Return step, estimate and real drop, every ``options.every`` steps, before the first and after the last."""
    teacher, data = load_subject(options.network)
    subject = SUBJECTS[options.network]
    bank = bank_of(options.network, subject, teacher, options.work)
    images, labels = test_images(data, subject, teacher)
    right = logits_of(teacher, images).argmax(1) == labels
    weight_bits, activation_bits = parse_bits(options.bits)
    bits = QuantizationSettings(weight_bits=weight_bits, activation_bits=activation_bits)
    training = recipe("fast", teacher.input_spec, teacher.num_classes).distillation
    student = quantize_with(teacher, bank, bits, training.model_copy(update={"num_steps": 0}), seed=0)
    seen: list[dict[str, float]] = []

    def look(step: int, student: Student = student) -> None:
        real = 100 * float(right.mean() - (logits_of(student, images).argmax(1) == labels).mean())
        seen.append({"step": step, "estimate": estimate_on_held_out(student, teacher, bank).drop, "drop": real})
        print(seen[-1], flush=True)

    def report(progress: Progress) -> None:
        if progress.step % options.every == 0 or progress.step == options.steps:
            look(progress.step)

    look(0)
    settings = training.model_copy(update={"num_steps": options.steps})
    distill_(student, teacher, bank, settings, torch.Generator().manual_seed(0), progress=report)
    return seen


if __name__ == "__main__":
    main()
