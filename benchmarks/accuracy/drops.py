"""The drop from full precision: networks x bits x seeds, one JSON file a result, resumable.

    python -m benchmarks.accuracy.drops resnet20_cifar10 --bits w4a4 w3a3 --seeds 0 1 2
    python -m benchmarks.accuracy.drops resnet20_cifar100 --bits w3a3 --no-superposition
    python -m benchmarks.accuracy.drops resnet20_cifar10 --first-last-bits 8  # rows of a table of their own
    python -m benchmarks.accuracy.drops resnet20_cifar10 --samples noise  # the floor: nearest integers
    python -m benchmarks.accuracy.drops resnet20_cifar10 --samples real   # the ceiling: trained on real images

A result that is there already is not computed again, and a bank serves every bit width. benchmarks/tables.py writes
the README's tables from the files. Real images are those of the zoo's set that ends in _train, for the networks that
were trained on it.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from benchmarks.accuracy.tables import DROPS
from benchmarks.measurement import BANKS, device_name, keep, prepare, without_result
from benchmarks.zoo import load_training_images
from qimera import (
    Evaluation,
    LabelledImages,
    QuantizationSettings,
    SampleBank,
    Student,
    Teacher,
    evaluate,
    recipe,
    synthesize,
)
from qimera.assessment.estimation import held_out_distances, mean_percent
from qimera.cli.console import ProgressDisplay
from qimera.config.bits import parse_bits
from qimera.config.settings import SynthesisSettings
from qimera.machine.progress import ProgressCallback
from qimera.pipeline import quantize_with


def main() -> None:
    """Compute what is missing."""
    options = _options()
    teacher, images, full = prepare(options)
    for seed in options.seeds:
        missing = without_result(options.bits, lambda bits, seed=seed: _path(options, bits, seed))
        if missing:
            _run_seed(options, teacher, images, full, seed, missing)


def _run_seed(
    options: argparse.Namespace,
    teacher: Teacher,
    images: LabelledImages,
    full: float,
    seed: int,
    missing: list[str],
) -> None:
    """Make one bank and every missing student of it."""
    chosen = recipe(options.recipe, teacher.input_spec, teacher.num_classes)
    synthesis, distillation = chosen.synthesis, chosen.distillation
    if options.samples == "noise":
        distillation = distillation.model_copy(update={"num_steps": 0, "start": "nearest"})
    if options.no_superposition:
        labels = synthesis.labels.model_copy(update={"superposition": False})
        synthesis = SynthesisSettings.model_validate(synthesis.model_dump() | {"labels": labels.model_dump()})
    with ProgressDisplay() as progress:
        bank, bank_seconds = _bank(options, teacher, synthesis, seed, progress)
        for bits in missing:
            weight_bits, activation_bits = parse_bits(bits)
            quantization = QuantizationSettings(
                weight_bits=weight_bits,
                activation_bits=activation_bits,
                first_last_bits=options.first_last_bits,
                scheme=options.scheme,
            )
            start = time.perf_counter()
            student = quantize_with(
                teacher, bank, quantization, distillation, seed=seed, device=options.device, progress=progress
            )
            student_seconds = time.perf_counter() - start
            told = _told(student, bank) if bank.settings.num_held_out and teacher.batch_norms else {}
            result = evaluate(student, images, teacher.input_spec, teacher=teacher)
            _write(options, bits, seed, full, result, told, bank, (bank_seconds, student_seconds))


def _told(student: Student, bank: SampleBank) -> dict[str, object]:
    """Return what an estimate comes from: the mean distance of superposed samples in percent, and its error."""
    _, superposed, _ = held_out_distances(student, bank)
    if not len(superposed):
        return {}
    percent, error = mean_percent(superposed)
    return {"superposed": round(percent, 3), "superposed_error": round(error, 3)}


def _bank(
    options: argparse.Namespace,
    teacher: Teacher,
    settings: SynthesisSettings,
    seed: int,
    progress: ProgressCallback,
) -> tuple[SampleBank, float]:
    """Return the bank of this seed, or what stands in its place, and the seconds that it took."""
    if options.samples != "bank":
        return _other_samples(options, teacher, settings, seed), 0.0
    path = options.banks / f"{options.network}-{options.recipe}{_variant(options)}-{seed}"
    return kept_bank(path, teacher, settings, seed, progress, options.device)


def kept_bank(
    path: Path,
    teacher: Teacher,
    settings: SynthesisSettings,
    seed: int,
    progress: ProgressCallback,
    device: str = "cpu",
) -> tuple[SampleBank, float]:
    """Return the bank in ``path`` and the seconds that it took; it is made if it is not there."""
    timing = path.with_suffix(".json")
    if timing.exists():
        bank = SampleBank.load(path, teacher)
        if bank.settings == settings:
            return bank, float(json.loads(timing.read_text())["seconds"])
        raise SystemExit(f"{path}: a bank of other settings; remove it, or choose another --banks")
    start = time.perf_counter()
    bank = synthesize(teacher, settings=settings, seed=seed, device=device, progress=progress)
    seconds = time.perf_counter() - start
    bank.save(path)
    timing.write_text(json.dumps({"seconds": seconds, "threads": torch.get_num_threads()}) + "\n")
    return bank, seconds


def _other_samples(options: argparse.Namespace, teacher: Teacher, settings: SynthesisSettings, seed: int) -> SampleBank:
    """Return noise or real images in the place of a bank; labels are uniform, for nothing reads them."""
    if options.samples == "noise":
        return noise_bank(teacher, settings, seed)
    pixels = torch.from_numpy(load_training_images(options.network)).permute(0, 3, 1, 2).contiguous()
    return _unlabelled(teacher.input_spec.normalize(pixels), teacher, settings, seed)


def noise_bank(teacher: Teacher, settings: SynthesisSettings, seed: int) -> SampleBank:
    """Return as many images of Gaussian noise, within the valid range, as the settings optimise."""
    spec = teacher.input_spec
    images = torch.randn(settings.num_optimized, *spec.shape, generator=torch.Generator().manual_seed(seed))
    return _unlabelled(torch.minimum(torch.maximum(images, spec.low), spec.high), teacher, settings, seed)


def _unlabelled(images: torch.Tensor, teacher: Teacher, settings: SynthesisSettings, seed: int) -> SampleBank:
    labels = torch.full((len(images), teacher.num_classes), 1 / teacher.num_classes)
    settings = settings.model_copy(update={"num_held_out": 0})  # the student sees all of them
    return SampleBank.from_images(images, labels, teacher, settings, seed)


def _write(
    options: argparse.Namespace,
    bits: str,
    seed: int,
    full: float,
    result: Evaluation,
    told: dict[str, object],
    bank: SampleBank,
    seconds: tuple[float, float],
) -> None:
    values = {
        "network": options.network,
        "bits": bits,
        "recipe": options.recipe,
        "scheme": options.scheme,
        "first_last_bits": options.first_last_bits,
        "superposition": not options.no_superposition,
        "samples": options.samples,
        "seed": seed,
        "full_precision": full,
        "top1": result.top1,
        "drop": full - result.top1,
        "agreement": result.agreement,
        **told,
        "num_images": result.num_images,
        "num_samples": len(bank),
        "bank_seconds": round(seconds[0], 1),
        "student_seconds": round(seconds[1], 1),
        "device": device_name(options.device),
    }
    keep(_path(options, bits, seed), values, f"top-1 {result.top1:.2f}, drop {full - result.top1:.2f}")


def _path(options: argparse.Namespace, bits: str, seed: int) -> Path:
    ends = f"-ends{options.first_last_bits}" if options.first_last_bits else ""
    return DROPS / options.network / f"{bits}{ends}-{options.scheme}-{options.recipe}{_variant(options)}-{seed}.json"


def _variant(options: argparse.Namespace) -> str:
    """Return what marks the files of results and banks that are not of the recipe as it is."""
    if options.samples != "bank":
        return f"-{options.samples}"
    return "-no-superposition" if options.no_superposition else ""


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("--bits", nargs="+", default=["w4a4"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--scheme", default="hardware", choices=("hardware", "paper"))
    parser.add_argument("--first-last-bits", type=int, default=0, help="of the first and the last layer")
    parser.add_argument("--no-superposition", action="store_true")
    parser.add_argument("--samples", default="bank", choices=("bank", "noise", "real"), help="what the student sees")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="where samples and students are trained")
    parser.add_argument("--banks", type=Path, default=BANKS, help="where banks are kept")
    return parser.parse_args()


if __name__ == "__main__":
    main()
