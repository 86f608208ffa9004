"""What libraries do anew for every graph, file or drawing: done once for all tests of a process, or left out."""

import copy
import hashlib
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import TextIO

import onnx
import onnx_ir as ir
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch._ops import OperatorBase
from torch.export import decomp_utils, exported_program
from torch.fx import GraphModule, proxy
from torch.fx.traceback import NodeSource
from torch.onnx._internal.exporter import _decomp
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
    _keep_onnx_graphs(patch)
    _keep_composite_operations(patch)
    _keep_decompositions(patch)
    _register_kernels_quickly(patch)
    _share_origins(patch)
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


def _keep_onnx_graphs(patch: pytest.MonkeyPatch) -> None:
    """Keep what PyTorch makes of every graph as ONNX: many tests export the same student, or time the same teacher.

    Graphs that PyTorch notes more of have a key of their own.
    """
    translate, kept = onnx_model._translate, {}

    def once(module: GraphModule, student: Student) -> ir.Model:
        read = [(node.target, attrgetter(node.target)(module)) for node in module.graph.find_nodes(op="get_attr")]
        tensors = [*read, *module.named_parameters(), *module.named_buffers()]
        values = [(name, str(each.dtype), each.detach().numpy().tobytes()) for name, each in tensors]
        contents = hashlib.sha256(pickle.dumps((module.code, student.input_spec.shape, values))).digest()
        key = contents, proxy.CapturedTraceback
        if key not in kept:
            kept[key] = ir.to_proto(translate(module, student)).SerializeToString()
        return ir.from_proto(onnx.load_from_string(kept[key]))

    patch.setattr(onnx_model, "_translate", once)


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


def _keep_decompositions(patch: pytest.MonkeyPatch) -> None:
    """Keep the table of what takes operations apart, and its division in two; both are made anew for every file."""
    make, divide = (
        _decomp.create_onnx_friendly_decomposition_table,
        exported_program._split_decomp_table_to_cia_and_python_decomp,
    )
    tables: dict[object, dict[OperatorBase, Callable[..., object]]] = {}
    divided: dict[object, tuple[dict[OperatorBase, Callable[..., object]], ...]] = {}

    def table_of(kept: set[OperatorBase]) -> dict[OperatorBase, Callable[..., object]]:
        key = frozenset(kept), len(torch.ops._dir)
        if key not in tables:
            tables[key] = make(kept)
        return dict(tables[key])

    def halves_of(table: dict[OperatorBase, Callable[..., object]]) -> tuple[dict[OperatorBase, object], ...]:
        key = tuple(table.items()), len(torch.ops._dir)
        if key not in divided:
            divided[key] = divide(table)
        return tuple(dict(each) for each in divided[key])

    patch.setattr(_decomp, "create_onnx_friendly_decomposition_table", table_of)
    patch.setattr(exported_program, "_split_decomp_table_to_cia_and_python_decomp", halves_of)


def _register_kernels_quickly(patch: pytest.MonkeyPatch) -> None:
    """Register kernels without evaluating annotations: every export registers six thousand, and drops them again."""
    register = OperatorBase.py_impl

    def py_impl(self: OperatorBase, key: object) -> Callable[[Callable[..., object]], Callable[..., object]]:
        if not isinstance(key, torch._C.DispatchKey) or key in self.py_kernels or key == torch._C.DispatchKey.Python:
            return register(self, key)
        return lambda kernel: _registered(self, key, kernel)

    patch.setattr(OperatorBase, "py_impl", py_impl)


def _registered(operation: OperatorBase, key: object, kernel: Callable[..., object]) -> Callable[..., object]:
    operation.py_kernels[key] = kernel
    operation._dispatch_cache.clear()
    return kernel


def _share_origins(patch: pytest.MonkeyPatch) -> None:
    """Share the notes of where nodes come from among the copies of a graph; nothing changes them."""
    patch.setattr(NodeSource, "__deepcopy__", lambda self, memo: self, raising=False)


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
    known = ("torch.nn.modules.", "qimera.", "tests.")
    if any(not kind.__module__.startswith(known) or kind.__module__.startswith("tests.teacher.") for kind in kinds):
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
