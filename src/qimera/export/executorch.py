"""A student -> an ExecuTorch program whose layers run in XNNPACK's int8 kernels, compared with the student."""

import logging
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from qimera.errors import ConfigError, UnsupportedModelError, first_line
from qimera.export.comparison import MIN_AGREEMENT, Verification, multiplying
from qimera.export.program import (
    DEQUANTIZE,
    DEQUANTIZE_CHANNELS,
    QUANTIZE,
    freeze_,
    integer_graph,
    verify_program,
)
from qimera.graph.nodes import node_at
from qimera.machine.files import place_for, replacing
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank

_OFFSET = 128
"""Between levels counted from 0, as ours, and levels of int8, as XNNPACK's."""

_MATRIX_OPERATIONS = {f"aten.{name}.default" for name in ("convolution", "linear", "addmm", "mm", "bmm")}


def export_executorch(
    student: Student, path: Path | str, samples: SampleBank | None = None, *, min_agreement: float = MIN_AGREEMENT
) -> Verification:
    """Write ``student`` as an ExecuTorch program (``.pte``) for XNNPACK and return how it compares.

    The program maps one normalised float32 image (1, channel, height, width) to logits. XNNPACK knows int8 alone:
    weights of fewer bits are stored in 8, activations of fewer bits are clipped to their grid inside the kernels.
    Layers that return the logits themselves stay in floating point, since XNNPACK's kernels return integers. Nothing is
    at ``path`` unless the comparison passed.

    Args:
        student: Of scheme ``hardware``.
        path: Where the file goes.
        samples: What the file is compared on; without them, on noise.
        min_agreement: Percent of samples that student and file must put into the same class.

    Raises:
        ConfigError: ``executorch`` is not installed, or no file can be written to ``path``.
        UnsupportedModelError: the student is of another scheme, or XNNPACK cannot represent part of it; the message
            names the operations that it leaves over.
        VerificationError: the file disagrees with the student.
    """
    if find_spec("executorch") is None:
        raise ConfigError("--format executorch: needs executorch; pip install 'qimera[executorch]'")
    path = place_for(path)
    module = integer_graph(student)
    float_nodes = _freeze_layers_of_logits_(module)
    _count_from_the_middle_(module)
    quantized = student.layer_names()
    float_layers = [name for node, name in multiplying(student).items() if node in float_nodes or node not in quantized]
    images = torch.zeros(1, *student.input_spec.shape)
    with torch.no_grad():
        program = torch.export.export(module, (images,))
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ExecuTorch's own modules and interfaces, nothing that a user can act on
        temporary.write_bytes(_lower(program))
        runtime = f"ExecuTorch {version('executorch')}"
        return verify_program(student, temporary, samples, min_agreement, runtime, _runner(temporary), float_layers)


def _freeze_layers_of_logits_(module: GraphModule) -> set[str]:
    """Give floating-point weights to layers whose results are on no grid, and return the names of their nodes."""
    frozen: set[str] = set()
    for node in list(module.graph.find_nodes(op="call_function", target=DEQUANTIZE_CHANNELS)):
        layers = list(node.users)
        if not all(_is_read_on_a_grid(layer) for layer in layers):
            freeze_(module, node)
            frozen.update(layer.name for layer in layers)
    module.graph.eliminate_dead_code()
    return frozen


def _is_read_on_a_grid(node: Node) -> bool:
    """Whether what ``node`` returns, through one activation function at most, goes to a quantizer alone."""
    readers = list(node.users)
    if len(readers) == 1 and readers[0].target not in (QUANTIZE, DEQUANTIZE) and readers[0].op == "call_function":
        readers = list(readers[0].users)
    return bool(readers) and all(reader.target is QUANTIZE for reader in readers)


def _count_from_the_middle_(module: GraphModule) -> None:
    """Turn levels of uint8 into those of int8, give every grid all of int8, and every tensor one order in memory."""
    for node in module.graph.nodes:
        if node.target in (QUANTIZE, DEQUANTIZE):
            tensor, scale, zero_point = node.args[:3]
            node.args = (tensor, scale, zero_point - _OFFSET, -128, 127, torch.int8)
        elif node.target is DEQUANTIZE_CHANNELS:
            node.args = (*(node_at(node, index) for index in range(3)), node.args[3], -127, 127, torch.int8)
    for tensor in module.buffers():
        tensor.data = tensor.data.contiguous().clone()
    module.recompile()


def _lower(program: ExportedProgram) -> bytes:
    """Return the file's content; every layer in it runs in XNNPACK."""
    logging.getLogger("executorch").setLevel(logging.ERROR)
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    settings = EdgeCompileConfig(_check_ir_validity=False)
    try:
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], compile_config=settings)
    except Exception as error:  # ExecuTorch raises bare Exception, AssertionError and more
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = first_line(cause)
        raise UnsupportedModelError(f"XNNPACK cannot represent the model: {reason}") from error
    left = _left_over(lowered.exported_program().graph_module)
    if left:
        raise UnsupportedModelError(
            f"XNNPACK has no integer kernel for {', '.join(left)} as they are in this model; export to ONNX instead"
        )
    content = lowered.to_executorch().buffer
    assert isinstance(content, bytes)
    return content


def _left_over(module: GraphModule) -> list[str]:
    """Return layers and steps between grids that were not taken into XNNPACK's part of the graph.

    ExecuTorch's own kernels run other operations that are left over, in floating point.
    """
    calls = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
    names = {call.split("EdgeOpOverload: ")[1].split(">")[0] for call in calls if "EdgeOpOverload: " in call}
    return sorted(name for name in names if name.startswith("quantized_decomposed") or name in _MATRIX_OPERATIONS)


def _runner(path: Path):  # type: ignore[no-untyped-def]
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")

    def run(images: Tensor) -> Tensor:
        return torch.cat([method.execute([image[None].contiguous()])[0].clone() for image in images])

    return run
