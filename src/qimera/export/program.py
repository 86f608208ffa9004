"""A student -> a torch.export program, or machine code that Inductor makes of it, each compared with the student."""

import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch._inductor
from torch import Tensor
from torch._inductor import config
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule, Node

from qimera.errors import ConfigError, UnsupportedModelError, VerificationError, first_line
from qimera.export.comparison import (
    MIN_AGREEMENT,
    Verification,
    check_agreement,
    check_scheme,
    compare,
    latencies_beside,
    logits_of,
    multiplying,
    refuse_lowest_weights,
    runtime_reason,
    sample_pixels,
)
from qimera.graph.nodes import WEIGHTED, aten, node_at, tensor_of
from qimera.machine.files import place_for, replacing
from qimera.quantization.scheme import RELUS, before_moves
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank

_BATCH = 64
_TORCH = torch.__version__.partition("+")[0]

_integers = torch.ops.quantized_decomposed
QUANTIZE = _integers.quantize_per_tensor.default
DEQUANTIZE = _integers.dequantize_per_tensor.default
DEQUANTIZE_CHANNELS = _integers.dequantize_per_channel.default

Program = Callable[[Tensor], Tensor]
"""One batch of normalised images -> logits."""


def export_pt2(
    student: Student, path: Path | str, samples: SampleBank | None = None, *, min_agreement: float = MIN_AGREEMENT
) -> Verification:
    """Write ``student`` as a torch.export program and return how it compares, run operation by operation.

    ``torch.export.load(path).module()`` maps normalised float32 images, any number at once, to logits. As it stands it
    computes integers in floating point; ``torch.compile`` with ``torch._inductor.config.freezing`` gives it integer
    kernels. Nothing is at ``path`` unless the comparison passed.

    Args:
        student: Of scheme ``hardware``.
        path: Where the file goes; its name ends in ``.pt2``.
        samples: What the file is compared on; without them, on noise.
        min_agreement: Percent of samples that student and file must put into the same class.

    Raises:
        ConfigError: the name does not end in ``.pt2``, or no file can be written to ``path``.
        UnsupportedModelError: the student is of another scheme.
        VerificationError: the file disagrees with the student.
    """
    path = _checked(Path(path))
    with replacing(path) as temporary:
        buffer = io.BytesIO()
        torch.export.save(integer_program(student), buffer)
        temporary.write_bytes(buffer.getvalue())
        program = torch.export.load(temporary).module()
        names = list(multiplying(student).values())
        return verify_program(
            student, temporary, samples, min_agreement, f"PyTorch {_TORCH}", program, names, lambda: student.reference
        )


def export_aotinductor(
    student: Student, path: Path | str, samples: SampleBank | None = None, *, min_agreement: float = MIN_AGREEMENT
) -> Verification:
    """Compile ``student`` for this machine's processor, write the package and return how it compares.

    ``torch._inductor.aoti_load_package(path)`` maps normalised float32 images, any number at once, to logits. Nothing
    is at ``path`` unless the comparison passed.

    Args:
        student: Of scheme ``hardware``.
        path: Where the package goes; its name ends in ``.pt2``.
        samples: What the package is compared on; without them, on noise.
        min_agreement: Percent of samples that student and package must put into the same class.

    Raises:
        ConfigError: there is no C++ compiler, the name does not end in ``.pt2``, or no file can be written to ``path``.
        UnsupportedModelError: the student is of another scheme, or Inductor cannot compile it.
        VerificationError: the package disagrees with the student.
    """
    path = _checked(Path(path))
    _require_compiler()
    with replacing(path) as temporary:
        integer_layers = _compile(integer_program(student), temporary)
        float_layers = [name for name in multiplying(student).values() if name not in integer_layers]
        program = torch._inductor.aoti_load_package(str(temporary))
        return verify_program(
            student, temporary, samples, min_agreement, f"AOTInductor {_TORCH}", program, float_layers
        )


def integer_program(student: Student) -> ExportedProgram:
    """Return the student as a program with a dynamic batch, in the form of which Inductor makes integer kernels."""
    module = integer_graph(student)
    with torch.no_grad():
        images = torch.zeros(2, *student.input_spec.shape)
        return torch.export.export(module, (images,), dynamic_shapes=({0: Dim.DYNAMIC},))


def integer_graph(student: Student) -> GraphModule:
    """Return the student in operations that compilers match with integer kernels.

    Raises:
        UnsupportedModelError: the student is of another scheme.
        VerificationError: a weight is -128.
    """
    check_scheme(student)
    module = student.converted()
    refuse_lowest_weights(
        (name, tensor.cpu().numpy()) for name, tensor in module.named_buffers() if tensor.dtype is torch.int8
    )
    _clip_to_grids_(module.graph)
    _freeze_(module)
    _requantize_moves_(module.graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _clip_to_grids_(graph: Graph) -> None:
    """Clip what narrow grids read to their range, since Inductor's kernels write to all 256 levels of uint8.

    The clip takes the place of an activation function before it, as kernels have room for one.
    """
    for quantizer in graph.find_nodes(op="call_function", target=QUANTIZE):
        scale, zero_point, *levels = quantizer.args[1:5]
        end = node_at(quantizer, 0)
        if levels != [0, 255] and end.target is not DEQUANTIZE:
            limits = [(level - zero_point) * scale for level in levels]
            tensor = end
            if end.target in RELUS and len(end.users) == 1:
                tensor, (low, high) = node_at(end, 0), _limits(end)
                limits = [min(max(limit, low), high) for limit in limits]
            with graph.inserting_before(quantizer):
                quantizer.replace_input_with(end, graph.call_function(aten.hardtanh.default, (tensor, *limits)))


def _limits(activation: Node) -> tuple[float, float]:
    """Return the least and the greatest number that an activation function returns."""
    if activation.target is aten.relu.default:
        return 0.0, math.inf
    if activation.target in (aten.relu6.default, aten.relu6_.default):
        return 0.0, 6.0
    given = [float(each) for each in activation.args[1:] if isinstance(each, int | float)]
    low, high = given + [-1.0, 1.0][len(given) :]
    return low, high


def _freeze_(module: GraphModule) -> None:
    """Store some parameters as the numbers that their integers stand for.

    Kernels read biases in float32. Weights of transposed convolutions must look like any other to Inductor, which
    would take the layers for plain convolutions.
    """
    for node in module.graph.find_nodes(op="call_function", target=DEQUANTIZE_CHANNELS):
        if node.args[-1] is torch.int32 or any(user.target is aten.conv_transpose2d.input for user in node.users):
            freeze_(module, node)


def freeze_(module: GraphModule, node: Node) -> None:
    """Store what ``node``, a dequantization of a parameter, returns."""
    tensors = (tensor_of(module, node_at(node, index)) for index in range(3))
    name = f"_frozen_{node.name}"
    module.register_buffer(name, DEQUANTIZE_CHANNELS(*tensors, *node.args[3:]))
    with module.graph.inserting_before(node):
        node.replace_all_uses_with(module.graph.get_attr(name))


def _requantize_moves_(graph: Graph) -> None:
    """Put what was moved about in front of a layer on its grid once more, where Inductor looks for integers."""
    for layer in [node for node in graph.nodes if node.target in WEIGHTED]:
        tensor = node_at(layer, 0)
        grid = before_moves(tensor)
        if grid is not tensor and grid.target is DEQUANTIZE:
            with graph.inserting_before(layer):
                integers = graph.call_function(QUANTIZE, (tensor, *grid.args[1:]))
                layer.replace_input_with(tensor, graph.call_function(DEQUANTIZE, (integers, *grid.args[1:])))


def _compile(program: ExportedProgram, path: Path) -> set[str]:
    """Write the package and return the names of the layers that run in its integer kernels."""
    kernel_steps: set[bytes] = set()
    settings = {
        "freezing": True,
        # Integers on their way to several readers are stored; computing them again for each is slower.
        "realize_opcount_threshold": 12,
        "realize_reads_threshold": 2,
        "post_grad_custom_post_pass": lambda graph: kernel_steps.update(_kernel_steps(graph)),
    }
    try:
        with torch.no_grad(), config.patch(settings), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch's own modules, nothing that a user can act on
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except RuntimeError as error:
        reason = first_line(error)
        raise UnsupportedModelError(f"Inductor cannot compile the model: {reason}") from error
    return {name for name, step in _layer_steps(program) if step in kernel_steps}


def _layer_steps(program: ExportedProgram) -> Iterator[tuple[str, bytes]]:
    """Yield the name of each layer with the steps of its weight's channels, which tell it from all others."""
    module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    for layer in [node for node in module.graph.nodes if node.target in WEIGHTED]:
        weight = node_at(layer, 1)
        if weight.target is DEQUANTIZE_CHANNELS:
            name = str(node_at(weight, 0).target).removesuffix(".weight")
            yield name, tensor_of(module, node_at(weight, 1)).numpy().tobytes()


def _kernel_steps(graph: Graph) -> Iterator[bytes]:
    """Yield the weight steps that integer kernels read; other layers only read the product of step and integers."""
    module = graph.owning_module
    assert module is not None
    for node in graph.find_nodes(op="get_attr"):
        value = tensor_of(module, node)
        is_step = value.ndim == 1 and value.dtype == torch.float32
        if is_step and any(user.target is not DEQUANTIZE_CHANNELS for user in node.users):
            yield value.detach().numpy().tobytes()


def _checked(path: Path) -> Path:
    if path.suffix != ".pt2":
        raise ConfigError(f"{path}: programs are read from files whose name ends in .pt2; call it {path.stem}.pt2")
    return place_for(path)


def _require_compiler() -> None:
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(
            "AOTInductor: no C++ compiler found; install g++, or name one in the environment variable CXX"
        ) from error


def verify_program(
    student: Student,
    path: Path,
    samples: SampleBank | None,
    min_agreement: float,
    runtime: str,
    program: Program,
    float_layers: list[str],
    reference: Callable[[], Program] | None = None,
) -> Verification:
    """Run student and program on ``samples``; raise VerificationError where too few come out the same.

    ``reference`` returns the full-precision model for the same runtime, whose time is taken beside that of the program.
    """
    images = student.input_spec.normalize(sample_pixels(student, samples))
    expected = logits_of(student, images).numpy()
    with torch.no_grad():
        try:
            actual = torch.cat([program(batch) for batch in images.split(_BATCH)]).numpy()
        except Exception as error:  # each runtime has errors of its own
            raise VerificationError(
                f"{runtime}: cannot run the file ({runtime_reason(error)}); no file was written"
            ) from error
    num_layers = len(multiplying(student))
    with torch.no_grad(), _one_thread():
        latencies = latencies_beside(program, images[:1], reference)
    comparison = compare(runtime, expected, actual, num_layers, float_layers, latencies)
    check_agreement(comparison, len(images), min_agreement)
    return Verification(num_layers, path.stat().st_size, len(images), (comparison,))


@contextmanager
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
