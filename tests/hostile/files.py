"""Hostile files of every other sort that qimera reads: weights, banks, checkpoints, JSON, arrays, images."""

import argparse
import builtins
import functools
import io
import json
import operator
import os
import pickle
import subprocess
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from qimera.assessment.data import load_labelled_images
from qimera.config.run_settings import RunSettings
from qimera.machine.checkpoint import Checkpoints
from qimera.machine.metrics import Metrics
from qimera.mixed_precision.allocation import Allocation
from qimera.report.content import Measured, Report
from qimera.report.summary import Summary
from qimera.synthesis.bank import SampleBank
from qimera.teacher.state_dicts import read_state_dict
from qimera.teacher.teacher import Teacher
from tests.hostile.archives import CODE, SHAPE, Payload, Tiny, pickled
from tests.hostile.reading import SPEC
from tests.hostile.strings import STRANGE

Case = tuple[bytes, Callable[[Path], object]]
"""What a file called like the case holds, and what reads it."""


class Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function: object, *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[object, ...]:
        return self.function, self.args


GADGETS: dict[str, object] = {
    "os.mkdir": Payload(),
    "os.system": Calls(os.system, "mkdir executed"),
    "eval": Calls(builtins.eval, CODE),
    "exec": Calls(builtins.exec, CODE),
    "open": Calls(builtins.open, "executed", "w"),
    "import": Calls(builtins.__import__, "antigravity"),
    "getattr": Calls(builtins.getattr, 5, "real"),
    "Popen": Calls(subprocess.Popen, ["mkdir", "executed"]),
    "partial": functools.partial(os.mkdir, "executed"),
    "attrgetter": operator.attrgetter("__class__"),
    "methodcaller": operator.methodcaller("mkdir", "executed"),
    "torch.load": Calls(torch.load, "weights.pt"),
    "torch.hub.load": Calls(torch.hub.load, ".", "x"),
    "torch.jit.load": Calls(torch.jit.load, "weights.pt"),
    "torch.save": Calls(torch.save, 1, "executed"),
    "torch.set_num_threads": Calls(torch.set_num_threads, 1),
    "torch.from_file": Calls(torch.from_file, "executed", True, 8),
    "numpy load": Calls(np.load, "weights.pt"),
    "numpy save": Calls(np.save, "executed", np.zeros(1)),
    "numpy memmap": Calls(np.memmap, "executed", "uint8", "w+", 0, (8,)),
    "numpy object scalar": Calls(np._core.multiarray.scalar, np.dtype("O"), Payload()),  # type: ignore[attr-defined]
    "numpy array of objects": np.array([Payload()], dtype=object),
    "namespace": argparse.Namespace(x=Payload()),
    "module": Tiny(),
    "path": Path("executed"),
    "dictionary": OrderedDict(x=Payload()),
}


def _tape() -> bytes:
    """Return weights in the form of before PyTorch 0.1.10."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tape:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(Payload())
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tape.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _script() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(Tiny().eval(), torch.zeros(1, *SHAPE)), buffer)
    return buffer.getvalue()


def _weights() -> dict[str, bytes]:
    found = {f"weights with {name}": pickled(gadget) for name, gadget in GADGETS.items()}
    for name, gadget in GADGETS.items():
        if name != "module":
            found[f"old weights with {name}"] = pickle.dumps({"x": gadget})
    for protocol in (0, 1, 5):
        found[f"a pickle of protocol {protocol}"] = pickle.dumps(Payload(), protocol)
    found["weights by extension"] = b"\x80\x02\x82\x01."
    found["weights by name"] = b"cos\nmkdir\n(S'executed'\ntR."
    found["weights by instance"] = b"(S'executed'\nios\nmkdir\n."
    found["weights by stack"] = b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c\x08executed\x85R."
    found["weights by dotted name"] = b"\x80\x04\x8c\x05torch\x8c\x11serialization.os.mkdir\x93"[:-1] + b"R."
    found["weights of tape"] = _tape()
    found["weights of script"] = _script()
    for name, tensor in {
        "meta": torch.empty(4, device="meta"),
        "sparse": torch.eye(3).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "expanded": torch.ones(1).expand(2**40),
        "conjugate": torch.ones(3, dtype=torch.complex64).conj(),
    }.items():
        found[f"weights that are {name}"] = pickled(tensor)
    return found


def _npz(**members: bytes | np.ndarray) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            if isinstance(content, np.ndarray):
                member = io.BytesIO()
                np.lib.format.write_array(member, content, allow_pickle=True)
                content = member.getvalue()
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def _header(text: str) -> bytes:
    spelled = text.encode().ljust(118 - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(spelled).to_bytes(2, "little") + spelled + bytes(400)


def _arrays() -> dict[str, bytes]:
    images, labels = np.zeros((2, 8, 8, 3), np.uint8), np.zeros(2, np.int64)
    objects = np.array([Payload(), Payload()], dtype=object)
    good = "{'descr': '<i8', 'fortran_order': False, 'shape': (2,), }"
    return {
        "objects as images.npz": _npz(images=objects, labels=labels),
        "objects as labels.npz": _npz(images=images, labels=objects),
        "a pickle as labels.npz": _npz(images=images, labels=pickle.dumps(Payload())),
        "a pickle.npz": pickle.dumps(Payload()),
        "code as shape.npz": _npz(images=images, labels=_header(good.replace("(2,)", CODE))),
        "code as header.npz": _npz(images=images, labels=_header(CODE)),
        "code as type.npz": _npz(images=images, labels=_header(good.replace("<i8", "O"))),
        "fields.npz": _npz(images=images, labels=_header(good.replace("'<i8'", "[('x', 'O')]"))),
        "huge.npz": _npz(images=images, labels=_header(good.replace("(2,)", "(2**60,)"))),
        "long.npz": _npz(images=images, labels=_header(good.replace("(2,)", f"({2**60},)"))),
    }


_EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(executed) (w) file closefile\nshowpage\n%%EOF\n"
)


def _images() -> dict[str, bytes]:
    found = {"eps.png": _EPS, "svg.png": b"<svg/>", "text.png": CODE.encode(), "pickle.png": pickle.dumps(Payload())}
    picture = Image.new("RGB", (8, 8))
    for form in ("PCX", "SGI", "TGA", "ICO", "IM", "MSP", "PDF", "DDS", "XBM", "PNG", "GIF", "TIFF", "JPEG"):
        buffer = io.BytesIO()
        (picture.convert("1") if form in ("MSP", "XBM") else picture).save(buffer, form)
        found[f"{form}.jpg"] = buffer.getvalue()
    return found


def _read_image(path: Path) -> object:
    return list(load_labelled_images(path.parent.parent, SPEC, 5).batches(4))


_JSON: dict[str, Callable[[Path], object]] = {
    "settings": RunSettings.load,
    "allocation": Allocation.load,
    "summary": Summary.load,
    "evaluation": Measured.load,
    "report": Report.load,
    "metrics": lambda path: Metrics(path).lines(),
}


def cases(teacher: Teacher) -> dict[str, Case]:
    """Return every file by name; the first of each sort is read twice before the hook watches."""
    found: dict[str, Case] = {name: (content, read_state_dict) for name, content in _weights().items()}
    for name in ("os.mkdir", "eval", "namespace", "partial", "numpy object scalar"):
        found[f"checkpoint with {name}.pt"] = (pickled(GADGETS[name]), _read_checkpoint)
    found["checkpoint of tape.pt"] = (_tape(), _read_checkpoint)
    found |= {name: (content, lambda path: load_labelled_images(path, SPEC, 5)) for name, content in _arrays().items()}
    found |= {f"{name}/a/{name}": (content, _read_image) for name, content in _images().items()}
    texts = [json.dumps(value) for value in STRANGE] + ["[" * 100_000, CODE, "1" * 5000, '{"a":1e999}', "\ufeff{}"]
    texts += [json.dumps({"__class__": "os.system", "model": CODE, "py/object": "os.system", "py/reduce": [CODE]})]
    for kind, reader in _JSON.items():
        for number, text in enumerate(texts):
            found[f"{kind} {number}.json"] = (text.encode("utf-8", "surrogatepass"), reader)
    for number, text in enumerate(texts):
        content = text.encode("utf-8", "surrogatepass")
        found[f"bank {number}/manifest.json"] = (content, lambda path: SampleBank.load(path.parent, teacher))
    for number, shards in enumerate(
        (["../x"], ["/etc/passwd"], [".."], ["x\0"], ["\udc80"], [""], "ab", {}, [5], [[]])
    ):
        manifest = {"format_version": 1, "teacher": teacher.hash, "seed": 0, "shards": shards}
        manifest |= {"settings": {"num_optimized": 8}, "input": SPEC.model_dump()}
        found[f"shards {number}/manifest.json"] = (
            json.dumps(manifest).encode(),
            lambda path: SampleBank.load(path.parent, teacher),
        )
    return found


def _read_checkpoint(path: Path) -> object:
    return Checkpoints(path.parent).of(path.stem).load()
