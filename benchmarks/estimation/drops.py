"""The estimated drop against the real one: students of varied quality of ten networks, one JSON file a network.

    python -m benchmarks.estimation.drops measure resnet20_cifar10 mobilenetv2_cifar10  # an hour for all, in pieces
    python -m benchmarks.estimation.drops fit        # the constants of assessment/estimation.py

``measure`` keeps the bank and the logits of every student on held-out samples and on real test images under --work, and
writes what they come to into results/drops. ``fit`` finds the constants from all networks. benchmarks/tables.py writes
docs/estimation.md, where the drops of each network's students are estimated with constants from the other networks.
"""

import argparse
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.estimation.calibration import ESTIMATION as RESULTS, fit, of_one_class, students
from benchmarks.measurement import BANKS, keep
from benchmarks.zoo import load_subject
from qimera import LabelledImages, QuantizationSettings, SampleBank, Teacher, recipe, synthesize
from qimera.assessment.estimation import distance, mean_percent, telling
from qimera.config.bits import parse_bits
from qimera.pipeline import quantize_with

WORK = BANKS / "estimation"


@dataclass(frozen=True)
class Run:
    """One student."""

    bits: str
    start: str = "compensated"
    num_steps: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        """The stem of its file."""
        return f"{self.bits}-{self.start}-{self.num_steps}-{self.seed}"


FEW = (
    Run("w8a8"),
    Run("w4a4"),
    Run("w3a3"),
    Run("w4a4", "nearest"),
    Run("w5a5"),
    Run("w3a8"),
    Run("w4a8", "nearest"),
    Run("w3a3", "nearest", 200),
    Run("w4a4", "nearest", 2000),
    Run("w3a3", "nearest", 2000),
)
MANY = (*FEW, Run("w4a3"), Run("w2a8"), Run("w4a4", "nearest", 200), Run("w5a5", "nearest"))
DIGITS = (Run("w8a8"), Run("w4a4"), Run("w3a3"), Run("w2a4"), Run("w3a2"), Run("w2a2"))
TRAINED_DIGITS = (Run("w3a3", "nearest", 2000), Run("w2a4", "nearest", 2000), Run("w2a2", "nearest", 2000))
WITHOUT_NORMS = (Run("w8a8"), Run("w5a5"), Run("w4a4"), Run("w3a3"), Run("w4a4", "nearest"))
LARGE = (Run("w8a8"), Run("w4a8"), Run("w5a5"), Run("w4a4"))


@dataclass(frozen=True)
class Subject:
    """How a network is measured; few samples and steps, for the estimate has to hold for these too."""

    num_optimized: int
    num_held_out: int
    num_steps: int
    """In the making of a sample."""
    every: int
    """Of the test images, one in so many is looked at."""
    runs: tuple[Run, ...]


SUBJECTS = {
    "resnet20_cifar10": Subject(256, 256, 60, 2, MANY),
    "resnet20_cifar100": Subject(128, 256, 60, 2, MANY),
    "mobilenetv2_cifar10": Subject(128, 128, 60, 4, FEW),
    "resnet56_cifar10": Subject(128, 128, 60, 4, FEW[:6]),
    "mnist_cnn": Subject(128, 128, 60, 1, (*DIGITS, *TRAINED_DIGITS)),
    "mobilenet_v1_075_imagenet": Subject(64, 32, 80, 1, LARGE),
    "efficientnet_lite0_imagenet": Subject(32, 32, 80, 1, LARGE),
    "cct4_cifar10": Subject(128, 128, 60, 4, WITHOUT_NORMS),
    "mnist_vit": Subject(128, 128, 60, 1, WITHOUT_NORMS),
    "mnist_convnext": Subject(128, 128, 60, 1, WITHOUT_NORMS),
}


def measure(network: str, work: Path) -> None:
    """Keep what every student of the network answers, and what its teacher does."""
    subject = SUBJECTS[network]
    teacher, data = load_subject(network)
    bank = bank_of(network, subject, teacher, work)
    images, labels = test_images(data, subject, teacher)
    views = {"held_out": bank.held_out.images, "train": bank.take(slice(bank.num_training)).images}
    path = work / f"{network}.npz"
    soft = bank.held_out.soft_labels.numpy()
    if not path.exists():
        _keep(
            path,
            labels=labels,
            soft=soft,
            test=logits_of(teacher, images),
            **{k: logits_of(teacher, v) for k, v in views.items()},
        )
    for run in subject.runs:
        path = work / f"{network}-{run.name}.npz"
        if path.exists():
            print(f"{path}: {network} {run.name} is measured already; remove the file to measure it again", flush=True)
        else:
            start = time.perf_counter()
            student = _student(run, teacher, bank)
            answers = {name: logits_of(student, view) for name, view in views.items()}
            _keep(path, test=logits_of(student, images).argmax(1), **answers)
            print(f"{network} {run.name}: {time.perf_counter() - start:.0f} s", flush=True)


def bank_of(network: str, subject: Subject, teacher: Teacher, work: Path) -> SampleBank:
    """Return the bank of a network, made before or now."""
    path = work / f"bank-{network}"
    if not path.exists():
        settings = recipe("ptq", teacher.input_spec, teacher.num_classes).synthesis
        direct = settings.direct.model_copy(update={"num_steps": subject.num_steps})
        counts = {"num_optimized": subject.num_optimized, "num_held_out": subject.num_held_out}
        synthesize(teacher, settings=settings.model_copy(update={**counts, "direct": direct}), seed=0).save(path)
    return SampleBank.load(path, teacher)


def test_images(data: LabelledImages, subject: Subject, teacher: Teacher) -> tuple[Tensor, np.ndarray]:
    """Return the real images that are looked at, normalised, and their classes."""
    images = np.ascontiguousarray(data.images[:: subject.every])
    normalized = teacher.input_spec.normalize(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())
    return normalized, np.asarray(data.labels)[:: subject.every]


def _student(run: Run, teacher: Teacher, bank: SampleBank) -> torch.nn.Module:
    weight_bits, activation_bits = parse_bits(run.bits)
    training = recipe("ptq", teacher.input_spec, teacher.num_classes).distillation
    training = training.model_copy(update={"num_steps": run.num_steps, "start": run.start})
    bits = QuantizationSettings(weight_bits=weight_bits, activation_bits=activation_bits)
    return quantize_with(teacher, bank, bits, training, seed=run.seed)


@torch.inference_mode()
def logits_of(model: torch.nn.Module, images: Tensor) -> np.ndarray:
    """Return what the model answers."""
    return torch.cat([model(part) for part in images.split(50)]).float().numpy()


def _keep(path: Path, **arrays: np.ndarray) -> None:
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **arrays)
    partial.replace(path)


def write(network: str, work: Path) -> None:
    """Write what was measured of a network."""
    teacher = dict(np.load(work / f"{network}.npz"))
    found = {
        "network": network,
        "num_classes": teacher["test"].shape[1],
        "num_held_out": SUBJECTS[network].num_held_out,
        "num_images": len(teacher["labels"]),
        "runs": [
            asdict(run) | _facts(teacher, dict(np.load(path)))
            for run in SUBJECTS[network].runs
            if (path := work / f"{network}-{run.name}.npz").exists()
        ],
    }
    keep(RESULTS / f"{network}.json", found, "measured")


def _facts(teacher: dict[str, np.ndarray], student: dict[str, np.ndarray]) -> dict[str, float]:
    """Return what the answers of a student come to, all in percent or points."""
    mine, theirs = (torch.from_numpy(each["held_out"]) for each in (student, teacher))
    single, superposed = telling(torch.from_numpy(teacher["soft"]), theirs)
    distances = distance(mine, theirs)
    near, near_error = mean_percent(distances[superposed])
    far, far_error = mean_percent(distances[single])
    labels, right = teacher["labels"], teacher["test"].argmax(1)
    numbers = {
        "drop": 100 * float((right == labels).mean() - (student["test"] == labels).mean()),
        "superposed": near,
        "superposed_error": near_error,
        "one_class": far,
        "one_class_error": far_error,
        "agreement": _agreement(mine[single].numpy(), theirs[single].numpy()),
        "trained_agreement": _agreement(student["train"], teacher["train"]),
        "real_agreement": 100 * float((student["test"] == right).mean()),
    }
    return {name: round(value, 3) for name, value in numbers.items()}


def _agreement(student: np.ndarray, teacher: np.ndarray) -> float:
    return 100 * float((student.argmax(1) == teacher.argmax(1)).mean())


def main() -> None:
    """Measure, or fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "fit"))
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(SUBJECTS)}")
    parser.add_argument("--work", type=Path, default=WORK, help="where banks and logits are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options.work.mkdir(parents=True, exist_ok=True)
    if options.what == "fit":
        print(f"SUPERPOSED = {fit(students())}")
        print(f"ONE_CLASS = {fit(of_one_class())}")
    for name in options.networks or SUBJECTS if options.what == "measure" else ():
        measure(name, options.work)
        write(name, options.work)


if __name__ == "__main__":
    main()
