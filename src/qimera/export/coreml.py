"""A student -> a Core ML package with its own integers and steps; experimental, since nothing here can run it."""

import io
import logging
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule, Node

from qimera import __version__
from qimera.errors import ConfigError, UnsupportedModelError, VerificationError, first_line
from qimera.export.comparison import Verification, multiplying
from qimera.export.program import DEQUANTIZE, DEQUANTIZE_CHANNELS, QUANTIZE, integer_graph
from qimera.graph.nodes import aten, node_at, tensor_of
from qimera.machine.files import check_folder, make_folder, replace_directory, sync_tree
from qimera.student.student import Student

NOT_RUN = "Core ML runs only on Apple's machines, so the file was not run; compare it with the student on one of them"

_RESCALING = "common::distributive_quantized_binary_op_scale_normalization"
"""A pass that divides the steps of additions by one of them."""

_MANIFEST = "Manifest.json"

_Grid = tuple[float, int]
"""Step, and zero point counted from the lowest of 256 levels."""

_Weight = tuple[bytes, bytes, tuple[int, ...]]
"""Integers, steps and shape."""


def export_coreml(student: Student, path: Path | str) -> Verification:
    """Write ``student`` as a Core ML package (``.mlpackage``, for iOS 17, macOS 14 and later), which was run nowhere.

    The package maps one normalised float32 image (1, channel, height, width), ``input``, to ``logits``. Weights and
    activations are 8-bit integers with the student's steps; grids of fewer bits are the same with limits in front, and
    save no space. What can be compared here is compared: every step, zero point and integer in the package with the
    student's. Nothing is at ``path`` unless they are equal.

    Args:
        student: Of scheme ``hardware``.
        path: Where the package goes, which is a folder; its name ends in ``.mlpackage``. A package that is there is
            replaced.

    Raises:
        ConfigError: coremltools is not installed, or ``path`` is no name for a package.
        UnsupportedModelError: the student is of another scheme, or something in it has no Core ML counterpart.
        VerificationError: a step, a zero point or an integer in the package is not the student's.
    """
    if find_spec("coremltools") is None:
        raise ConfigError("--format coreml: needs coremltools; pip install 'qimera[coreml]'")
    path = Path(path)
    _check_path(path)
    module = integer_graph(student)
    model = _convert(module, student)
    make_folder(path.parent)
    temporary = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        model.save(str(temporary))
        _check_integers(module, temporary)
        sync_tree(temporary)
        replace_directory(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Verification(len(multiplying(student)), num_bytes, 0, (), not_run=NOT_RUN)


def _check_path(path: Path) -> None:
    if path.suffix != ".mlpackage":
        raise ConfigError(
            f"{path}: Core ML reads packages whose name ends in .mlpackage; call it {path.stem}.mlpackage"
        )
    check_folder(path.parent)
    if path.exists() and not (path / _MANIFEST).is_file():
        raise ConfigError(f"{path}: is there and no Core ML package; remove it, or give another name")


def _convert(module: GraphModule, student: Student) -> Any:
    coremltools = _coremltools()
    placeholder = module.graph.find_nodes(op="placeholder")[0]
    placeholder.name = placeholder.target = "input"
    for pooling in module.graph.find_nodes(op="call_function", target=aten.max_pool2d.default):
        pooling.args = (*pooling.args[:2], *(pooling.args[2:3] or pooling.args[1:2]), *pooling.args[3:])
    module.recompile()
    passes = coremltools.PassPipeline.DEFAULT
    passes.remove_passes({_RESCALING})
    try:
        with torch.no_grad(), warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # progress bars
            warnings.simplefilter("ignore")  # of coremltools' own modules, nothing that a user can act on
            program = torch.export.export(module, (torch.zeros(1, *student.input_spec.shape),)).run_decompositions({})
            model = coremltools.convert(
                program,
                outputs=[coremltools.TensorType(name="logits")],
                minimum_deployment_target=coremltools.target.iOS17,
                compute_precision=coremltools.precision.FLOAT32,  # float16 would round the steps
                pass_pipeline=passes,
                skip_model_load=True,
            )
    except Exception as error:  # coremltools raises NotImplementedError, ValueError, AssertionError and more
        raise UnsupportedModelError(f"no Core ML counterpart for part of the model: {first_line(error)}") from error
    model.short_description = f"{NOT_RUN}."
    model.user_defined_metadata.update(
        {
            "qimera.version": __version__,
            "qimera.teacher_hash": student.teacher_hash,
            "qimera.quantization": student.settings.model_dump_json(),
            "qimera.input": student.input_spec.model_dump_json(),
        }
    )
    return model


def _coremltools() -> Any:
    """Import coremltools without what it says about versions, and about parts that only Apple's machines have."""
    logging.getLogger("coremltools").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import coremltools
    return coremltools


def _check_integers(module: GraphModule, package: Path) -> None:
    """Raise VerificationError unless the package has all grids and weights of ``module``, and no other.

    Grids of constants may be missing, since coremltools stores the numbers that such constants come to.
    """
    operations = list(_operations(package))
    found, expected = _grids_in_package(operations), _grids_of(module)
    required = {grid for grid, is_of_constant in expected.items() if not is_of_constant}
    for step, zero_point in (found - expected.keys()) | (required - found):
        where = "only the package's" if (step, zero_point) in found else "only the student's"
        raise VerificationError(
            f"Core ML: step {step:.9g} with zero point {zero_point} is {where}; no file was written"
        )
    weights, expected_weights = _weights_in_package(operations), Counter(_weights_of(module))
    if weights != expected_weights:
        shape = next(iter((expected_weights - weights) + (weights - expected_weights)))[2]
        raise VerificationError(
            f"Core ML: a weight of shape {list(shape)} is not the student's, or has other steps; no file was written"
        )


def _operations(package: Path) -> Iterator[Any]:
    from coremltools.converters.mil.frontend.milproto.load import load
    from coremltools.models import MLModel

    model = MLModel(str(package), skip_model_load=True)
    program = load(model.get_spec(), model.get_spec().specificationVersion, str(model.weights_dir))
    for function in program.functions.values():
        yield from function.operations


def _grids_in_package(operations: list[Any]) -> set[_Grid]:
    from coremltools.converters.mil.mil import types

    found = set()
    for each in operations:
        levels = _levels(each)
        if levels is not None and each.scale.val.ndim == 0:
            zero_point = 0 if each.zero_point is None else int(each.zero_point.val)
            lowest = {types.int8: -128, types.uint8: 0}[levels.dtype]
            found.add((float(np.float32(each.scale.val)), zero_point - lowest))
    return found


def _levels(operation: Any) -> Any:
    """Return the integers that ``operation`` writes or reads; None if it is about no integers."""
    match operation.op_type:
        case "quantize":
            return operation.outputs[0]
        case "dequantize":
            return operation.input
        case "constexpr_affine_dequantize":
            return operation.quantized_data
    return None


def _grids_of(module: GraphModule) -> dict[_Grid, bool]:
    """Return each grid of activations, and whether all that lies on it are constants."""
    found: dict[_Grid, bool] = {}
    of_images: set[Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder" or not of_images.isdisjoint(node.all_input_nodes):
            of_images.add(node)
        if node.target in (QUANTIZE, DEQUANTIZE):
            grid = float(np.float32(node.args[1])), int(node.args[2])
            found[grid] = found.get(grid, True) and node not in of_images
    return found


def _weights_in_package(operations: list[Any]) -> Counter[_Weight]:
    found: Counter[_Weight] = Counter()
    for each in operations:
        if each.op_type == "constexpr_affine_dequantize" and each.scale.val.ndim:
            integers, steps = each.quantized_data.val, each.scale.val
            found[integers.tobytes(), steps.tobytes(), integers.shape] += 1
    return found


def _weights_of(module: GraphModule) -> Iterator[_Weight]:
    for node in module.graph.find_nodes(op="call_function", target=DEQUANTIZE_CHANNELS):
        integers, steps = (tensor_of(module, node_at(node, index)).contiguous().numpy() for index in (0, 1))
        yield integers.tobytes(), steps.tobytes(), integers.shape
