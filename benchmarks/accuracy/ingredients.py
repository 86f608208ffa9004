"""What each ingredient is worth: peers of the field as settings of our own stages, all else equal.

    python -m benchmarks.accuracy.ingredients resnet20_cifar10 --bits w4a4 w3a3 --seeds 0 1 2
    python -m benchmarks.accuracy.ingredients mnist_cnn --bits w3a3 w2a2  # the embedded network, in minutes

Every row gets the same student training (recipe fast's, at ``--steps``) and its samples from the stages of this
package; only how the samples come about differs. The first row is Gaussian noise, the last the recipe fast. Rows that
bear the name of a method take its idea, not its schedule: generators train for 400 batches of 64, images are optimised
for 40 steps.
Results are kept one file each in results/ingredients, and benchmarks/tables.py writes the table.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy.drops import noise_bank
from benchmarks.accuracy.tables import INGREDIENTS
from benchmarks.measurement import keep, prepare, without_result
from qimera import LabelledImages, QuantizationSettings, SampleBank, Teacher, evaluate, recipe, synthesize
from qimera.cli.console import ProgressDisplay
from qimera.config.bits import parse_bits
from qimera.config.settings import (
    DirectSettings,
    DistillationSettings,
    GeneratorSettings,
    LabelSettings,
    SynthesisSettings,
)
from qimera.machine.progress import ProgressCallback
from qimera.pipeline import quantize_with

NUM_SAMPLES = 1024
PLAIN_LABELS = LabelSettings(superposition=False)


@dataclass(frozen=True)
class Peer:
    """One way to come by samples."""

    description: str
    synthesis: SynthesisSettings | None
    """None for Gaussian noise."""

    beside_student: bool = False
    """Go on training the generator beside the student, which sees its fresh samples alone."""


def generated(labels: LabelSettings, **values: Any) -> SynthesisSettings:
    """Samples of a generator."""
    generator = GeneratorSettings(num_steps=400, **values)
    return SynthesisSettings(num_generated=NUM_SAMPLES, num_optimized=0, labels=labels, generator=generator)


def optimized(labels: LabelSettings, **values: Any) -> SynthesisSettings:
    """Images optimised directly."""
    return SynthesisSettings(num_optimized=NUM_SAMPLES, labels=labels, direct=DirectSettings(num_steps=40, **values))


def peers() -> dict[str, Peer]:
    """Return the rows of the table in their order."""
    random = {"extracted_embeddings": False, "disentanglement_mapping": False}
    mixed = LabelSettings()
    return {
        "noise": Peer("Gaussian noise", None),
        "gdfq": Peer("generator, random embeddings, one class a sample (GDFQ)", generated(PLAIN_LABELS, **random)),
        "adversarial": Peer(
            "generator of one class a sample, trained beside the student and against it (ZAQ)",
            generated(PLAIN_LABELS, **random, adversarial_weight=0.1),
            beside_student=True,
        ),
        "qimera": Peer("generator with superposition, mapping and extracted embeddings (Qimera)", generated(mixed)),
        "qimera-published": Peer(
            "Qimera, generator as wide at full resolution as published",
            generated(mixed, base_channels=128, num_doublings=2),
        ),
        "qimera-no-se": Peer("Qimera without superposition", generated(PLAIN_LABELS)),
        "qimera-no-dm": Peer("Qimera without mapping", generated(mixed, disentanglement_mapping=False)),
        "qimera-no-eei": Peer("Qimera with random embeddings", generated(mixed, extracted_embeddings=False)),
        "qimera-beside": Peer("Qimera, generator trained beside the student", generated(mixed), beside_student=True),
        "zeroq": Peer(
            "images optimised for batch-norm statistics (ZeroQ)",
            optimized(PLAIN_LABELS, num_scales=1, ce_weight=0.0, tv_weight=0.0, max_shift=0),
        ),
        "zeroq-ce": Peer(
            "images optimised for batch-norm statistics and one class each",
            optimized(PLAIN_LABELS, num_scales=1, tv_weight=0.0, max_shift=0),
        ),
        "scales": Peer(
            "images as sums of scales, shifted, one class each (ours without superposition)", optimized(PLAIN_LABELS)
        ),
        "generated": Peer(
            "images as sums of scales, started from those of a generator, superposed",
            optimized(mixed, start="generator").model_copy(update={"generator": GeneratorSettings(num_steps=400)}),
        ),
        "fast": Peer("images as sums of scales, shifted, superposed (ours)", optimized(mixed)),
    }


def main() -> None:
    """Compute what is missing."""
    options = _options()
    teacher, images, full = prepare(options)
    for seed in options.seeds:
        for name in options.peers:
            missing = without_result(options.bits, lambda bits, name=name, seed=seed: _path(options, name, bits, seed))
            if missing:
                _run(options, teacher, images, full, name, seed, missing)


def _run(
    options: argparse.Namespace,
    teacher: Teacher,
    images: LabelledImages,
    full: float,
    name: str,
    seed: int,
    missing: list[str],
) -> None:
    """Make the samples of one peer, and a student of them for every width that is missing."""
    peer = peers()[name]
    with ProgressDisplay() as progress:
        start = time.perf_counter()
        bank = _bank(teacher, peer, seed, progress)
        bank_seconds = time.perf_counter() - start
        for bits in missing:
            weight_bits, activation_bits = parse_bits(bits)
            quantization = QuantizationSettings(weight_bits=weight_bits, activation_bits=activation_bits)
            start = time.perf_counter()
            settings = _distillation(teacher, peer, options.steps)
            student = quantize_with(teacher, bank, quantization, settings, seed=seed, progress=progress)
            seconds = time.perf_counter() - start
            result = evaluate(student, images, teacher.input_spec, teacher=teacher)
            values = {
                "network": options.network,
                "bits": bits,
                "peer": name,
                "description": peer.description,
                "seed": seed,
                "num_steps": options.steps,
                "full_precision": full,
                "top1": result.top1,
                "drop": full - result.top1,
                "agreement": result.agreement,
                "bank_seconds": round(bank_seconds, 1),
                "student_seconds": round(seconds, 1),
            }
            keep(_path(options, name, bits, seed), values, f"drop {full - result.top1:.2f}")


def _bank(teacher: Teacher, peer: Peer, seed: int, progress: ProgressCallback) -> SampleBank:
    if peer.synthesis is None:
        return noise_bank(teacher, SynthesisSettings(num_optimized=NUM_SAMPLES), seed)
    return synthesize(teacher, settings=peer.synthesis, seed=seed, progress=progress)


def _distillation(teacher: Teacher, peer: Peer, num_steps: int) -> DistillationSettings:
    settings = recipe("fast", teacher.input_spec, teacher.num_classes).distillation
    update: dict[str, object] = {"num_steps": num_steps}
    if peer.beside_student:
        update |= {"fresh_share": 1.0, "generator_steps_per_step": 1}
    return settings.model_copy(update=update)


def _path(options: argparse.Namespace, name: str, bits: str, seed: int) -> Path:
    return INGREDIENTS / f"{options.network}-{bits}-{name}-{seed}.json"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("--bits", nargs="+", default=["w4a4", "w3a3"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--peers", nargs="+", choices=list(peers()), default=list(peers()))
    parser.add_argument("--steps", type=int, default=1000, help="training steps of every student")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
