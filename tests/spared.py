"""What libraries do anew for every graph, file or drawing: done once for all tests of a process, or left out."""

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import onnx_ir as ir
import pytest
import torch
from matplotlib.figure import Figure
from torch.export import decomp_utils, exported_program
from torch.fx import proxy
from torch.onnx._internal.exporter._registration import ONNXRegistry

from qimera.export import onnx_model
from qimera.student.student import Student


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
