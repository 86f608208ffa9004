"""What PyTorch does anew for every graph it traces or writes, done once for all tests of a process, or left out."""

import copy

import pytest
import torch
from torch.export import decomp_utils, exported_program
from torch.fx import proxy
from torch.onnx._internal.exporter._registration import ONNXRegistry


class NoTraceback:
    """Stands for the Python lines that a node was made by, which take a twentieth of the time of a capture."""

    @staticmethod
    def extract() -> "NoTraceback":
        """Return one of no lines."""
        return NoTraceback()

    def summary(self) -> list[object]:
        """Return no lines."""
        return []


def spare(patch: pytest.MonkeyPatch) -> None:
    """Keep the tables of operations of PyTorch, and let nodes not note where they were made."""
    _keep_translations(patch)
    _keep_composite_operations(patch)
    patch.setattr(proxy, "CapturedTraceback", NoTraceback)


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
