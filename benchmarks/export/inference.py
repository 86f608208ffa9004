"""Speed of exported files against the full-precision export on the same runtime: one JSON file per network.

    python -m benchmarks.export.inference resnet20_cifar10 mobilenetv2_cifar10 --threads 1

Students are not trained, since a kernel takes as long for any weights: their ranges are fitted to noise. The files take
turns (fp32, w8a8, w4a4, fp32, ...), so that other work on the machine slows all of them alike, and a figure is the
median of wall times. The fp32 file has its batch norms folded. ONNX Runtime runs with its default optimizations;
OpenVINO computes what is not quantized in float32, and the batch is fixed before it compiles. Both must be installed.
benchmarks/tables.py writes the table of docs/export-targets.md from the files.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import openvino
import torch
from torch.export import Dim

from benchmarks.measurement import keep
from benchmarks.zoo import load_subject
from qimera import InputSpec, QuantizationSettings, Teacher
from qimera.config.bits import parse_bits
from qimera.export.onnx import export_onnx
from qimera.export.onnx_model import OPSET
from qimera.graph.folding import fold_batch_norms
from qimera.student.student import Student
from qimera.synthesis.direct import noise_images

RESULTS = Path(__file__).parent / "results" / "inference"
BITS = ("w8a8", "w4a4")
LARGE = 224
"""Side in pixels from which images come in smaller batches."""

WARM_UP_ROUNDS = 3
MIN_ROUNDS = 30
MIN_SECONDS = 3.0
"""For each file."""

Runner = Callable[[], object]
"""Computes the logits of one batch."""


@dataclass(frozen=True)
class File:
    """One exported file and how much of it runs in integer kernels."""

    path: Path
    num_layers: int
    integer_layers: dict[str, int]
    """By runtime."""


def main() -> None:
    """Measure every network."""
    options = _options()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for network in options.networks:
        teacher, _ = load_subject(network)
        with tempfile.TemporaryDirectory() as folder:
            files = _export(teacher, Path(folder))
            timings = _timings(network, files, teacher.input_spec, options.threads)
            _write(network, files, timings)


def _export(teacher: Teacher, folder: Path) -> dict[str, File]:
    """Return the files by name, full precision first."""
    files = {"fp32": _export_full_precision(teacher, folder / "fp32.onnx")}
    images = noise_images(32, teacher.input_spec.shape, 3, torch.Generator().manual_seed(0))
    for bits in BITS:
        weight_bits, activation_bits = parse_bits(bits)
        student = Student(teacher, QuantizationSettings(weight_bits=weight_bits, activation_bits=activation_bits))
        student.initialize_ranges_([images])
        path = folder / f"{bits}.onnx"
        found = export_onnx(student, path, min_agreement=0.0)  # noise lies near the boundaries of an untrained student
        integer_layers = {each.runtime.rpartition(" ")[0]: each.integer_layers for each in found.comparisons}
        files[bits] = File(path, found.num_layers, integer_layers)
    return files


def _export_full_precision(teacher: Teacher, path: Path) -> File:
    torch.onnx.export(
        fold_batch_norms(teacher.module),
        (torch.zeros(2, *teacher.input_spec.shape),),
        path,
        dynamo=True,
        opset_version=OPSET,
        input_names=["input"],
        output_names=["logits"],
        dynamic_shapes=({0: Dim.DYNAMIC},),
        external_data=False,
        verbose=False,
    )
    return File(path, len(teacher.layers), dict.fromkeys(RUNTIMES, 0))


def _timings(
    network: str, files: dict[str, File], spec: InputSpec, thread_counts: list[int]
) -> list[dict[str, object]]:
    """Return one row for each runtime, number of threads and batch."""
    rows = []
    for runtime, runner in RUNTIMES.items():
        for threads in thread_counts:
            for batch in (1, 16 if spec.shape[1] >= LARGE else 64):
                images = noise_images(batch, spec.shape, 3, torch.Generator().manual_seed(1))
                medians, rounds = _race({name: runner(file.path, images, threads) for name, file in files.items()})
                speedup = {bits: round(medians["fp32"] / medians[bits], 2) for bits in BITS}
                milliseconds = {name: round(1000 * median, 4) for name, median in medians.items()}
                row = {"runtime": runtime, "threads": threads, "batch": batch, "rounds": rounds}
                rows.append({**row, "milliseconds": milliseconds, "speedup": speedup})
                print(f"{network}: {rows[-1]}", flush=True)
    return rows


def _race(runners: dict[str, Runner]) -> tuple[dict[str, float], int]:
    """Let the runners take turns, and return the median seconds of each and the number of rounds."""
    for _ in range(WARM_UP_ROUNDS):
        for run in runners.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    end = time.perf_counter() + MIN_SECONDS * len(runners)
    rounds = 0
    while rounds < MIN_ROUNDS or time.perf_counter() < end:
        for name, run in runners.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: statistics.median(each) for name, each in seconds.items()}, rounds


def _onnx_runtime(path: Path, images: torch.Tensor, threads: int) -> Runner:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads of the file that ran last must not wait busily while the next one is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {"input": images.numpy()}
    return lambda: session.run(None, inputs)


def _openvino(path: Path, images: torch.Tensor, threads: int) -> Runner:
    core = openvino.Core()
    model = core.read_model(path)
    model.reshape(list(images.shape))
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    inputs = {"input": images.numpy()}
    return lambda: request.infer(inputs, share_inputs=True, share_outputs=True)


RUNTIMES = {"ONNX Runtime": _onnx_runtime, "OpenVINO": _openvino}


def _write(network: str, files: dict[str, File], timings: list[dict[str, object]]) -> None:
    values = {
        "network": network,
        "files": {
            name: {
                "bytes": file.path.stat().st_size,
                "num_layers": file.num_layers,
                "integer_layers": file.integer_layers,
            }
            for name, file in files.items()
        },
        "timings": timings,
        "versions": {
            "ONNX Runtime": onnxruntime.__version__,
            "OpenVINO": openvino.__version__.partition("-")[0],
            "torch": torch.__version__,
        },
    }
    keep(RESULTS / f"{network}.json", values, f"{len(timings)} timings")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    return parser.parse_args()


if __name__ == "__main__":
    main()
