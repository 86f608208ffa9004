"""Students made for the kernels of LiteRT and of microcontrollers against these: networks x bits, one JSON file each.

    python -m benchmarks.export.roundings resnet20_cifar10 mobilenetv2_cifar10 --bits w8a8 w4a4 w3a3

One student of recipe ptq on a small bank is evaluated with the roundings of each target, and its file is run on the
target's kernels, on XNNPACK, on the built-in ones and on tflite-micro, whose reference kernels are slow and see the
fewest images. Images score, and nothing else.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.export.agreement import SEED, small_bank
from benchmarks.export.tables import ROUNDINGS as RESULTS
from benchmarks.measurement import keep, without_result
from benchmarks.zoo import load_subject
from qimera import QuantizationSettings, SampleBank, Student, Teacher, recipe
from qimera.config.bits import parse_bits
from qimera.export.comparison import compare
from qimera.litert.micro import MicroRuntime
from qimera.litert.runtime import Runtime
from qimera.lowering.model import lower
from qimera.pipeline import quantize_with

NUM_IMAGES = {"onnxruntime": 2000, "litert": 2000, "litert-builtin": 1000, "tflm": 200}
"""By target."""

BATCH = 50


def main() -> None:
    """Compute what is missing."""
    options = _options()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for network in options.networks:
        missing = without_result(options.bits, lambda bits, network=network: RESULTS / f"{network}-{bits}.json")
        if missing:
            teacher, images = load_subject(network)
            bank = small_bank(network, teacher)
            pixels, _ = next(iter(images.batches(max(NUM_IMAGES.values()))))
            for bits in missing:
                rows = _rows(teacher, student_of(teacher, bank, bits), torch.from_numpy(pixels).permute(0, 3, 1, 2))
                keep(RESULTS / f"{network}-{bits}.json", {"network": network, "bits": bits, "rows": rows}, str(rows))


def student_of(teacher: Teacher, bank: SampleBank, bits: str) -> Student:
    """Return a student of recipe ptq."""
    weight_bits, activation_bits = parse_bits(bits)
    settings = QuantizationSettings(weight_bits=weight_bits, activation_bits=activation_bits)
    distillation = recipe("ptq", teacher.input_spec, teacher.num_classes).distillation
    return quantize_with(teacher, bank, settings, distillation, seed=SEED)


def _rows(teacher: Teacher, student: Student, pixels: torch.Tensor) -> list[dict[str, object]]:
    """Return, for each target, how many images get the class and the logits that the student gives them."""
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "student.safetensors"
        student.save_state(state)
        for target, count in NUM_IMAGES.items():
            rounded = Student.load_state(state, teacher, student.settings.replace(target=target))
            lowered = lower(rounded, is_micro=target == "tflm")
            content = lowered.content()
            images = student.input_spec.normalize(pixels[:count])
            expected = torch.cat([rounded(batch) for batch in images.split(BATCH)]).numpy()
            inputs = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
            for kernels, run in _runs(target, content):
                found = compare(kernels, expected, run(inputs), 0, [])
                row = {"target": target, "kernels": kernels, "num_images": count, "num_bytes": len(content)}
                row |= {"same_class": found.agreement, "same_logits": found.identical}
                rows.append(row | ({"arena_bytes": run.arena_bytes()} if isinstance(run, MicroRuntime) else {}))
    return rows


def _runs(target: str, content: bytes) -> list[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """Return what runs a file: the kernels of its target, or both of LiteRT's where it is for neither."""
    if target == "tflm":
        return [("tflite-micro", MicroRuntime(content))]
    on_phones, built_in = (Runtime(content, xnnpack=xnnpack) for xnnpack in (True, False))
    found = {"XNNPACK": on_phones, "built-in kernels": built_in}
    chosen = {"litert": ["XNNPACK"], "litert-builtin": ["built-in kernels"]}.get(target, list(found))
    return [(name, found[name]) for name in chosen]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w4a4", "w3a3"])
    return parser.parse_args()


if __name__ == "__main__":
    main()
