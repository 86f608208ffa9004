"""Exported files against their students, on all test images: networks x bits, one JSON file a result, resumable.

    python -m benchmarks.export.agreement resnet20_cifar10 mobilenetv2_cifar10 --bits w8a8 w4a8 w4a4 w3a3

The students are trained for a few steps on a small bank: enough for margins like those of a real student, not for its
accuracy. Images and labels score, and nothing else.
"""

import argparse
import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch

from benchmarks.measurement import BANKS, keep, without_result
from benchmarks.zoo import load_subject
from qimera import LabelledImages, QuantizationSettings, SampleBank, Student, Teacher, recipe, synthesize
from qimera.config.bits import parse_bits
from qimera.export.comparison import compare
from qimera.export.integer_graph import layers_in
from qimera.export.onnx_model import onnx_model
from qimera.export.verification import onnx_runtime, openvino_model
from qimera.pipeline import quantize_with

RESULTS = Path(__file__).parent / "results" / "agreement"
NUM_SAMPLES, NUM_SYNTHESIS_STEPS, NUM_STEPS, SEED = 64, 40, 200, 0


def main() -> None:
    """Compute what is missing."""
    options = _options()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    for network in options.networks:
        missing = without_result(options.bits, lambda bits, network=network: RESULTS / f"{network}-{bits}.json")
        if missing:
            teacher, images = load_subject(network)
            bank = small_bank(network, teacher)
            for bits in missing:
                _write(network, bits, _measure(_student(teacher, bank, bits), images))


def small_bank(network: str, teacher: Teacher) -> SampleBank:
    """Return the bank of ``network`` that students of these benchmarks learn from, made once and kept."""
    path = BANKS / f"{network}-small"
    if not path.exists():
        synthesis = recipe("fast", teacher.input_spec, teacher.num_classes).synthesis
        direct = synthesis.direct.model_copy(update={"num_steps": NUM_SYNTHESIS_STEPS, "batch_size": 32})
        small = synthesis.model_copy(update={"num_optimized": NUM_SAMPLES, "direct": direct})
        synthesize(teacher, settings=small, seed=SEED).save(path)
    return SampleBank.load(path, teacher)


def _student(teacher: Teacher, bank: SampleBank, bits: str) -> Student:
    weight_bits, activation_bits = parse_bits(bits)
    settings = QuantizationSettings(weight_bits=weight_bits, activation_bits=activation_bits)
    distillation = recipe("fast", teacher.input_spec, teacher.num_classes).distillation
    distillation = distillation.model_copy(update={"num_steps": min(NUM_STEPS, distillation.num_steps)})
    return quantize_with(teacher, bank, settings, distillation, seed=SEED)


def _measure(student: Student, images: LabelledImages) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "student.onnx"
        onnx.save(ir.to_proto(onnx_model(student)), path)
        names = layers_in(onnx.load(path))
        size = path.stat().st_size
        session, ort_float = onnx_runtime(path, names)
        compiled, openvino_float = openvino_model(path, names)
    runs = {
        "ONNX Runtime": (lambda batch: session.run(None, {"input": batch})[0], ort_float),
        "OpenVINO": (lambda batch: compiled(batch)[0], openvino_float),
    }
    expected, actual = [], {runtime: [] for runtime in runs}
    for pixels, _ in images.batches(50):
        batch = student.input_spec.normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2)).contiguous()
        with torch.no_grad():
            expected.append(student(batch).numpy())
        for runtime, (run, _) in runs.items():
            actual[runtime].append(run(batch.numpy()))
    student_logits = np.concatenate(expected)
    found: dict[str, object] = {
        "num_bytes": size,
        "num_layers": len(names),
        "num_images": len(images),
        "top1": top1(student_logits, images),
    }
    for runtime, (_, float_layers) in runs.items():
        logits = np.concatenate(actual[runtime])
        comparison = compare(runtime, student_logits, logits, len(names), float_layers)
        found[runtime] = {
            "top1": top1(logits, images),
            "agreement": comparison.agreement,
            "identical": comparison.identical,
            "largest_difference": comparison.largest_difference,
            "integer_layers": comparison.integer_layers,
            "float_layers": comparison.float_layers,
        }
    return found


def top1(logits: np.ndarray, images: LabelledImages) -> float:
    """Return the percentage of images whose class is their label."""
    return 100 * float((logits.argmax(1) == images.labels).mean())


def _write(network: str, bits: str, found: dict[str, object]) -> None:
    values = {"network": network, "bits": bits, **found, "seed": SEED, "onnxruntime": onnxruntime.__version__}
    keep(RESULTS / f"{network}-{bits}.json", values, json.dumps(found))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w4a8", "w4a4", "w3a3"])
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
