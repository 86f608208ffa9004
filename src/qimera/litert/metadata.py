"""What a device team must know of a file -> metadata as Android's tools read it, by the schema of tflite-support.

The schema is that of metadata_schema.fbs; its tables are written here field by field, since no package that can be
installed beside ours brings them. Files that belong to the model follow it as an archive, which that schema asks for.
"""

import io
import json
import zipfile
from collections.abc import Sequence

import flatbuffers
import numpy as np

from qimera import __version__
from qimera.config.input_spec import InputSpec
from qimera.student.student import Student

ENTRY = "TFLITE_METADATA"
"""What the model calls its metadata."""

PROVENANCE = "qimera.json"
LABELS = "labels.txt"

_IDENTIFIER = b"M001"
_PARSER_VERSION = "1.0.0"
_DESCRIPTIONS, _AXIS_LABELS = 1, 2
_FEATURE, _IMAGE = 1, 2
_NORMALIZATION = 1
_COLOURS = {1: 2, 3: 1}
"""Of the schema: grey and RGB."""

_EPOCH = (1980, 1, 1, 0, 0, 0)


def metadata(student: Student, labels: Sequence[str], *, include_preprocessing: bool) -> bytes:
    """Return the table ``ModelMetadata``: what enters and leaves the model, and its files."""
    b = flatbuffers.Builder(1024)
    notes = _file(b, PROVENANCE, "where the model comes from, and how its input is normalised", _DESCRIPTIONS)
    named = [_file(b, LABELS, "the classes, one per line", _AXIS_LABELS)] if labels else []
    image = _image(b, student.input_spec, include_preprocessing)
    said = "one number for each class, the largest for the likeliest"
    logits = _tensor(b, "logits", said, _FEATURE, _table(b), named)
    graph = _table(b, {2: _tables(b, [image]), 3: _tables(b, [logits])})
    text = {
        0: b.CreateString("image classifier"),
        1: b.CreateString("quantized by qimera"),
        2: b.CreateString(__version__),
        7: b.CreateString(_PARSER_VERSION),
    }
    root = _table(b, {**text, 3: _tables(b, [graph]), 6: _tables(b, [notes])})
    b.Finish(root, file_identifier=_IDENTIFIER)
    return bytes(b.Output())


def _image(b: flatbuffers.Builder, spec: InputSpec, include_preprocessing: bool) -> int:
    """The input: an image, and how numbers from 0 to 255 are normalised before they enter."""
    mean, std = (np.zeros(1, np.float32), np.ones(1, np.float32)) if include_preprocessing else _normalization(spec)
    options = _table(b, {0: b.CreateNumpyVector(mean), 1: b.CreateNumpyVector(std)})
    unit = _table(b, {1: options}, {0: _NORMALIZATION})
    image = _table(b, {}, {0: _COLOURS.get(spec.shape[0], 0)})
    kind = "uint8 pixels" if include_preprocessing else "normalised pixels"
    return _tensor(b, "image", f"{kind} (1, height, width, channel)", _IMAGE, image, [], [unit])


def _normalization(spec: InputSpec) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation in the unit of pixels from 0 to 255."""
    low, high = (each.numpy().reshape(-1) for each in (spec.low, spec.high))
    std = 255 / (high - low)
    return (-low * std).astype(np.float32), std.astype(np.float32)


def _tensor(
    b: flatbuffers.Builder,
    name: str,
    description: str,
    kind: int,
    properties: int,
    files: Sequence[int] = (),
    units: Sequence[int] = (),
) -> int:
    content = _table(b, {1: properties}, {0: kind})
    fields = {0: b.CreateString(name), 1: b.CreateString(description), 3: content}
    lists = {place: _tables(b, each) for place, each in ((4, units), (6, files)) if each}
    return _table(b, fields | lists)


def _file(b: flatbuffers.Builder, name: str, description: str, kind: int) -> int:
    return _table(b, {0: b.CreateString(name), 1: b.CreateString(description)}, {2: kind})


def _table(b: flatbuffers.Builder, offsets: dict[int, int] | None = None, numbers: dict[int, int] | None = None) -> int:
    """Return a table with other objects and small numbers in the fields of these places."""
    offsets, numbers = offsets or {}, numbers or {}
    b.StartObject(max([*offsets, *numbers], default=0) + 1)
    for place, offset in offsets.items():
        b.PrependUOffsetTRelativeSlot(place, offset, 0)
    for place, number in numbers.items():
        b.PrependUint8Slot(place, number, 0)
    return int(b.EndObject())


def _tables(b: flatbuffers.Builder, offsets: Sequence[int]) -> int:
    b.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        b.PrependUOffsetTRelative(offset)
    return int(b.EndVector())


def associated_files(student: Student, labels: Sequence[str]) -> bytes:
    """Return the archive that follows the model: provenance as JSON, and the classes."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr(zipfile.ZipInfo(PROVENANCE, _EPOCH), json.dumps(_provenance(student), indent=2) + "\n")
        if labels:
            files.writestr(zipfile.ZipInfo(LABELS, _EPOCH), "\n".join(labels) + "\n")
    return archive.getvalue()


def _provenance(student: Student) -> dict[str, object]:
    spec = student.input_spec
    return {
        "version": __version__,
        "teacher_hash": student.teacher_hash,
        "quantization": student.settings.model_dump(mode="json"),
        "input_shape": spec.shape,
        "input_mean": spec.mean,
        "input_std": spec.std,
        "input_pixel_range": spec.pixel_range,
        "num_classes": student.num_classes,
    }
