"""Banks of right and wrong inputs, and of networks that know nothing: which of them are doubted, and what that spares.

    python -m benchmarks.estimation.doubts          # an hour on one core; can be resumed
    python -m benchmarks.estimation.doubts mnist_cnn

Each bank is diagnosed, a student is quantized with it as recipe ptq does (W4A4), and the drop that would be estimated
is compared with the real one. benchmarks/tables.py writes docs/estimation.md from results/doubts.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.estimation.drops import SUBJECTS, logits_of, test_images
from benchmarks.zoo import load_model_of, load_subject
from qimera import InputSpec, Teacher, recipe, synthesize
from qimera.assessment.diagnostics import diagnose
from qimera.assessment.estimation import estimate_on_held_out
from qimera.config.settings import QuantizationSettings
from qimera.pipeline import quantize_with

RESULTS = Path(__file__).parent / "results" / "doubts"
SMALL, LARGE = {"num_optimized": 128, "num_held_out": 128}, {"num_optimized": 32, "num_held_out": 32}


@dataclass(frozen=True)
class Case:
    """A bank as a user might make it."""

    name: str
    is_right: bool
    spec_of: Callable[[InputSpec], InputSpec] = lambda spec: spec
    """What the user says of the images."""
    spoil_: Callable[[nn.Module], None] = lambda model: None
    """What is wrong with the weights."""
    num_steps: int = 0
    """Of synthesis; 0 for those of recipe ptq."""
    seed: int = 0


def _spec(mean: float, std: float, pixel_range: tuple[float, float] = (0, 1)) -> Callable[[InputSpec], InputSpec]:
    def changed(spec: InputSpec) -> InputSpec:
        channels = spec.shape[0]
        return InputSpec(shape=spec.shape, mean=(mean,) * channels, std=(std,) * channels, pixel_range=pixel_range)

    return changed


def _forget_(model: nn.Module) -> None:
    """Give every layer the weights that it had before training."""
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


@torch.no_grad()
def _scramble_(model: nn.Module) -> None:
    """Permute the weights within each convolution, and leave batch norms as they are."""
    rng = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 4:
            order = torch.randperm(parameter.numel(), generator=rng)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))


CASES = (
    Case("right", True),
    Case("right, seed 1", True, seed=1),
    Case("right, seed 2", True, seed=2),
    Case("right, 160 steps", True, num_steps=160),
    Case("mean 0, std 1", False, _spec(0, 1)),
    Case("mean 0.5, std 0.5", False, _spec(0.5, 0.5)),
    Case("mean 0, std 1, pixels to 255", False, _spec(0, 1, (0, 255))),
    Case("untrained", False, spoil_=_forget_),
    Case("scrambled weights", False, spoil_=_scramble_),
)


def measure(network: str, names: Sequence[str]) -> None:
    """Write what becomes of each case of a network that has no result yet."""
    path = RESULTS / f"{network}.json"
    found = json.loads(path.read_text())["cases"] if path.exists() else {}
    missing = [case for case in CASES if case.name in names and case.name not in found]
    if not missing:
        print(f"{network}: all these cases are in {path}; remove it to measure again")
        return
    right, data = load_subject(network)
    images, labels = test_images(data, SUBJECTS[network], right)
    for case in missing:
        start = time.perf_counter()
        found[case.name] = _examine(case, network, right.input_spec, images, torch.from_numpy(labels))
        _write(path, network, found)
        print(f"{network}, {case.name}: {time.perf_counter() - start:.0f} s, {found[case.name]}", flush=True)


def _examine(case: Case, network: str, spec: InputSpec, images: Tensor, labels: Tensor) -> dict[str, object]:
    model = load_model_of(network)
    case.spoil_(model)
    teacher = Teacher.capture(model, case.spec_of(spec))
    settings = recipe("ptq", spec, teacher.num_classes)
    counts = LARGE if spec.shape[1] > 96 else SMALL
    direct = settings.synthesis.direct.replace(num_steps=case.num_steps or settings.synthesis.direct.num_steps)
    bank = synthesize(teacher, settings=settings.synthesis.replace(**counts, direct=direct), seed=case.seed)
    diagnosis = diagnose(bank, teacher)
    bits = QuantizationSettings(weight_bits=4, activation_bits=4)
    student = quantize_with(teacher, bank, bits, settings.distillation)
    estimate = estimate_on_held_out(student, teacher, bank)
    drop = _top1(teacher, images, labels) - _top1(student, images, labels)
    gaps = list(diagnosis.statistics_gap.values())
    numbers = {
        "worst_gap": max(gaps),
        "mean_gap": sum(gaps) / len(gaps),
        "recognised": diagnosis.recognised,
        "confidence": diagnosis.confidence,
        "clipped": diagnosis.clipped,
        "estimate": estimate.drop,
        "low": estimate.low,
        "high": estimate.high,
        "drop": drop,
    }
    doubts = [doubt.partition(":")[0] for doubt in diagnosis.doubts]
    rounded = {name: round(value, 4) for name, value in numbers.items()}
    return {"is_right": case.is_right, "doubts": doubts, **rounded}


def _top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * float((torch.from_numpy(logits_of(model, images)).argmax(1) == labels).float().mean())


def _write(path: Path, network: str, found: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "network": network,
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python -m benchmarks.estimation.doubts {network}",
        "cases": found,
    }
    path.write_text(json.dumps(facts, indent=1) + "\n")


def main() -> None:
    """Measure what has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(SUBJECTS)}")
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in options.networks or SUBJECTS:
        measure(name, options.cases)


if __name__ == "__main__":
    main()
