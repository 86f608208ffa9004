"""What samples of networks without batch norms are worth: each term of the synthesis on and off, all else equal.

    python -m benchmarks.accuracy.without_norms mnist_vit mnist_convnext --seeds 0 1 2
    python -m benchmarks.accuracy.without_norms cct4_cifar10 --seeds 0 --images 2000  # of the zoo

Every row has the settings of recipe ptq, without held-out samples, and no training. Results are kept one file each in
results/without_norms, and benchmarks/tables.py writes the table.
"""

import argparse

from benchmarks.accuracy.drops import noise_bank
from benchmarks.accuracy.tables import WITHOUT_NORMS
from benchmarks.measurement import keep, prepare, without_result
from qimera import LabelledImages, QuantizationSettings, Teacher, evaluate, recipe, synthesize
from qimera.config.bits import parse_bits
from qimera.pipeline import quantize_with

WEIGHTS: dict[str, dict[str, float | str] | None] = {
    "Gaussian noise": None,
    "classes alone": {"layer_norm_weight": 0.0, "attention_weight": 0.0},
    "and layer norms": {"attention_weight": 0.0},
    "and attention": {"layer_norm_weight": 0.0},
    "and both (as in every recipe)": {},
    "classes and entropy (PSAQ-ViT)": {"layer_norm_weight": 0.0, "ce_weight": 1.0, "attention_loss": "entropy"},
    "classes and heads (MimiQ)": {"layer_norm_weight": 0.0, "ce_weight": 1.0, "attention_loss": "heads"},
}
"""Rows of the table, and what of the settings differs."""


def main() -> None:
    """Compute what is missing."""
    options = _options()
    for network in options.networks:
        options.network = network
        teacher, images, _ = prepare(options)
        images = LabelledImages(images.images[: options.images], images.labels[: options.images])
        for seed in options.seeds:
            for number, row in enumerate(WEIGHTS):
                stem = f"{options.network}-{{}}-{number}-{seed}.json"
                missing = without_result(options.bits, lambda bits, stem=stem: WITHOUT_NORMS / stem.format(bits))
                for bits, values in _measured(teacher, images, row, seed, missing).items():
                    keep(WITHOUT_NORMS / stem.format(bits), {"network": network, **values}, row)


def _measured(
    teacher: Teacher, images: LabelledImages, row: str, seed: int, missing: list[str]
) -> dict[str, dict[str, object]]:
    """Make the samples of one row, and a student of them for every width that is missing."""
    if not missing:
        return {}
    ptq, weights = recipe("ptq", teacher.input_spec, teacher.num_classes), WEIGHTS[row]
    settings = ptq.synthesis.replace(num_held_out=0, direct=ptq.synthesis.direct.replace(**(weights or {})))
    bank = noise_bank(teacher, settings, seed) if weights is None else synthesize(teacher, settings=settings, seed=seed)
    found: dict[str, dict[str, object]] = {}
    for bits in missing:
        weight_bits, activation_bits = parse_bits(bits)
        quantization = QuantizationSettings(weight_bits=weight_bits, activation_bits=activation_bits)
        student = quantize_with(teacher, bank, quantization, ptq.distillation, seed=seed)
        result = evaluate(student, images, teacher.input_spec, teacher=teacher)
        assert result.teacher_top1 is not None
        found[bits] = {
            "samples": row,
            "bits": bits,
            "seed": seed,
            "num_images": len(images),
            "full_precision": result.teacher_top1,
            "drop": result.teacher_top1 - result.top1,
            "agreement": result.agreement,
        }
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--bits", nargs="+", default=["w4a4", "w3a3"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=10_000, help="images that score, the first of their set")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
