"""Other quantizers fed with a bank: top-1 of their W8A8 models by what calibrates them, one JSON file a network.

    python -m benchmarks.export.calibration mobilenet_v1_075_imagenet --bank banks/mobilenet
    python -m benchmarks.export.calibration resnet20_cifar10

ONNX Runtime's static quantization (minimum to maximum, per channel), and NNCF's where it is there (pip install nncf),
calibrated with Gaussian noise, with samples of a bank and with real images; a bank gives what it has of one class, at
most as many. The real images that calibrate do not score.
"""

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from benchmarks.zoo import load_subject
from qimera import LabelledImages, SampleBank, Teacher, recipe, synthesize
from qimera.export.other_quantizers import calibration_batches
from qimera.synthesis.direct import noise_images

RESULTS = Path(__file__).parent / "results" / "calibration"
NUM_IMAGES = 100

Batches = Callable[[], Iterator[np.ndarray]]


def main() -> None:
    """Quantize with each kind of image and score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("--bank", type=Path, help="made earlier; one of the recipe ptq when absent")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    teacher, data = load_subject(options.network)
    bank = _bank(options.bank, teacher)
    scored = LabelledImages(data.images[NUM_IMAGES:], data.labels[NUM_IMAGES:])
    sources = _sources(teacher, bank, data)
    with tempfile.TemporaryDirectory() as folder:
        model = _export(teacher, Path(folder))
        found = {"full precision": _score(model, scored, teacher, options.threads)}
        for tool, quantize in TOOLS.items():
            for source, batches in sources.items():
                path = Path(folder) / f"{tool}-{source}.onnx"
                try:
                    quantize(model, path, batches)
                except ImportError as error:
                    print(f"{tool}: left out ({error})")
                    break
                found[f"{tool}, {source}"] = _score(path, scored, teacher, options.threads)
                print(f"{tool}, {source}: {found[f'{tool}, {source}']}", flush=True)
    values = {
        "network": options.network,
        "num_calibrating": {source: sum(1 for _ in batches()) for source, batches in sources.items()},
        "num_scored": len(scored),
        "top1_and_agreement": found,
        "versions": {name: version(name) for name in ("onnxruntime", "nncf") if find_spec(name) is not None},
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python -m benchmarks.export.calibration {options.network}",
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{options.network}.json").write_text(json.dumps(values, indent=1) + "\n")


def _bank(path: Path | None, teacher: Teacher) -> SampleBank:
    if path is not None:
        return SampleBank.load(path, teacher)
    return synthesize(teacher, settings=recipe("ptq", teacher.input_spec, teacher.num_classes).synthesis)


def _sources(teacher: Teacher, bank: SampleBank, data: LabelledImages) -> dict[str, Batches]:
    """Return the same number of normalised images of each kind."""
    spec, count = teacher.input_spec, NUM_IMAGES
    noise = noise_images(count, spec.shape, 1, torch.Generator().manual_seed(0)) * 2**0.5  # of variance 1
    real = spec.normalize(torch.tensor(data.images[:count]).permute(0, 3, 1, 2).contiguous())
    return {
        "noise": lambda: iter(each.numpy() for each in noise.split(1)),
        "bank": lambda: calibration_batches(bank, 1, count),
        "real": lambda: iter(each.numpy() for each in real.split(1)),
    }


def _export(teacher: Teacher, folder: Path) -> Path:
    """Write the model with folded batch norms, as ONNX Runtime's own preparation leaves it."""
    shape = (2, *teacher.input_spec.shape)
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(
        teacher.module, (torch.zeros(shape),), dynamo=True, input_names=["images"], dynamic_shapes=dynamic
    )
    assert program is not None
    onnx.save(program.model_proto, folder / "float.onnx")
    quant_pre_process(folder / "float.onnx", folder / "prepared.onnx", skip_symbolic_shape=True)
    return folder / "prepared.onnx"


def _with_onnxruntime(model: Path, path: Path, batches: Batches) -> None:
    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = batches()

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.left, None)
            return None if batch is None else {"images": batch}

    quantize_static(
        model,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def _with_nncf(model: Path, path: Path, batches: Batches) -> None:
    import nncf

    dataset = nncf.Dataset(list(batches()), lambda batch: {"images": batch})
    onnx.save(nncf.quantize(onnx.load(model), dataset, subset_size=NUM_IMAGES), path)


TOOLS = {"ONNX Runtime": _with_onnxruntime, "NNCF": _with_nncf}


def _score(path: Path, data: LabelledImages, teacher: Teacher, threads: int) -> tuple[float, float]:
    """Return top-1 and the agreement with full precision, in percent."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, settings)
    right = agreeing = 0
    for pixels, labels in data.batches(50):
        images = teacher.input_spec.normalize(torch.tensor(pixels).permute(0, 3, 1, 2).contiguous())
        answer = session.run(None, {"images": images.numpy()})[0].argmax(1)
        with torch.no_grad():
            wanted = teacher(images).argmax(1).numpy()
        right += int((answer == labels).sum())
        agreeing += int((answer == wanted).sum())
    return round(100 * right / len(data), 2), round(100 * agreeing / len(data), 2)


if __name__ == "__main__":
    main()
