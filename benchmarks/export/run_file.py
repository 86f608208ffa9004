"""An exported file and images -> its logits, on this processor, which may be an emulated one.

    python run_file.py FILE IMAGES.npy LOGITS.npz

Needs numpy and the runtime of the file: onnxruntime or ai-edge-litert. One image at a time and one thread, as on a
phone.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[np.ndarray], np.ndarray]
"""One normalised image (1, channel, height, width) -> logits."""


def main(path: str, images_path: str, logits_path: str) -> None:
    """Write one array of logits for each kind of kernels that can run the file."""
    images = np.load(images_path)
    found = {
        name: np.concatenate([run(image[None]) for image in images]) for name, run in _RUNNERS[Path(path).suffix](path)
    }
    np.savez(logits_path, **found)


def _onnx_runtime(path: str) -> list[tuple[str, Run]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [("ONNX Runtime", lambda image: session.run(None, {"input": image})[0])]


def _litert(path: str) -> list[tuple[str, Run]]:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kernels = {
        "LiteRT, XNNPACK": OpResolverType.AUTO,
        "LiteRT, built-in kernels": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    }
    return [
        (name, _interpreted(Interpreter(path, num_threads=1, experimental_op_resolver_type=kind)))
        for name, kind in kernels.items()
    ]


def _interpreted(interpreter: Any) -> Run:
    interpreter.allocate_tensors()
    (entering,), (leaving,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(image: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(entering["index"], np.ascontiguousarray(image.transpose(0, 2, 3, 1)))
        interpreter.invoke()
        logits: np.ndarray = interpreter.get_tensor(leaving["index"])
        return logits

    return run


_RUNNERS = {".onnx": _onnx_runtime, ".tflite": _litert}

if __name__ == "__main__":
    main(*sys.argv[1:])
