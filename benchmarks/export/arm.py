"""Exported files on emulated ARM processors against the same files on this one: networks x bits, one JSON file each.

    python -m benchmarks.export.arm mnist_cnn resnet20_cifar10 --bits w8a8 w4a4

A Cortex-A53 and a Cortex-A76, whose kernels differ since the second has dot products, are emulated by QEMU, which comes
from the distribution: see benchmarks/export/emulation.py. Where it cannot be had, the program says why and stops. The
students are those of recipe ptq on a small bank. Emulated floating point rounds as the standard says, so what differs
here would differ on a phone; how fast a phone is cannot be seen.
"""

import argparse
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from benchmarks.export.agreement import SEED, small_bank
from benchmarks.export.emulation import CPUS, NotAvailableError, prepare, run_emulated
from benchmarks.export.roundings import student_of
from benchmarks.export.tables import ARM as RESULTS
from benchmarks.measurement import keep, without_result
from benchmarks.zoo import load_subject
from qimera import LabelledImages, Student, export_litert, export_onnx

SCRIPT = Path(__file__).parent / "run_file.py"
WHEELS = ("ai-edge-litert", "onnxruntime", "numpy")


def main() -> None:
    """Compute what is missing."""
    options = _options()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        emulator = prepare(WHEELS)
    except NotAvailableError as reason:
        raise SystemExit(f"no emulated ARM here: {reason}") from reason
    for network in options.networks:
        missing = without_result(options.bits, lambda bits, network=network: RESULTS / f"{network}-{bits}.json")
        if missing:
            teacher, images = load_subject(network)
            bank = small_bank(network, teacher)
            for bits in missing:
                rows = _rows(student_of(teacher, bank, bits), _first(images, options.images))
                values = {"network": network, "bits": bits, "num_images": options.images, "rows": rows}
                keep(RESULTS / f"{network}-{bits}.json", {**values, "seed": SEED, "emulator": emulator}, str(rows))


def _first(images: LabelledImages, count: int) -> torch.Tensor:
    pixels, _ = next(iter(images.batches(count)))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _rows(student: Student, pixels: torch.Tensor) -> list[dict[str, object]]:
    """Return, for each kind of kernels and processor, how many images get what they get here."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images_path = folder / "images.npy"
        np.save(images_path, student.input_spec.normalize(pixels).numpy())
        for path in _files(student, folder):
            arguments = [str(path), str(images_path)]
            subprocess.run([sys.executable, SCRIPT, *arguments, folder / "here.npz"], check=True)
            here = np.load(folder / "here.npz")
            for cpu in CPUS:
                run_emulated(cpu, SCRIPT, *arguments, str(folder / "there.npz"))
                there = np.load(folder / "there.npz")
                rows += [{"kernels": each, "cpu": cpu, **_compare(here[each], there[each])} for each in here]
    return rows


def _files(student: Student, folder: Path) -> list[Path]:
    """Write the student in every format, and return the files."""
    paths = [folder / "student.onnx", folder / "student.tflite"]
    for path, export in zip(paths, (export_onnx, export_litert), strict=True):
        export(student, path, min_agreement=0.0)  # how they compare with the student is measured elsewhere
    return paths


def _compare(
    here: Float[np.ndarray, "image num_classes"], there: Float[np.ndarray, "image num_classes"]
) -> dict[str, float]:
    """Return percent of images with the same class and with the same logits, bit for bit, and what differs most."""
    return {
        "same_class": 100 * float((here.argmax(1) == there.argmax(1)).mean()),
        "same_logits": 100 * float((here == there).all(1).mean()),
        "largest_difference": float(np.abs(here - there).max() / here.std()),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w4a4"])
    parser.add_argument("--images", type=int, default=100, help="how many of the test images")
    return parser.parse_args()


if __name__ == "__main__":
    main()
