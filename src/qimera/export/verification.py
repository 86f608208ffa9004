"""An ONNX file and the student it came from -> how they compare, on every runtime that is there."""

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from jaxtyping import Float
from torch import Tensor

from qimera.errors import VerificationError
from qimera.export.comparison import (
    Verification,
    check_agreement,
    compare,
    first_difference,
    latencies_beside,
    logits_of,
    refuse_lowest_weights,
    runtime_reason,
    sample_pixels,
)
from qimera.export.integer_graph import layers_in
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank

_BATCH = 32

OPENVINO_MIN_AGREEMENT = 80.0
"""Of a student with another target, since OpenVINO rounds fewer tensors than its file says."""

_INTEGER_KERNELS = {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "ConvInteger", "MatMulInteger"}

Runner = Callable[[np.ndarray], np.ndarray]
"""One batch of the file's input -> logits."""


def verify_onnx(
    student: Student, path: Path, samples: SampleBank | None, *, min_agreement: float, float_path: Path | None = None
) -> Verification:
    """Run the file on ONNX Runtime, and on OpenVINO if it is installed, and compare it with ``student``.

    Args:
        student: What the file was made from.
        path: The file.
        samples: What both are compared on; without them, on noise.
        min_agreement: Percent of samples that both must put into the same class.
        float_path: The full-precision model as a file with the same input, whose time is taken beside that of ``path``.

    Raises:
        VerificationError: agreement below ``min_agreement`` percent on one of them, or a weight of -128 in the file.
    """
    pixels = sample_pixels(student, samples)
    images = student.input_spec.normalize(pixels)
    expected = logits_of(student, images).numpy()
    model = onnx.load(path)
    refuse_lowest_weights((each.name, onnx.numpy_helper.to_array(each)) for each in model.graph.initializer)
    names = layers_in(model)
    comparisons, refusals = [], []
    for runtime, start in _runtimes(names):
        try:
            run, float_layers = start(path)
            inputs = list(_inputs(path, pixels, images))
            actual = np.concatenate([run(batch) for batch in inputs])
        except Exception as error:  # each runtime has errors of its own, ONNX Runtime no RuntimeErrors
            refusal = f"{runtime}: cannot run the file ({runtime_reason(error)})"
            if runtime.startswith("ONNX") or student.settings.target == "openvino":
                raise VerificationError(f"{refusal}; no file was written") from error
            refusals.append(refusal)
            continue
        beside = None if float_path is None else partial(_runner, start, float_path)
        latencies = latencies_beside(run, inputs[0][:1], beside)
        comparison = compare(runtime, expected, actual, len(names), float_layers, latencies)
        rounds_elsewhere = runtime.startswith("OpenVINO") and student.settings.target != "openvino"
        required = min(min_agreement, OPENVINO_MIN_AGREEMENT) if rounds_elsewhere else min_agreement
        explain = partial(_first_difference, student, path, inputs[0], images[:_BATCH])
        check_agreement(comparison, len(pixels), required, explain)
        comparisons.append(comparison)
    return Verification(len(names), path.stat().st_size, len(pixels), tuple(comparisons), tuple(refusals))


def _runner(start: Callable[[Path], tuple[Runner, list[str]]], path: Path) -> Runner:
    return start(path)[0]


def _inputs(path: Path, pixels: Tensor, images: Tensor) -> Iterator[np.ndarray]:
    """Yield batches of what the file reads: normalised images, or pixels with the channel last."""
    model = onnx.load(path)
    normalised = model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    source = images if normalised else pixels.permute(0, 2, 3, 1)
    yield from (np.ascontiguousarray(batch.numpy()) for batch in source.split(_BATCH))


def _runtimes(names: list[str]) -> Iterator[tuple[str, Callable[[Path], tuple[Runner, list[str]]]]]:
    """Yield each runtime with what starts a file: a function that runs it, and the layers in floating point."""

    def start_onnx_runtime(path: Path) -> tuple[Runner, list[str]]:
        session, float_layers = onnx_runtime(path, names)
        key = session.get_inputs()[0].name
        return lambda batch: session.run(None, {key: batch})[0], float_layers

    def start_openvino(path: Path) -> tuple[Runner, list[str]]:
        compiled, float_layers = openvino_model(path, names)
        return lambda batch: compiled(batch)[0], float_layers

    yield f"ONNX Runtime {onnxruntime.__version__}", start_onnx_runtime
    if importlib.util.find_spec("openvino") is not None:
        import openvino

        yield f"OpenVINO {openvino.__version__.partition('-')[0]}", start_openvino


def onnx_runtime(path: Path, names: list[str], num_threads: int = 1) -> tuple[onnxruntime.InferenceSession, list[str]]:
    """Return a session for the file and the layers that are in no integer kernel of it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    # Later optimizations change layouts alone, into forms that are not for files.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(optimized)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(optimized, load_external_data=False).graph.node
    return session, _without(names, [node.name for node in nodes if node.op_type in _INTEGER_KERNELS])


def _without(names: list[str], kernels: list[str]) -> list[str]:
    """Return the layers that are in none of these kernels, whose names begin with that of their layer.

    So may those of another layer: ``conv_1_quant`` is of ``conv_1`` where there is one, and not of ``conv``.
    """
    found = {max(fitting, key=len) for each in kernels if (fitting := [name for name in names if _is_of(name, each)])}
    return [name for name in names if name not in found]


def _is_of(layer: str, node: str) -> bool:
    return node == layer or node.startswith((f"{layer}_", f"{layer}/"))


def openvino_model(path: Path, names: list[str], num_threads: int = 1):  # type: ignore[no-untyped-def]
    """Return a compiled model and the layers that it computes in floating point."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": num_threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    integer: list[str] = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        kind, precision, names_before = (
            info[key].astype(str) if key in info else ""
            for key in ("layerType", "runtimePrecision", "originalLayersNames")
        )
        if kind in ("Convolution", "Deconvolution", "FullyConnected", "MatMul") and precision in ("i8", "u8"):
            integer += [node.get_friendly_name(), *names_before.split(",")]
    return compiled, _without(names, integer)


def _first_difference(
    student: Student, path: Path, inputs: np.ndarray, images: Float[Tensor, "batch channel height width"]
) -> str:
    return first_difference(_integers_of_layers(student, path, inputs, images))


def _integers_of_layers(
    student: Student, path: Path, inputs: np.ndarray, images: Float[Tensor, "batch channel height width"]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield, for each layer, the integers behind it in the student and in the file, where both have any.

    ``inputs`` are the same images as the file reads them.
    """
    model = onnx.load(path)
    in_file = {name: value for name in student.layer_names().values() if (value := _integers_behind(model, name))}
    model.graph.output.extend(onnx.ValueInfoProto(name=value) for value in in_file.values())
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    _, *actual = session.run(None, {session.get_inputs()[0].name: inputs})
    expected = student.integers(images)
    for (name, _), integers in zip(in_file.items(), actual, strict=True):
        if name in expected:
            yield name, expected[name].numpy(), integers.reshape(expected[name].shape)  # tokens are rows in the file


def _integers_behind(model: onnx.ModelProto, layer: str) -> str | None:
    """Return the uint8 tensor that a layer's kernel writes: behind QuantizeLinear, and behind a Clip of its own."""
    found = next((node.output[0] for node in model.graph.node if node.name == layer), None)
    quantized = None
    while found is not None:
        readers = [node for node in model.graph.node if found in node.input]
        if len(readers) != 1 or readers[0].op_type not in ("QuantizeLinear", "Clip", "Relu"):
            return quantized
        found = readers[0].output[0]
        quantized = found if quantized is not None or readers[0].op_type == "QuantizeLinear" else None
    return quantized
