"""The runs of docs/reproduction.md that are outstanding, the most important first, for as many minutes as there are.

    python -m benchmarks.queue --device cuda --minutes 12     # does as many as fit; the last one is interrupted
    python -m benchmarks.queue --list                         # what is done, begun and outstanding

A run that is interrupted continues when the same command is given again, on any device. ``--folder`` holds all of it:
results/NAME.json of finished runs, and states/NAME of the one that was begun, below 60 MB together.
"""

import argparse
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measurement import device_name, keep
from benchmarks.zoo import load_subject
from qimera import LabelledImages, QuantizationSettings, Teacher, recipe
from qimera.cli.console import ProgressDisplay
from qimera.config.bits import parse_bits
from qimera.config.run_settings import RunSettings
from qimera.machine.acceleration import find_device
from qimera.runs.directory import RunDirectory
from qimera.runs.execution import carry_out, evaluate_run

FOLDER = Path(__file__).parent
_SECONDS_TO_SAVE = 20.0
"""Kept back at the end: the last step is finished and saved, and a finished student scored."""


@dataclass(frozen=True)
class Row:
    """One run."""

    network: str
    bits: str
    recipe: str
    seed: int = 0
    variant: str = ""
    """``released``: as the authors' scripts run it, the mapping off."""
    share: float = 1.0
    """Of the student's steps and of all milestones. The generator's own steps before them are never scaled: the ranges
    of activations come from what it draws then, and stay as they are."""

    @property
    def name(self) -> str:
        """The stem of its files."""
        parts = [self.network, self.bits, self.recipe, self.variant, "" if self.share == 1 else f"{self.share:g}"]
        return "-".join([*filter(None, parts), str(self.seed)])


PAPER = [
    Row("resnet20_cifar10", "w4a4", "paper"),
    Row("resnet20_cifar100", "w4a4", "paper"),
    Row("resnet20_cifar10", "w5a5", "paper"),
    Row("resnet20_cifar10", "w4a4", "paper", variant="released"),
]
OURS = [
    Row(network, bits, name)
    for network, bits in (("resnet20_cifar10", "w4a4"), ("resnet20_cifar10", "w5a5"), ("resnet20_cifar100", "w4a4"))
    for name in ("qimera", "fast")
]
ROWS = (*PAPER, *OURS, *(Row(row.network, row.bits, row.recipe, seed) for seed in (1, 2) for row in PAPER[:3]))


def settings_of(row: Row, teacher: Teacher) -> RunSettings:
    """Return the settings of a run in the scheme of the paper."""
    made = recipe(row.recipe, teacher.input_spec, teacher.num_classes)
    synthesis, distillation = made.synthesis, made.distillation
    if row.variant == "released":
        synthesis = synthesis.replace(generator=synthesis.generator.replace(disentanglement_mapping=False))
    if row.share != 1:
        steps = lambda count: max(1, round(row.share * count))  # noqa: E731
        generator, milestones = synthesis.generator, tuple(map(steps, distillation.milestones))
        of_generator = tuple(generator.num_steps + each for each in milestones) if generator.milestones else ()
        synthesis = synthesis.replace(generator=generator.replace(milestones=of_generator))
        distillation = distillation.replace(num_steps=steps(distillation.num_steps), milestones=milestones)
    weight_bits, activation_bits = parse_bits(row.bits)
    return RunSettings(
        model=f"zoo:{row.network}",
        recipe=row.recipe,
        seed=row.seed,
        input=teacher.input_spec,
        synthesis=synthesis,
        quantization=QuantizationSettings(weight_bits=weight_bits, activation_bits=activation_bits, scheme="paper"),
        distillation=distillation,
    )


def outstanding(folder: Path, rows: tuple[Row, ...] = ROWS) -> Iterator[Row]:
    """Yield the rows without a result: those that were begun first, then by importance."""
    missing = [row for row in rows if not _result(folder, row).exists()]
    yield from sorted(missing, key=lambda row: not _state(folder, row).exists())


def work_off(folder: Path, device: str, minutes: float, rows: tuple[Row, ...] = ROWS) -> None:
    """Do as many rows as fit; the last one is left where it can go on."""
    end = time.monotonic() + 60 * minutes
    for row in outstanding(folder, rows):
        left = end - time.monotonic() - _SECONDS_TO_SAVE
        if left <= 0:
            break
        timer = threading.Timer(left, signal.raise_signal, [signal.SIGINT])
        timer.start()
        try:
            _do(row, folder, device)
        except KeyboardInterrupt:
            print(f"{row.name}: the time is up; the same command continues", flush=True)
            break
        finally:
            timer.cancel()


def _do(row: Row, folder: Path, device: str) -> None:
    teacher, images = load_subject(row.network)
    run = RunDirectory.start(_state(folder, row), settings_of(row, teacher))
    start = time.monotonic()
    with ProgressDisplay() as progress:
        summary = carry_out(run, teacher, None, progress, device)
    _score(row, folder, run, images, device, summary.bank_seconds, summary.student_seconds)
    print(f"{row.name}: {time.monotonic() - start:.0f} s in this call", flush=True)
    shutil.rmtree(run.path)


def _score(
    row: Row,
    folder: Path,
    run: RunDirectory,
    images: LabelledImages,
    device: str,
    bank_seconds: float | None,
    student_seconds: float | None,
) -> None:
    with ProgressDisplay() as progress:
        result = evaluate_run(run, images, progress, find_device(device))
    assert result.teacher_top1 is not None
    drop = result.teacher_top1 - result.top1
    values: dict[str, object] = {
        **{name: getattr(row, name) for name in ("network", "bits", "recipe", "variant", "share", "seed")},
        "scheme": "paper",
        "full_precision": result.teacher_top1,
        "top1": result.top1,
        "drop": drop,
        "agreement": result.agreement,
        "num_steps": run.settings.distillation.num_steps,
        "bank_seconds": bank_seconds,
        "student_seconds": student_seconds,
        "device": device_name(device),
    }
    keep(_result(folder, row), values, f"drop {drop:.2f}")


def _result(folder: Path, row: Row) -> Path:
    return folder / "results" / f"{row.name}.json"


def _state(folder: Path, row: Row) -> Path:
    return folder / "states" / row.name


def main() -> None:
    """Do what fits, or list what there is to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--share", type=float, default=1.0, help="of the schedule of every row, such as 0.1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the clock's own, which a background job would ignore
    warnings.simplefilter("ignore")
    rows = tuple(Row(row.network, row.bits, row.recipe, row.seed, row.variant, options.share) for row in ROWS)
    if options.list:
        for row in rows:
            begun = "begun" if _state(options.folder, row).exists() else "outstanding"
            print(f"{'done' if _result(options.folder, row).exists() else begun:<12}{row.name}")
        return
    work_off(options.folder, options.device, options.minutes, rows)


if __name__ == "__main__":
    main()
