"""Fake quantizers: what a tensor becomes on its integer grid, with the gradients that training needs."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd import Function
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase

from qimera.graph.nodes import aten
from qimera.quantization.ranges import RangeMethod, affine_parameters, search_affine_parameters

Levels = Tensor | int
"""Levels counted in steps from zero: one number, or one per channel."""

_BIAS_LEVELS = 1 << 24
"""Levels that a bias may use of int32 to either side: float32 holds them exactly, and sums get the rest."""


def round_to_grid(x: Tensor, scale: Tensor, low: Levels, high: Levels) -> Tensor:
    """Return the multiple of ``scale`` between ``low`` and ``high`` steps that is nearest to ``x``, half to even.

    The arithmetic is that of ``torch.ops.quantized_decomposed`` (multiplying by the reciprocal), bit for bit.
    """
    steps = x * (1 / scale)
    if torch.compiler.is_compiling():  # fused anyway, and torch 2.11 loses the gradient of what is changed in place
        return steps.round().clamp(low, high) * scale  # type: ignore[arg-type]
    return steps.round_().clamp_(low, high).mul_(scale)  # type: ignore[arg-type]


class _LearnedStep(Function):
    """``round_to_grid`` with the gradients of Esser et al. 2020 (LSQ).

    The gradient passes to ``x`` where it is rounded, and not where it is clamped. The step gets (q - x / s) where ``x``
    is rounded and q where it is clamped. The range reaches half a step beyond its last levels (deviation D10). Summed
    over all elements, the gradient of the step is (dy . y - dx . x) / s. With one clipped copy of dy and two dot
    products, nothing is stored or read beyond what training needs anyway.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, low: Levels, high: Levels) -> Tensor:  # type: ignore[no-untyped-def]
        y = round_to_grid(x, scale, low, high)
        ctx.save_for_backward(x, y, scale)
        ctx.range = low, high
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[no-untyped-def]
        x, y, scale = ctx.saved_tensors
        low, high = ctx.range
        # As a number the step is faster, but another device would have to be waited for.
        if scale.ndim == 0 and scale.is_cpu and not torch.compiler.is_compiling():
            step = float(scale)
            dx = aten.hardtanh_backward(dy, x, (low - 0.5) * step, (high + 0.5) * step)
            return dx, (_dot(dy, y) - _dot(dx, x)) / scale, None, None
        dx = dy * ((x >= (low - 0.5) * scale) & (x <= (high + 0.5) * scale))
        return dx, (dy * y - dx * x).sum_to_size(scale.shape) / scale, None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of products; one pass when both lie in memory in the same order."""
    if a.stride() == b.stride() and a.is_contiguous(memory_format=torch.channels_last) and a.ndim == 4:
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return torch.dot(a.reshape(-1), b.reshape(-1))


class _Declared(FakeQuantizeBase):
    """What all kinds share: what torchao reads of a fake quantizer."""

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        quant_min: int,
        quant_max: int,
        qscheme: torch.qscheme,
        is_dynamic: bool = False,
        ch_axis: int = -1,
    ) -> None:
        super().__init__()
        for name in ("fake_quant_enabled", "observer_enabled"):  # tensors that would cost a synchronisation per call
            self.register_buffer(name, torch.ones(1, dtype=torch.uint8), persistent=False)
        self.dtype, self.qscheme, self.is_dynamic = dtype, qscheme, is_dynamic
        self.quant_min, self.quant_max, self.ch_axis = quant_min, quant_max, ch_axis
        self.searching: RangeMethod | None = None
        """While set, every call first fits the range to its input; a bias enlarges the range of its layer's weight."""

    def search_(self, method: RangeMethod | None) -> None:
        """Begin a search of the range, or end it with None."""
        self.searching = method


class _FakeQuantize(_Declared):
    """What the kinds for weights and activations share: a granularity, and a scale and zero point once searched."""

    def __init__(self, *, shape: tuple[int, ...] = (), **declared: Any) -> None:
        super().__init__(**declared)
        self.symmetric = self.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
        self.broadcast = tuple(size if axis == self.ch_axis else 1 for axis, size in enumerate(shape))
        """Shape that lines scale and zero point up with the tensor; () for one scale."""
        self.register_buffer("zero_point", torch.zeros(self.broadcast, dtype=torch.int32))
        self.low: Levels = self.quant_min
        """Lowest level, counted in steps from zero; a number where all channels share it, which is faster."""
        self.high: Levels = self.quant_max
        """Highest level, counted in steps from zero."""
        self.register_load_state_dict_post_hook(_count_levels)  # type: ignore[no-untyped-call]

    zero_point: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_FakeQuantize":
        """Move levels along with the zero points that they are counted from."""
        if isinstance(self.low, Tensor) and isinstance(self.high, Tensor):
            self.low, self.high = fn(self.low), fn(self.high)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def scale(self) -> Tensor:
        raise NotImplementedError

    def calculate_qparams(self, **_: object) -> tuple[Float[Tensor, "..."], Int[Tensor, "..."]]:
        """Return (scale, zero point), one each or one per channel, as ``convert_pt2e`` asks for them."""
        scale, zero_point = self.scale.detach(), self.zero_point
        return (scale.reshape(-1), zero_point.reshape(-1)) if self.broadcast else (scale, zero_point)

    def fit_(self, x: Tensor, method: RangeMethod) -> None:
        """Set scale and zero point to suit ``x``."""
        find = search_affine_parameters if method == "mse" else affine_parameters
        axis = self.ch_axis if self.broadcast else None
        scale, zero_point = find(x.detach(), self.quant_min, self.quant_max, symmetric=self.symmetric, axis=axis)
        self.set_(scale.reshape(self.broadcast), zero_point.reshape(self.broadcast))

    def set_(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set the step and the zero point."""
        self._set_scale_(scale)
        self.zero_point.copy_(zero_point)
        _count_levels(self)

    def _set_scale_(self, scale: Tensor) -> None:
        raise NotImplementedError


def _count_levels(quantizer: _FakeQuantize, _: object = None) -> None:
    """Bring ``low`` and ``high`` in line with the zero point."""
    offset = (
        quantizer.zero_point if quantizer.broadcast and not quantizer.symmetric else int(quantizer.zero_point.max())
    )
    quantizer.low, quantizer.high = quantizer.quant_min - offset, quantizer.quant_max - offset


class LearnedStepFakeQuantize(_FakeQuantize):
    """Fake quantizer whose step is learned as a logarithm; the zero point stays where the range search put it.

    A logarithm lets one learning rate serve steps of every size; LSQ learns the step itself (deviation D10).
    """

    def __init__(self, **spec: object) -> None:
        super().__init__(**spec)  # type: ignore[arg-type]
        self.log_scale = nn.Parameter(torch.zeros(self.broadcast))

    @property
    def scale(self) -> Tensor:
        """The step, in the unit of the tensor."""
        return self.log_scale.exp()

    def _set_scale_(self, scale: Tensor) -> None:
        self.log_scale.data.copy_(scale.log())

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` on the grid."""
        if self.searching is not None:
            self.fit_(x, self.searching)
        y = _LearnedStep.apply(x, self.scale, self.low, self.high)  # type: ignore[no-untyped-call]
        assert isinstance(y, Tensor)
        return y


class MinMaxFakeQuantize(_FakeQuantize):
    """Fake quantizer of GDFQ and Qimera: range from minimum and maximum, gradient passed on unchanged.

    With ``per_call`` the range follows the tensor itself (weights); else it averages over the calls made while
    ``searching`` (activations).
    """

    def __init__(self, *, per_call: bool = False, **spec: object) -> None:
        super().__init__(**spec)  # type: ignore[arg-type]
        self.per_call = per_call
        self.register_buffer("_scale", torch.ones(self.broadcast))
        self.register_buffer("extremes", torch.zeros(2))
        self.num_calls = 0

    _scale: Tensor
    extremes: Tensor

    def search_(self, method: RangeMethod | None) -> None:
        """Begin a search of the range, in which no earlier one has a part, or end it with None."""
        super().search_(method)
        self.num_calls = 0

    @property
    def scale(self) -> Tensor:
        """The step, in the unit of the tensor."""
        return self._scale

    def _set_scale_(self, scale: Tensor) -> None:
        self._scale.copy_(scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` on the grid."""
        if self.per_call:
            self.fit_(x, "minmax")
        elif self.searching is not None:
            self.num_calls += 1  # a plain running mean; the authors correct the bias of theirs twice (deviation D12)
            now = torch.stack(torch.aminmax(x.detach()))
            self.extremes.lerp_(now, 1 / self.num_calls)
            self.fit_(self.extremes, "minmax")
        # x - x.detach() is exactly 0 and carries the gradient; x + (q - x) would round away from the grid
        return round_to_grid(x.detach(), self.scale, self.low, self.high) + (x - x.detach())


class PerChannelBiasFakeQuantize(_Declared):
    """Fake quantizer of a bias: the int32 grid of the sums that it is added to (deviation D27).

    Its step is the product of the steps of the layer's input and weight, which ``follow_`` names, so nothing is learned
    here. torchao keeps the channel axis of classes with ``PerChannel`` in their name alone.
    """

    def __init__(self, *, num_channels: int, **declared: Any) -> None:
        super().__init__(**declared)
        self.num_channels = num_channels
        self.followed: tuple[LearnedStepFakeQuantize, LearnedStepFakeQuantize] | None = None  # a tuple: not submodules

    def follow_(self, activation: LearnedStepFakeQuantize, weight: LearnedStepFakeQuantize) -> None:
        """Take the step from the quantizers of the layer's input and weight."""
        self.followed = (activation, weight)

    @property
    def scale(self) -> Float[Tensor, " channel"]:
        """The step of every channel, in the unit of the bias."""
        assert self.followed is not None
        activation, weight = (each.scale.detach() for each in self.followed)
        scale = (activation * weight.reshape(-1)).clamp(min=torch.finfo(torch.float32).tiny)
        return scale.repeat(self.num_channels // len(scale))  # the groups of a transposed convolution share theirs

    def calculate_qparams(self, **_: object) -> tuple[Float[Tensor, " channel"], Int[Tensor, " channel"]]:
        """Return (scale, zero point) per channel, as ``convert_pt2e`` asks for them."""
        scale = self.scale
        return scale, torch.zeros_like(scale, dtype=torch.int32)

    def forward(self, x: Float[Tensor, " channel"]) -> Float[Tensor, " channel"]:
        """Return the bias on the grid."""
        if self.searching is not None:
            self._make_room_(x.detach())
        y = _LearnedStep.apply(x, self.scale, self.quant_min, self.quant_max)  # type: ignore[no-untyped-call]
        assert isinstance(y, Tensor)
        return y

    def _make_room_(self, bias: Float[Tensor, " channel"]) -> None:
        """Enlarge the steps of channels whose weights are so small that the bias would not fit beside them.

        Such channels are dead: their weights are next to nothing before and after.
        """
        assert self.followed is not None
        activation, weight = self.followed
        step = weight.scale.detach()
        largest = bias.abs().view(-1, step.numel()).amax(0) / (activation.scale.detach() * _BIAS_LEVELS)
        floor = torch.maximum(largest, step.max() / _BIAS_LEVELS).view_as(step)
        weight.set_(torch.maximum(step, floor), weight.zero_point)


FakeQuantize = LearnedStepFakeQuantize | MinMaxFakeQuantize | PerChannelBiasFakeQuantize
