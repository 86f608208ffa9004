"""What libraries do anew for every graph, file or drawing: done once for all tests of a process, or left out."""

import copy
import hashlib
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

import onnx_ir as ir
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.export import decomp_utils, exported_program
from torch.fx import GraphModule, proxy
from torch.onnx._internal.exporter._registration import ONNXRegistry

from qimera.config.input_spec import InputSpec
from qimera.export import onnx_model
from qimera.graph.nodes import copied
from qimera.student.student import Student
from qimera.synthesis.synthesizer import Synthesizer
from qimera.teacher import teacher
from qimera.teacher.teacher import Teacher
from qimera.training import memory


class _NoTraceback:
    """Stands for the Python lines that a node was made by, which take a twentieth of the time of a capture."""

    @staticmethod
    def extract() -> "_NoTraceback":
        """Return one of no lines."""
        return _NoTraceback()

    def summary(self) -> list[object]:
        """Return no lines."""
        return []


_draw = Figure.savefig


@contextmanager
def drawn_figures() -> Iterator[None]:
    """Let figures be drawn, for tests that look at them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", _draw)
        yield


def _leave_empty(figure: Figure, file: TextIO, **options: object) -> None:
    """Write a drawing of nothing in the place of a figure's; drawing six takes as long as all else that a run does."""
    file.write("<svg></svg>")


def spare(patch: pytest.MonkeyPatch) -> None:
    """Keep tables and models that are made again and again, and leave out figures and where nodes were made."""
    patch.setattr(Figure, "savefig", _leave_empty)
    _keep_translations(patch)
    _keep_full_precision(patch)
    _keep_composite_operations(patch)
    _keep_graphs(patch)
    _keep_sizes(patch)
    patch.setattr(proxy, "CapturedTraceback", _NoTraceback)


def _keep_translations(patch: pytest.MonkeyPatch) -> None:
    """Keep the table of ONNX operations, which is read from source code for every file."""
    read, tables = ONNXRegistry.from_torchlib, {}

    def copied(opset_version: int) -> ONNXRegistry:
        if opset_version not in tables:
            tables[opset_version] = read(opset_version)
        table = copy.copy(tables[opset_version])
        table.functions = {name: list(each) for name, each in table.functions.items()}  # where a translation is added
        return table

    patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(copied))


def _keep_full_precision(patch: pytest.MonkeyPatch) -> None:
    """Keep the full-precision models that exported files are timed beside, which are those of few networks."""
    translate, kept = onnx_model.float_model, {}

    def once(student: Student, *, include_preprocessing: bool = False) -> ir.Model:
        values = b"".join(each.numpy().tobytes() for each in student.reference.state_dict().values())
        key = student.teacher_hash, hashlib.sha256(values).digest(), include_preprocessing
        if key not in kept:
            kept[key] = translate(student, include_preprocessing=include_preprocessing)
        return kept[key]

    patch.setattr(onnx_model, "float_model", once)


def _keep_composite_operations(patch: pytest.MonkeyPatch) -> None:
    """Keep the set of operations made of others, which is collected twice for every file; libraries may add some."""
    collect, found = exported_program._collect_all_valid_cia_ops, {}

    def kept() -> set[torch._ops.OperatorBase]:
        libraries = len(torch.ops._dir)
        if libraries not in found:
            found[libraries] = collect()
        return set(found[libraries])

    for module in (decomp_utils, exported_program):
        patch.setattr(module, "_collect_all_valid_cia_ops", kept)


class _Contents(pickle.Pickler):
    """Writes tensors as what they hold, and as which of the tensors of a network they are."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.places: dict[int, int] = {}

    def persistent_id(self, obj: object) -> object:
        if not isinstance(obj, Tensor):
            return None
        place = self.places.setdefault(id(obj), len(self.places))
        return place, tuple(obj.shape), obj.stride(), str(obj.dtype), obj.requires_grad, obj.detach().numpy().tobytes()


def _contents(model: nn.Module) -> bytes | None:
    """Return everything that a network holds; None where a capture has something to tell of it, or it is unusual."""
    kinds = {type(each) for each in model.modules()}
    if not all(kind.__module__.startswith(("torch.nn.modules.", "qimera.", "tests.networks")) for kind in kinds):
        return None
    tensors = (*model.parameters(), *model.buffers())
    if kinds & {nn.Softmax, nn.LogSoftmax} or any(
        each.is_floating_point() and each.dtype != torch.float32 for each in tensors
    ):
        return None
    file = io.BytesIO()
    try:
        _Contents(file).dump(model)
    except Exception:  # of functions without a name, and tensors without values
        return None
    return file.getvalue()


def _keep_graphs(patch: pytest.MonkeyPatch) -> None:
    """Keep the graph of every network that was captured, for each command captures its network anew."""
    capture, kept = teacher.capture, {}

    def once(model: nn.Module, input_spec: InputSpec, logits: str) -> GraphModule:
        contents = _contents(model)
        if contents is None:
            return capture(model, input_spec, logits)
        key = hashlib.sha256(contents).digest(), input_spec, logits
        if key not in kept:
            kept[key] = capture(model, input_spec, logits)
        return copied(kept[key])

    patch.setattr(teacher, "capture", once)


def _keep_sizes(patch: pytest.MonkeyPatch) -> None:
    """Keep how much memory a step takes of every network, which is worked out anew in front of every training."""

    def of_draws(teacher: Teacher, synthesizer: Synthesizer) -> object:
        synthesizer.eval()  # as the count leaves it
        sizes = tuple((name, value.shape) for name, value in synthesizer.state_dict().items())
        return teacher.hash, teacher.input_spec, repr(synthesizer), sizes

    def of_lessons(student: Student) -> object:
        return student.teacher_hash, student.input_spec, student.settings, student.module.code

    _keep_results(patch, "_written_for_images", lambda teacher: (teacher.hash, teacher.input_spec))
    _keep_results(patch, "_written_for_draws", of_draws)
    _keep_results(patch, "_written_for_lessons", of_lessons)


def _keep_results(patch: pytest.MonkeyPatch, name: str, key_of: Callable[..., object]) -> None:
    count, kept = getattr(memory, name), {}

    def once(*networks: nn.Module) -> int:
        key = key_of(*networks)
        if key not in kept:
            kept[key] = count(*networks)
        return kept[key]

    patch.setattr(memory, name, once)
