"""The operations that a network may consist of: each is a function of tensors and plain numbers, and nothing else.

Files name operations, so this list is what they can ask for. No operation here reads or writes files, starts a process,
draws random numbers, or calls back into Python. Some of them write into their first argument, which is a tensor of the
graph.
"""

import math
import operator
from collections.abc import Callable
from functools import cache

import torch

_ATEN = """
    conv1d.default conv1d.padding conv2d.default conv2d.padding conv3d.default conv3d.padding convolution.default
    conv_transpose1d.default conv_transpose2d.input conv_transpose3d.input linear.default matmul.default mm.default
    bmm.default addmm.default baddbmm.default mv.default dot.default einsum.default
    scaled_dot_product_attention.default tensordot.default batch_norm.default
    _native_batch_norm_legit_no_training.default layer_norm.default native_layer_norm.default group_norm.default
    native_group_norm.default instance_norm.default rms_norm.default linalg_vector_norm.default norm.ScalarOpt_dim
    norm.Scalar norm.ScalarOpt_dim_dtype dropout.default dropout_.default feature_dropout.default
    feature_dropout_.default alpha_dropout.default alpha_dropout_.default feature_alpha_dropout.default
    feature_alpha_dropout_.default

    relu.default relu_.default relu6.default relu6_.default hardtanh.default hardtanh_.default leaky_relu.default
    leaky_relu_.default prelu.default elu.default elu_.default celu.default celu_.default selu.default selu_.default
    gelu.default gelu_.default silu.default silu_.default mish.default mish_.default softplus.default
    hardswish.default hardswish_.default hardsigmoid.default hardsigmoid_.default sigmoid.default sigmoid_.default
    tanh.default tanh_.default glu.default threshold.default threshold_.default log_sigmoid.default
    hardshrink.default softshrink.default softmax.int _softmax.default log_softmax.int _log_softmax.default
    logsumexp.default

    max_pool1d.default max_pool2d.default max_pool3d.default max_pool2d_with_indices.default avg_pool1d.default
    avg_pool2d.default avg_pool3d.default adaptive_avg_pool1d.default adaptive_avg_pool2d.default
    adaptive_avg_pool3d.default _adaptive_avg_pool2d.default adaptive_max_pool1d.default adaptive_max_pool2d.default
    mean.default mean.dim sum.default sum.dim_IntList amax.default amin.default max.default max.dim max.other
    min.default min.dim min.other maximum.default minimum.default var.default var.dim var.correction std.default
    std.dim std.correction var_mean.correction var_mean.dim prod.default prod.dim_int any.default any.dim
    all.default all.dim argmax.default argmin.default topk.default sort.default argsort.default cumsum.default
    cumprod.default

    add.Tensor add_.Tensor add.Scalar add_.Scalar sub.Tensor sub_.Tensor sub.Scalar sub_.Scalar rsub.Tensor
    rsub.Scalar mul.Tensor mul_.Tensor mul.Scalar mul_.Scalar div.Tensor div_.Tensor div.Scalar div_.Scalar
    div.Tensor_mode div.Scalar_mode floor_divide.default floor_divide.Scalar remainder.Scalar remainder.Tensor
    fmod.Scalar fmod.Tensor reciprocal.default addcmul.default addcdiv.default neg.default neg_.default abs.default
    abs_.default sign.default sgn.default pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar square.default sqrt.default
    sqrt_.default rsqrt.default exp.default exp_.default exp2.default expm1.default log.default log2.default
    log10.default log1p.default sin.default cos.default tan.default atan.default atan2.default asin.default
    acos.default sinh.default cosh.default erf.default erf_.default floor.default ceil.default round.default
    trunc.default frac.default clamp.default clamp_.default clamp.Tensor clamp_min.default clamp_min_.default
    clamp_max.default clamp_max_.default clip.default lerp.Scalar lerp.Tensor nan_to_num.default isnan.default
    isinf.default isfinite.default eq.Scalar eq.Tensor ne.Scalar ne.Tensor lt.Scalar lt.Tensor le.Scalar le.Tensor
    gt.Scalar gt.Tensor ge.Scalar ge.Tensor logical_and.default logical_or.default logical_not.default
    logical_xor.default bitwise_and.Tensor bitwise_or.Tensor bitwise_not.default bitwise_xor.Tensor where.self
    where.ScalarOther where.ScalarSelf where.Scalar masked_fill.Scalar masked_fill.Tensor masked_fill_.Scalar
    masked_fill_.Tensor

    flatten.using_ints unflatten.int view.default view_as.default reshape.default reshape_as.default
    _unsafe_view.default squeeze.default squeeze.dim squeeze.dims unsqueeze.default permute.default transpose.int
    t.default numpy_T.default mT.default movedim.int movedim.intlist swapaxes.default swapdims.default
    contiguous.default clone.default alias.default detach.default detach_.default lift_fresh_copy.default
    expand.default expand_as.default broadcast_to.default broadcast_tensors.default repeat.default
    repeat_interleave.self_int tile.default cat.default concat.default stack.default hstack.default vstack.default
    chunk.default split.Tensor split_with_sizes.default tensor_split.sections tensor_split.indices unbind.int
    select.int slice.Tensor narrow.default diagonal.default unfold.default im2col.default col2im.default
    unfold_copy.default roll.default flip.default rot90.default pixel_shuffle.default pixel_unshuffle.default
    channel_shuffle.default native_channel_shuffle.default pad.default constant_pad_nd.default
    reflection_pad1d.default reflection_pad2d.default replication_pad1d.default replication_pad2d.default
    index.Tensor index_select.default gather.default scatter.src scatter.value scatter_add.default index_put.default
    index_add.default slice_scatter.default select_scatter.default diagonal_scatter.default copy.default
    copy_.default fill.Scalar fill_.Scalar fill.Tensor fill_.Tensor zero_.default take.default tril.default
    triu.default embedding.default one_hot.default meshgrid.default meshgrid.indexing

    upsample_nearest1d.vec upsample_nearest1d.default upsample_nearest2d.vec upsample_nearest2d.default
    upsample_bilinear2d.vec upsample_bilinear2d.default upsample_bicubic2d.vec upsample_bicubic2d.default
    _upsample_nearest_exact2d.vec _upsample_nearest_exact2d.default _upsample_bilinear2d_aa.vec
    _upsample_bicubic2d_aa.vec upsample_linear1d.vec upsample_linear1d.default grid_sampler_2d.default
    grid_sampler.default affine_grid_generator.default

    zeros.default ones.default full.default zeros_like.default ones_like.default full_like.default new_zeros.default
    new_ones.default new_full.default arange.default arange.start arange.start_step linspace.default eye.default
    eye.m scalar_tensor.default to.dtype to.device to.dtype_layout to.other _to_copy.default type_as.default
    sym_size.int _assert_tensor_metadata.default _fft_r2c.default _fft_c2r.default _fft_c2c.default
    fft_rfft2.default fft_irfft2.default fft_rfft.default fft_irfft.default fft_fft2.default fft_ifft2.default
    view_as_real.default view_as_complex.default real.default

    lstm.input gru.input rnn_tanh.input rnn_relu.input
"""

_NUMBERS: dict[str, Callable[..., object]] = {
    **{f"operator.{name}": getattr(operator, name) for name in ("getitem", "add", "sub", "mul", "floordiv", "truediv")},
    **{f"operator.{name}": getattr(operator, name) for name in ("mod", "neg", "eq", "ne", "lt", "le", "gt", "ge")},
    **{f"torch.{name}": getattr(torch, name) for name in ("sym_max", "sym_min", "sym_float", "sym_int", "sym_not")},
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "math.trunc": math.trunc,
}
"""Arithmetic on sizes, such as that of a batch."""


@cache
def operations() -> dict[str, Callable[..., object]]:
    """Return every operation by its name, such as ``aten.conv2d.default`` or ``operator.getitem``."""
    found = dict(_NUMBERS)
    for name in _ATEN.split():
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(torch.ops.aten, packet, None), overload, None)
        if operation is not None:  # a torch of another version may lack one
            found[f"aten.{name}"] = operation
    return found


@cache
def _names() -> dict[Callable[..., object], str]:
    return {operation: name for name, operation in operations().items()}


def operation_name(target: object) -> str | None:
    """Return the name of an operation on the list; None for any other."""
    return _names().get(target) if callable(target) else None
