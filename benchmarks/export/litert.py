"""LiteRT files against their students on all test images, and their speed: networks x bits, one JSON file a result.

    python -m benchmarks.export.litert resnet20_cifar10 mobilenetv2_cifar10 --bits w8a8 w4a8 w4a4 w3a3

The students are made without training on a small bank, as recipe ptq makes them. Bank and students are kept. Images and
labels score, and nothing else. Times are medians of one image on one thread, in seconds of the processor, so that other
work on the machine counts little; they are taken in turns with the model in full precision, which is a LiteRT file too.
``--times`` takes those of finished results again. The built-in kernels, which are slow, see the first images alone.
"""

import argparse
import json
import statistics
import time
import warnings
from importlib.metadata import version

import numpy as np
import torch

from benchmarks.export.agreement import SEED, top1
from benchmarks.export.roundings import student_of
from benchmarks.export.tables import LITERT as RESULTS
from benchmarks.measurement import BANKS, keep, without_result
from benchmarks.zoo import load_subject
from qimera import LabelledImages, SampleBank, Student, Teacher, recipe, synthesize
from qimera.export.comparison import compare, multiplying
from qimera.litert.runtime import Runtime
from qimera.lowering.model import lower, lower_full_precision

LARGE = 224
"""Side in pixels from which samples are few."""

NUM_BUILT_IN = 500
WARM_UP, ROUNDS = 5, 200


def main() -> None:
    """Compute what is missing."""
    options = _options()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    for network in options.networks:
        if options.times:
            _time_again(network)
            continue
        missing = without_result(options.bits, lambda bits, network=network: RESULTS / f"{network}-{bits}.json")
        if missing:
            teacher, images = load_subject(network)
            for bits in missing:
                _write(network, bits, _measure(_student(network, teacher, bits), images))


def _time_again(network: str) -> None:
    teacher, _ = load_subject(network)
    for path in sorted(RESULTS.glob(f"{network}-*.json")):
        found = json.loads(path.read_text())
        found |= _times(_student(network, teacher, found["bits"]))
        path.write_text(json.dumps(found, indent=2) + "\n")


def _student(network: str, teacher: Teacher, bits: str) -> Student:
    path = BANKS / f"{network}-litert-{bits}.safetensors"
    if not path.exists():
        student_of(teacher, _bank(network, teacher), bits).save(path)
    return Student.load(path)


def _bank(network: str, teacher: Teacher) -> SampleBank:
    path = BANKS / f"{network}-litert"
    if not path.exists():
        count, steps = (16, 20) if teacher.input_spec.shape[1] >= LARGE else (64, 40)
        synthesis = recipe("fast", teacher.input_spec, teacher.num_classes).synthesis
        direct = synthesis.direct.model_copy(update={"num_steps": steps, "batch_size": min(32, count)})
        few = {"num_optimized": count, "num_generated": 0, "num_held_out": 0, "direct": direct}
        synthesize(teacher, settings=synthesis.model_copy(update=few), seed=SEED).save(path)
    return SampleBank.load(path, teacher)


def _measure(student: Student, images: LabelledImages) -> dict[str, object]:
    lowered = lower(student)
    content = lowered.content()
    names = list(multiplying(student).values())
    float_layers = [name for name in names if name in lowered.writer.float_layers]
    on_phones, built_in = Runtime(content), Runtime(content, xnnpack=False)
    expected, actual, of_built_in = [], [], []
    for pixels, _ in images.batches(50):
        batch = student.input_spec.normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2)).contiguous()
        inputs = np.ascontiguousarray(batch.permute(0, 2, 3, 1).numpy())
        with torch.no_grad():
            expected.append(student(batch).numpy())
        actual.append(on_phones(inputs))
        if 50 * len(of_built_in) < NUM_BUILT_IN:
            of_built_in.append(built_in(inputs))
    logits, found, others = (np.concatenate(each) for each in (expected, actual, of_built_in))
    comparison = compare("XNNPACK", logits, found, len(names), float_layers)
    return {
        "num_bytes": len(content),
        "num_layers": len(names),
        "num_images": len(logits),
        "agreement": comparison.agreement,
        "identical": comparison.identical,
        "integer_layers": comparison.integer_layers,
        "float_layers": comparison.float_layers,
        "partitions": on_phones.kernels().partitions,
        "outside": on_phones.kernels().outside,
        "top1": {"student": top1(logits, images), "file": top1(found, images)},
        "built_in": {
            "num_images": len(others),
            "agreement": compare("built-in", logits[: len(others)], others, len(names), []).agreement,
        },
        **_times(student),
    }


def _times(student: Student) -> dict[str, object]:
    """Return the times of a student's file and of the model in full precision, and the latter's size."""
    reference = lower_full_precision(student).content()
    runs = [Runtime(content) for content in (lower(student).content(), reference)]
    channels, *sides = student.input_spec.shape
    image = np.random.default_rng(SEED).standard_normal((1, *sides, channels), np.float32)
    seconds: list[list[float]] = [[], []]
    for run in runs:
        run(image)
    for _ in range(WARM_UP + ROUNDS):
        for run, times in zip(runs, seconds, strict=True):
            start = time.process_time()
            run.again()
            times.append(time.process_time() - start)
    file, full = (1000 * statistics.median(times[WARM_UP:]) for times in seconds)
    return {
        "float_bytes": len(reference),
        "milliseconds": {"file": round(file, 4), "full precision": round(full, 4)},
        "speedup": round(full / file, 2),
    }


def _write(network: str, bits: str, found: dict[str, object]) -> None:
    values = {"network": network, "bits": bits, **found, "seed": SEED, "ai-edge-litert": version("ai-edge-litert")}
    keep(RESULTS / f"{network}-{bits}.json", values, json.dumps(found))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w4a8", "w4a4", "w3a3"])
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
