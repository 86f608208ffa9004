"""The estimated drop against the real one: students of varied quality of six networks, one JSON file a network.

    python -m benchmarks.estimation.drops measure resnet20_cifar10 mobilenetv2_cifar10  # hours; can be resumed
    python -m benchmarks.estimation.drops fit        # the constants of assessment/estimation.py, and results/drops

``measure`` keeps the bank and the logits of every student on held-out samples and on real test images under --work.
``fit`` finds the constants from all networks, estimates the drop of each network's students with constants from the
other networks, and writes one file a network. benchmarks/tables.py writes docs/estimation.md from these.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.measurement import BANKS
from benchmarks.zoo import load_subject
from qimera import LabelledImages, QuantizationSettings, SampleBank, Teacher, recipe, synthesize
from qimera.assessment.estimation import Calibration, distance, estimate_from, lifelike, standard_error, views_of
from qimera.config.bits import parse_bits
from qimera.pipeline import quantize_with

RESULTS = Path(__file__).parent / "results" / "drops"
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
)
MANY = (*FEW, Run("w4a3"), Run("w2a8"), Run("w4a4", "nearest", 200), Run("w5a5", "nearest"))
DIGITS = (Run("w8a8"), Run("w4a4"), Run("w3a3"), Run("w2a4"), Run("w3a2"), Run("w2a2"))
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
    "mnist_cnn": Subject(128, 128, 60, 1, DIGITS),
    "mobilenet_v1_075_imagenet": Subject(64, 32, 80, 1, LARGE),
}


def measure(network: str, work: Path) -> None:
    """Keep what every student of the network answers, and what its teacher does."""
    subject = SUBJECTS[network]
    teacher, data = load_subject(network)
    bank = bank_of(network, subject, teacher, work)
    images, labels = test_images(data, subject, teacher)
    views = views_of(bank.held_out.images) | {"train": bank.take(slice(bank.num_training)).images}
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


@dataclass(frozen=True)
class Row:
    """What was found for one student."""

    network: str
    run: Run
    distances: Tensor
    """Of held-out samples."""
    drop: float
    """On real images, in points."""
    real_agreement: float
    """Of real images, in percent."""
    agreement: float
    """Of held-out samples, in percent."""
    trained_agreement: float
    """Of samples that the student was made from, in percent."""
    num_images: int

    @property
    def distance(self) -> float:
        """The mean distance, in percent."""
        return 100 * float(self.distances.mean())

    def values(self, calibration: Calibration) -> dict[str, str | int | float]:
        """Return what is written, with the estimate that this calibration makes."""
        estimate = estimate_from(self.distances, self.agreement, calibration)
        found = {"drop": self.drop, "estimate": estimate.drop, "low": estimate.low, "high": estimate.high}
        more = {"distance": self.distance, "agreement": self.agreement, "trained_agreement": self.trained_agreement}
        numbers = {**found, **more, "real_agreement": self.real_agreement}
        return {**asdict(self.run), **{name: round(value, 3) for name, value in numbers.items()}}


OTHER_SCORES: dict[str, Callable[[Row], float]] = {
    "from_agreement": lambda row: 100 - row.agreement,
    "from_trained_agreement": lambda row: 100 - row.trained_agreement,
    "from_real_agreement": lambda row: 100 - row.real_agreement,
}
"""What an estimate could be made from instead; the last one needs real images."""


def write(work: Path) -> None:
    """Find the constants, and write each network's runs with what other networks' constants make of them."""
    rows = [row for network in SUBJECTS for row in _rows(network, work)]
    print(f"CALIBRATION = {fit(rows)}  # {len(rows)} runs")
    for network in dict.fromkeys(row.network for row in rows):
        others = [row for row in rows if row.network != network]
        calibration = fit(others)
        laws = {name: _law(others, score) for name, score in OTHER_SCORES.items()}
        found = {
            "network": network,
            "num_held_out": SUBJECTS[network].num_held_out,
            "num_images": next(row.num_images for row in rows if row.network == network),
            "calibration_of_other_networks": calibration._asdict(),
            "runs": [row.values(calibration) | _others(row, laws) for row in rows if row.network == network],
            "torch": torch.__version__,
            "date": datetime.now(UTC).date().isoformat(),
            "command": "; ".join(
                f"python -m benchmarks.estimation.drops {what}" for what in (f"measure {network}", "fit")
            ),
        }
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{network}.json").write_text(json.dumps(found, indent=1) + "\n")


def _others(row: Row, laws: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Return the estimates that other scores would give."""
    return {name: round(factor * OTHER_SCORES[name](row) ** power, 3) for name, (factor, power) in laws.items()}


def _rows(network: str, work: Path) -> list[Row]:
    """Return what was measured of a network."""
    if not (work / f"{network}.npz").exists():
        return []
    teacher = dict(np.load(work / f"{network}.npz"))
    labels, right = teacher["labels"], teacher["test"].argmax(1)
    telling = lifelike(torch.from_numpy(teacher["soft"]), torch.from_numpy(teacher["plain"])).numpy()
    rows = []
    for run in SUBJECTS[network].runs:
        path = work / f"{network}-{run.name}.npz"
        if not path.exists():
            continue
        answers = dict(np.load(path))
        pairs = [(answers[view][telling], teacher[view][telling]) for view in ("plain", "moved")]
        distances = [distance(torch.from_numpy(mine), torch.from_numpy(theirs)) for mine, theirs in pairs]
        rows.append(
            Row(
                network,
                run,
                torch.stack(distances).mean(0),
                100 * float((right == labels).mean() - (answers["test"] == labels).mean()),
                100 * float((answers["test"] == right).mean()),
                *(_agreement(*pair) for pair in (pairs[0], (answers["train"], teacher["train"]))),
                len(labels),
            )
        )
    return rows


def _agreement(student: np.ndarray, teacher: np.ndarray) -> float:
    return 100 * float((student.argmax(1) == teacher.argmax(1)).mean())


_OFFSET = 0.5
"""Points that drops are moved by before logarithms are taken: below, differences count rather than ratios."""

_POWERS = tuple(np.linspace(0.5, 2.0, 61))


def fit(rows: Sequence[Row]) -> Calibration:
    """Return the factor nearest to the drops, and the errors that it made for networks that it did not know."""
    factor = _factor(rows)
    errors = []
    for network in dict.fromkeys(row.network for row in rows):
        known = _factor([row for row in rows if row.network != network] or rows)
        errors += [(row, known) for row in rows if row.network == network]
    fixed, relative = _scatter(errors)
    return Calibration(*(round(each, 3) for each in (factor, fixed, relative)))


def _factor(rows: Sequence[Row]) -> float:
    return _law(rows, lambda row: row.distance, (1.0,))[0]


def _law(
    rows: Sequence[Row], score_of: Callable[[Row], float], powers: Sequence[float] = _POWERS
) -> tuple[float, float]:
    """Return factor and power of the law with the least squared error of the logarithm, by trying all."""
    factor = np.exp(np.linspace(-7, 2, 451))[:, None, None]
    power = np.array(powers)[None, :, None]
    score = np.array([score_of(row) for row in rows])
    drop = np.array([max(row.drop, 0) for row in rows])
    error = np.square(np.log(factor * score**power + _OFFSET) - np.log(drop + _OFFSET)).mean(2)
    best = np.unravel_index(error.argmin(), error.shape)
    return float(factor[best[0], 0, 0]), float(power[0, best[1], 0])


def _scatter(errors: Sequence[tuple[Row, float]]) -> tuple[float, float]:
    """Return the fixed and the relative error under which rows miss these factors' estimates as they do.

    By trying all. What so few held-out samples scatter is known and counted apart; what so few real images do is not.
    """
    estimate = np.array([factor * row.distance for row, factor in errors])
    missed = np.array([row.drop for row, _ in errors]) - estimate
    known = np.square([100 * factor * standard_error(row.distances) for row, factor in errors])
    fixed = np.linspace(0.05, 3, 60)[:, None, None]
    relative = np.linspace(0, 1, 101)[None, :, None]
    variance = fixed**2 + (relative * estimate) ** 2 + known
    likelihood = -(np.log(variance) + missed**2 / variance).mean(2)
    best = np.unravel_index(likelihood.argmax(), likelihood.shape)
    return float(fixed[best[0], 0, 0]), float(relative[0, best[1], 0])


def main() -> None:
    """Measure, or fit and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "fit"))
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(SUBJECTS)}")
    parser.add_argument("--work", type=Path, default=WORK, help="where banks and logits are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options.work.mkdir(parents=True, exist_ok=True)
    if options.what == "fit":
        write(options.work)
    for name in options.networks or SUBJECTS if options.what == "measure" else ():
        measure(name, options.work)


if __name__ == "__main__":
    main()
