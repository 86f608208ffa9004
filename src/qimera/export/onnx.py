"""A student -> an ONNX file, verified before it is there; what it takes is imported when it is called."""

import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from qimera.errors import ConfigError
from qimera.export.comparison import MIN_AGREEMENT, Verification
from qimera.machine.files import place_for, replacing
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank


def export_onnx(
    student: Student,
    path: Path | str,
    samples: SampleBank | None = None,
    *,
    include_preprocessing: bool = False,
    labels: Sequence[str] = (),
    min_agreement: float = MIN_AGREEMENT,
    time_full_precision: bool = False,
) -> Verification:
    """Write ``student`` to ``path`` and return how the file compares with it on ONNX Runtime, and on OpenVINO if there.

    The file reads float32 ``input`` (batch, channel, height, width), normalised as the teacher's images were, and
    returns float32 ``logits`` (batch, num_classes). Nothing is at ``path`` unless the comparison passed.

    Args:
        student: Of scheme ``hardware``.
        path: Where the file goes.
        samples: What the file is compared on; without them, on noise.
        include_preprocessing: Read uint8 ``pixels`` (batch, height, width, channel), 0 darkest and 255 brightest,
            and normalise them inside.
        labels: Names of the classes, for the metadata; empty or one for each.
        min_agreement: Percent of samples that student and file must put into the same class.
        time_full_precision: Also take the time of the full-precision model, on the same runtimes and in turns.

    Raises:
        ConfigError: onnx, onnxruntime or onnxscript is not installed, or no file can be written to ``path``.
        UnsupportedModelError: something in the student has no ONNX counterpart.
        VerificationError: the file disagrees with the student; the message names the first layer that does.
    """
    _require_packages()
    path = place_for(path)
    import onnx
    import onnx_ir as ir

    from qimera.export.onnx_model import float_model, onnx_model
    from qimera.export.verification import verify_onnx

    model = onnx_model(student, include_preprocessing=include_preprocessing, labels=labels)
    with replacing(path) as temporary, tempfile.TemporaryDirectory() as folder:
        onnx.save(ir.to_proto(model), temporary)
        float_path = None
        if time_full_precision:
            float_path = Path(folder) / "float.onnx"
            onnx.save(ir.to_proto(float_model(student, include_preprocessing=include_preprocessing)), float_path)
        return verify_onnx(student, temporary, samples, min_agreement=min_agreement, float_path=float_path)


def _require_packages() -> None:
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"export: format onnx needs {', '.join(missing)}; pip install 'qimera[onnx]'")
