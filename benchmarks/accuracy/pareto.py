"""Bits per layer against the same bits everywhere, at exactly the same size or bit operations; resumable.

    python -m benchmarks.accuracy.pareto resnet20_cifar10 --points size:w3a8 bops:w4a4 --seeds 0 1 2

A point names a measure, and the uniform bits whose cost is the budget. Uniform students that drops.py has
measured are not made again, nor are banks. benchmarks/tables.py writes the table of docs/mixed-precision.md.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

from benchmarks.accuracy.drops import kept_bank
from benchmarks.accuracy.tables import DROPS, PARETO
from benchmarks.measurement import BANKS, keep, prepare, without_result
from qimera import (
    Allocation,
    DistillationSettings,
    LabelledImages,
    QuantizationSettings,
    SampleBank,
    Sensitivity,
    Teacher,
    allocate_bits,
    evaluate,
    measure_sensitivity,
    quantize,
    recipe,
)
from qimera.cli.console import ProgressDisplay
from qimera.config.bits import parse_bits
from qimera.mixed_precision.budget import Budget, layer_choices


def main() -> None:
    """Compute what is missing."""
    options = _options()
    teacher, images, full = prepare(options)
    chosen = recipe(options.recipe, teacher.input_spec, teacher.num_classes)
    for seed in options.seeds:
        missing = without_result(options.points, lambda point, seed=seed: _path(options, point, seed))
        if missing:
            path = options.banks / f"{options.network}-{options.recipe}-{seed}"
            with ProgressDisplay() as progress:
                bank, _ = kept_bank(path, teacher, chosen.synthesis, seed, progress)
            sensitivity, seconds = _sensitivity(path.with_name(f"{path.name}-sensitivity.json"), teacher, bank, seed)
            for point in missing:
                allocation, uniform = _allocation(point, teacher, bank, sensitivity)
                top1 = {
                    "uniform": _uniform(options, point, teacher, bank, images, seed, chosen.distillation),
                    "allocated": _top1(
                        teacher, bank, images, _bits(point), allocation.layer_bits, seed, chosen.distillation
                    ),
                }
                _write(options, point, seed, full, allocation, uniform, top1, seconds)


def _sensitivity(path: Path, teacher: Teacher, bank: SampleBank, seed: int) -> tuple[Sensitivity, float]:
    """Return what is measured once for all budgets, and the seconds that it took."""
    timing = path.with_suffix(".seconds")
    if not path.exists():
        start = time.perf_counter()
        sensitivity = measure_sensitivity(teacher, bank, seed=seed)
        timing.write_text(f"{time.perf_counter() - start:.1f}")
        sensitivity.save(path)
    return Sensitivity.load(path), float(timing.read_text())


def _allocation(
    point: str, teacher: Teacher, bank: SampleBank, sensitivity: Sensitivity
) -> tuple[Allocation, dict[str, float]]:
    """Return the bits per layer that cost no more than the uniform ones, and what these cost and should lose."""
    measure, bits = point.split(":")
    pair = parse_bits(bits)
    budget = Budget("bops" if measure == "bops" else "size", 1.0)
    settings = QuantizationSettings(weight_bits=pair[0], activation_bits=pair[1])
    choices = layer_choices(teacher, settings, budget)
    cost = sum(choice.costs[pair] for choice in choices)
    share = (cost + 0.5) / budget.full(teacher)  # half a unit more, for the rounding of its digits
    allocation = allocate_bits(teacher, bank, f"{measure}={share:.12f}", bits, sensitivity=sensitivity)
    loss = sum(
        sensitivity.loss(choice.name, pair[0], pair[1] if any(a != pair[1] for _, a in choice.costs) else None)
        for choice in choices
    )
    assert allocation.cost <= cost
    return allocation, {"cost": cost, "loss": loss}


def _uniform(
    options: argparse.Namespace,
    point: str,
    teacher: Teacher,
    bank: SampleBank,
    images: LabelledImages,
    seed: int,
    distillation: DistillationSettings,
) -> float:
    """Return the top-1 of the uniform student, from wherever it is known."""
    bits = _bits(point)
    known = DROPS / options.network / f"{bits}-hardware-{options.recipe}-{seed}.json"
    for path in (known, *PARETO.glob(f"{options.network}-*-{bits}-{options.recipe}-{seed}.json")):
        if path.exists():
            values = json.loads(path.read_text())
            return float(values.get("uniform_top1", values.get("top1")))
    return _top1(teacher, bank, images, bits, "", seed, distillation)


def _top1(
    teacher: Teacher,
    bank: SampleBank,
    images: LabelledImages,
    bits: str,
    layer_bits: str,
    seed: int,
    distillation: DistillationSettings,
) -> float:
    student = quantize(teacher, bank, bits, layer_bits=layer_bits, settings=distillation, seed=seed)
    return evaluate(student, images, teacher.input_spec).top1


def _write(
    options: argparse.Namespace,
    point: str,
    seed: int,
    full: float,
    allocation: Allocation,
    uniform: dict[str, float],
    top1: dict[str, float],
    seconds: float,
) -> None:
    counts = Counter((layer.weight_bits, layer.activation_bits) for layer in allocation.layers)
    values = {
        "network": options.network,
        "measure": point.split(":")[0],
        "bits": _bits(point),
        "recipe": options.recipe,
        "seed": seed,
        "full_precision": full,
        "share": allocation.cost / allocation.full,
        "uniform_share": uniform["cost"] / allocation.full,
        "uniform_top1": top1["uniform"],
        "top1": top1["allocated"],
        "uniform_loss": uniform["loss"],
        "loss": allocation.loss,
        "widths": {f"w{w}a{a}": counts[w, a] for w, a in sorted(counts)},
        "layer_bits": allocation.layer_bits,
        "sensitivity_seconds": seconds,
    }
    keep(_path(options, point, seed), values, f"uniform {top1['uniform']:.2f}, allocated {top1['allocated']:.2f}")


def _bits(point: str) -> str:
    return point.split(":")[1]


def _path(options: argparse.Namespace, point: str, seed: int) -> Path:
    return PARETO / f"{options.network}-{point.replace(':', '-')}-{options.recipe}-{seed}.json"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("--points", nargs="+", default=["size:w3a8", "bops:w4a4", "bops:w3a3"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--recipe", default="ptq")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--banks", type=Path, default=BANKS, help="where banks are kept")
    return parser.parse_args()


if __name__ == "__main__":
    main()
