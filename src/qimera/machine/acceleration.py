"""What makes a training step fast: the device, bfloat16 where it is multiplied natively, fused loops where they pay.

All of them change the last bits of a result, never what is computed: weights, steps, losses and the optimiser stay
float32, and so does what the student answers.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.fx import GraphModule

from qimera.errors import ConfigError, first_line
from qimera.machine.modes import Compile, Precision

logger = logging.getLogger(__name__)


_P = ParamSpec("_P")
_R = TypeVar("_R")

_PIXELS_THAT_PAY = 15_000_000
"""Pixels of all steps together from which compiling saves more time than it costs. One thread that has the processor to
itself: ResNet-20's synthesis is compiled in 13 s and saves 2.4 us a pixel, its student in 50 s and 1.5 us."""

_STEPS_THAT_PAY = 2000
"""The same on a GPU, which waits for operations to be called one after the other, however many pixels they are for. On
a busy H100 ResNet-20's synthesis is compiled in 40 s and saves 16 ms a step, its student in 108 s and 51 ms."""


_OPTIONS: dict[str, str | int | bool | Callable[..., object]] = {"reorder_for_peak_memory": False}
"""Options of inductor. In torch 2.13 this pass moves the zeros to which the gradients of two enlarged images are added
behind the additions: the generator's coarse resolutions got no gradient at all (``tests/compiled_step.py``)."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back torch's own deprecation warnings, nothing that a user can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@cache
# To trace it would break the graph there, and compile every step anew.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_fast_bfloat16(device_type: str) -> bool:
    """Whether matrix units of this device multiply bfloat16 faster than float32."""
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return device_type == "cpu" and any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))


def find_device(name: torch.device | str) -> torch.device:
    """Return the device called ``name``: ``cpu``, ``cuda``, ``cuda:1``, or ``auto`` for a GPU if there is one.

    Of several processes of a run that were started for ``cuda``, each takes the next one.

    Raises:
        ConfigError: there is no such device, or this PyTorch cannot use it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % max(1, torch.cuda.device_count()))
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # the second where PyTorch was built without the device
        there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        listed = f"there are {', '.join(there)}" if len(there) > 1 else "there is only cpu"
        reason = "no such kind of device" if "device type at start of" in str(error) else first_line(error)
        meant = "cuda" if str(name).partition(":")[0] == "gpu" else name
        likely = "; did you mean cuda?" if meant != name and len(there) > 1 else ""
        raise ConfigError(f"device: {name} cannot be used ({reason}); {listed}{likely}") from None


def to_device_(module: GraphModule, device: torch.device) -> None:
    """Move parameters and buffers, and let the graph make its own tensors there."""
    module.to(device)
    for node in module.graph.nodes:
        if "device" in node.kwargs:
            node.update_kwarg("device", device)
    module.recompile()


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which convolutions and matrix products are computed at this precision."""
    return torch.autocast(device.type, torch.bfloat16) if _is_narrow(precision, device) else nullcontext()


@contextmanager
def exact_convolutions(device: torch.device) -> Iterator[None]:
    """Let a GPU convolve float32 as such, and not in the ten bits of mantissa that PyTorch lets it use."""
    if device.type != "cuda":
        yield
        return
    setting = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, setting.fp32_precision = setting.fp32_precision, "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before


def _is_narrow(precision: Precision, device: torch.device) -> bool:
    return precision == "bfloat16" or (precision == "auto" and has_fast_bfloat16(device.type))


def narrow_gradients_(module: GraphModule, precision: Precision) -> GraphModule:
    """Let convolutions compute in float32, and their gradients at this precision; return ``module``.

    Those of groups stay in float32: oneDNN takes up to eight times as long for them in bfloat16 (depthwise ones).
    """
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    if _is_narrow(precision, device):
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default):
            if node.args[6:] in ((), (1,)):
                node.target = _conv2d_with_narrow_gradients
        module.recompile()
    return module


def _conv2d_with_narrow_gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    _: int = 1,
) -> Tensor:
    y = _NarrowConv2d.apply(x, weight, bias, list(stride), list(padding), list(dilation))  # type: ignore[no-untyped-call]
    assert isinstance(y, Tensor)
    return y


class _NarrowConv2d(Function):
    """A convolution in float32 whose two backward ones are in bfloat16, and which keeps its input as such."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, dilation):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x.bfloat16(), weight.bfloat16())
        ctx.geometry, ctx.has_bias = (stride, padding, dilation, False, [0, 0], 1), bias is not None
        return torch.ops.aten.conv2d.default(x, weight, bias, stride, padding, dilation)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        backward = torch.ops.aten.convolution_backward.default
        dx, dweight, _ = backward(dy.bfloat16(), x, weight, None, *ctx.geometry, [True, True, False])
        dbias = dy.sum([0, 2, 3]) if ctx.has_bias else None
        return dx.to(dy.dtype), dweight.to(dy.dtype), dbias, None, None, None


def quick_gradients_(module: GraphModule) -> GraphModule:
    """Let depthwise convolutions with strides hand gradients to their inputs in a tenth of the time; return ``module``.

    oneDNN computes them at 0.5 billion multiply-adds a second on one core, and those without strides at 20 to 40. The
    gradient is the convolution, with the flipped weight, of the gradient behind it with zeros between its values.
    """
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default):
        weight = node.args[1]
        if len(node.args) == 7 and isinstance(weight, torch.fx.Node) and weight.op == "get_attr":
            stride, padding, dilation, groups = node.args[3:]
            owner, _, name = str(weight.target).rpartition(".")
            kernel = getattr(module.get_submodule(owner), name).shape
            within = isinstance(padding, list) and all(a < b for a, b in zip(padding, kernel[2:], strict=True))
            if within and kernel[:2] == (groups, 1) and dilation == [1, 1] and stride != [1, 1]:
                node.target = _strided_depthwise
    module.recompile()
    return module


def _strided_depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    _dilation: Sequence[int],
    groups: int,
) -> Tensor:
    y = _StridedDepthwise.apply(x, weight, bias, list(stride), list(padding), groups)  # type: ignore[no-untyped-call]
    assert isinstance(y, Tensor)
    return y


class _StridedDepthwise(Function):
    """A convolution of every channel alone, whose gradient to its input is one without strides; weights get none."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, groups):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(weight)
        ctx.geometry, ctx.size, ctx.dtype = (stride, padding, groups), x.shape, x.dtype
        return torch.ops.aten.conv2d.default(x, weight, bias, stride, padding, [1, 1], groups)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        (weight,) = ctx.saved_tensors
        (down, right), padding, groups = ctx.geometry
        kernel = weight.shape[2:]
        height, width = (ctx.size[2 + i] + 2 * padding[i] - kernel[i] + 1 for i in (0, 1))
        spread = dy.new_zeros(*dy.shape[:2], height, width).contiguous(memory_format=torch.channels_last)
        spread[:, :, ::down, ::right] = dy
        flipped = weight.flip(2, 3).to(dy.dtype)
        around = [size - 1 - each for size, each in zip(kernel, padding, strict=True)]
        dx = torch.ops.aten.conv2d.default(spread, flipped, None, [1, 1], around, [1, 1], groups)
        return dx.to(ctx.dtype), None, None, None, None, None


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32 if it is narrower: sums over many values need the digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def is_compiled(
    mode: Compile,
    num_steps: int,
    pixels_per_step: int,
    device: torch.device,
    pixels_that_pay: int = _PIXELS_THAT_PAY,
) -> bool:
    """Return whether ``mode`` asks for a compiled step, or so many of them make it pay."""
    on_gpu = device.type == "cuda"
    pays = num_steps >= _STEPS_THAT_PAY if on_gpu else num_steps * pixels_per_step >= pixels_that_pay
    return mode == "always" or (mode == "auto" and pays)


def begin_step(device: torch.device) -> None:
    """Tell CUDA graphs that nothing of the step before is read any more."""
    if device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()


def compiled(function: Callable[_P, _R], wanted: bool, device: torch.device) -> Callable[_P, _R]:
    """Return ``function`` compiled by ``torch.compile``, if it is ``wanted``.

    On a GPU it becomes a CUDA graph: what it returns is overwritten by the next step, which ``begin_step`` announces.
    Where compiling fails, for want of a C++ compiler for example, it says so once and goes on without.
    """
    if not wanted:
        return function
    with _quiet():
        fast = torch.compile(function, dynamic=False, options=_OPTIONS | {"triton.cudagraphs": device.type == "cuda"})
    working = True

    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        nonlocal working
        if working:
            try:
                with _quiet():
                    return fast(*args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:
                working = False
                reason = str(error).partition("\n")[0]
                logger.warning("training steps are not compiled, and take about twice as long: %s", reason)
        return function(*args, **kwargs)

    return call
