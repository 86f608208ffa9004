"""What a synthetic batch is judged by: the teacher's batch-norm statistics, its labels, its smoothness."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from qimera.config.settings import DirectSettings, GeneratorSettings
from qimera.errors import ConfigError
from qimera.machine.acceleration import at_least_float32
from qimera.teacher.teacher import BatchNormTap, Taps, Teacher


def bns_loss(
    entering: Sequence[Tensor], taps: Sequence[BatchNormTap], *, relative: bool = False, by_sums: bool = False
) -> Float[Tensor, ""]:
    """Return the batch-normalization statistics loss, averaged over layers.

    Plain, it is the mean squared error of means plus that of variances over channels (Choi et al. 2021, L_BNS, after
    GDFQ). ``relative`` divides the squared differences of means and of standard deviations by the sum of both
    variances, so that every channel of every layer counts alike (deviation D7).

    Args:
        entering: Input of every batch norm for one batch, each (batch, channel, ...).
        taps: The statistics recorded in training, in the same order; at least one.
        relative: Which of the two.
        by_sums: Compute variances from sums of squares around the recorded means: faster, with other last digits.
    """
    losses = []
    for x, tap in zip(entering, taps, strict=True):
        mean, var = channel_moments(x, tap.mean if by_sums else None)
        if relative:
            gap = (mean - tap.mean).square() + (safe_sqrt(var) - safe_sqrt(tap.var)).square()
            losses.append((gap / (var + tap.var + 1e-8)).mean())
        else:
            losses.append(F.mse_loss(mean, tap.mean) + F.mse_loss(var, tap.var))
    return torch.stack(losses).mean()


def layer_norm_loss(entering: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Return how far channels behind layer norms are from mean 0 and variance 1, averaged over channels and layers.

    A layer norm gives every token mean 0 and variance 1 over its channels, so that over tokens and images, too, an
    average channel has them. Where samples are poor, a few channels are loud and the others still (deviation D34).

    Args:
        entering: Input of every layer norm for one batch, each (batch, ..., channel); at least one.
    """
    losses = []
    for x in entering:
        tokens = F.layer_norm(at_least_float32(x), x.shape[-1:]).flatten(0, -2)
        mean, var = channel_moments(tokens, torch.zeros_like(tokens[0]))
        losses.append(((mean.square() + (safe_sqrt(var) - 1).square()) / (var + 1)).mean())
    return torch.stack(losses).mean()


def spread_loss(attended: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Return minus the standard deviation of the similarities between tokens, averaged over images and attentions.

    Tokens of real images resemble some others and not the rest, where those of noise are all alike (PSAQ-ViT, Li et al.
    2022, whose measure is the entropy of the same similarities; deviation D35).

    Args:
        attended: What every attention returns for one batch, each (batch, head, token, feature) or (..., token,
            feature); at least one.
    """
    losses = []
    for tokens in attended:
        mean, mean_square = _similarity_moments(_directions(tokens), tokens.dtype)
        losses.append(-safe_sqrt((mean_square - mean.square()).clamp(min=0)).mean())
    return torch.stack(losses).mean()


def entropy_loss(attended: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Return minus the entropy of the similarities between tokens, in nats, averaged over images and attentions.

    Their density comes from Gaussian kernels (PSAQ-ViT, Li et al. 2022), here with a standard deviation of 0.05, and is
    integrated over 41 points between -1 and 1; the authors take 0.01, and 10 points that the kernels do not cover.

    Args:
        attended: As in ``spread_loss``.
    """
    losses = []
    for directions in map(_directions, attended):
        similarities = (directions @ directions.mT).flatten(1)
        points = torch.linspace(-1, 1, 41, dtype=similarities.dtype, device=similarities.device)
        few = similarities.split(max(1, _IN_CACHE // similarities.shape[1]))
        density = torch.cat([_Density.apply(rows, points, 0.05) for rows in few])  # type: ignore[no-untyped-call]
        losses.append(torch.trapezoid(density * (density + 1e-8).log(), points, dim=1).mean())
    return torch.stack(losses).mean()


_IN_CACHE = 2**17
"""Numbers on which operations one after the other find the results of the last one in the processor's cache."""


class _Density(Function):
    """Density of each row's values at some points, by Gaussian kernels.

    Autograd would keep three numbers for each value and point: 17 GB for four attentions of 128 images of 256 tokens.
    """

    @staticmethod
    def forward(ctx, x: Tensor, points: Tensor, width: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, points)
        ctx.width = width
        return torch.stack([_kernel(x, point, width).mean(1) for point in points], 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        x, points = ctx.saved_tensors
        dx = torch.zeros_like(x)
        for point, each in zip(points, grad.unbind(1), strict=True):
            factor = each[:, None] / (ctx.width**2 * x.shape[1])
            dx += _kernel(x, point, ctx.width).mul_(point - x).mul_(factor)
        return dx, None, None


def _kernel(x: Tensor, centre: Tensor, width: float) -> Tensor:
    exponent = ((x - centre) / width).square_().mul_(-0.5).clamp_(min=-60)  # processors are slow on denormal numbers
    return exponent.exp_().div_(width * math.sqrt(2 * math.pi))


def heads_loss(scores: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Return 1 - SSIM^2 of what two heads look at, averaged over pairs of heads, queries, images and attentions.

    Heads look at the same objects of real images, and not of noise (MimiQ, Choi et al. 2025). Each query's scores are
    brought to between 0 and 1 first; a class token, which is beside a square of patches, is left out.

    Args:
        scores: Products of queries and keys for one batch, each (batch, head, query, key).

    Raises:
        ConfigError: no attention has several heads that stand apart.
    """
    maps = [x for x in scores if x.ndim == 4 and x.shape[1] > 1]
    if not maps:
        raise ConfigError(
            'attention_loss is "heads", but no attention of this network has several heads side by side; '
            'take "spread" or "entropy"'
        )
    return torch.stack([_unlikeness_of_heads(at_least_float32(x)) for x in maps]).mean()


def _unlikeness_of_heads(scores: Float[Tensor, "batch head query key"]) -> Float[Tensor, ""]:
    num_heads, num_queries, num_keys = scores.shape[1:]
    if num_queries == num_keys > 1 and math.isqrt(num_keys - 1) ** 2 == num_keys - 1:
        scores = scores[:, :, 1:, 1:]
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    maps = ((scores - low) / (high - low + 1e-8)).transpose(1, 2)  # (batch, query, head, key)
    mean = maps.mean(-1, keepdim=True)
    covariance = (maps - mean) @ (maps - mean).mT / maps.shape[-1]  # (batch, query, head, head)
    variance = covariance.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    first, second = 0.01**2, 0.03**2
    alike = (2 * mean * mean.mT + first) / (mean.square() + mean.square().mT + first)
    alike = alike * (2 * covariance + second) / (variance + variance.mT + second)
    return (1 - alike.square()).sum((-2, -1)).mean() / (num_heads * (num_heads - 1))


def _directions(x: Tensor) -> Float[Tensor, "image token feature"]:
    """Return every token that an attention returns as a vector of length 1, heads side by side."""
    tokens = (x.transpose(1, 2) if x.ndim == 4 else x.flatten(0, -3).unsqueeze(2)).flatten(2)
    return F.normalize(at_least_float32(tokens), dim=-1)


def _similarity_moments(
    directions: Float[Tensor, "batch token feature"], dtype: torch.dtype
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Return the mean and the mean square of the products of all pairs of an image's tokens.

    The squares of token by token products have the same sum as those of feature by feature products, which are fewer
    where there are more tokens than features. They are multiplied as ``dtype``, that of the network's own products.
    """
    _, num_tokens, num_features = directions.shape
    rounded = directions.to(dtype)
    narrow = rounded.mT if num_tokens > num_features else rounded
    products = at_least_float32(narrow @ narrow.mT)
    num_pairs = num_tokens**2
    mean = at_least_float32(rounded).sum(1).square().sum(1) / num_pairs
    return mean, products.square().sum((1, 2)) / num_pairs


Terms = dict[str, tuple[float, Tensor]]
"""Weight and loss of each term, by its name."""


def realism_terms(
    stage: str, taps: Taps, teacher: Teacher, settings: DirectSettings | GeneratorSettings, *, relative: bool
) -> Terms:
    """Return the terms by which samples resemble training images, of all that the teacher has.

    Args:
        stage: What the names of the terms begin with.
        taps: Of one batch.
        teacher: Whose batch norms recorded what training images were like.
        settings: Their weights.
        relative: As in ``bns_loss``.
    """
    terms: Terms = {}
    if teacher.batch_norms:
        by_sums = teacher.input_spec.has_large_images  # small ones would gain little, and keep the digits that they had
        gap = bns_loss(taps.batch_norms, teacher.batch_norms, relative=relative, by_sums=by_sums)
        terms[f"{stage}_bns"] = (settings.bns_weight, gap)
    if taps.layer_norms and settings.layer_norm_weight:
        terms[f"{stage}_layer_norm"] = (settings.layer_norm_weight, layer_norm_loss(taps.layer_norms))
    if taps.attentions and settings.attention_weight:
        terms[f"{stage}_attention"] = (settings.attention_weight, _attention_loss(taps, settings))
    return terms


def _attention_loss(taps: Taps, settings: DirectSettings | GeneratorSettings) -> Float[Tensor, ""]:
    match settings.attention_loss:
        case "spread":
            return spread_loss(taps.attentions)
        case "entropy":
            return entropy_loss(taps.attentions)
        case "heads":
            return heads_loss(taps.scores)


def total_of(terms: Terms) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Return the weighted sum of all terms, and each of them without its weight or gradient."""
    total = torch.stack([weight * loss for weight, loss in terms.values()]).sum()
    return total, {name: loss.detach() for name, (_, loss) in terms.items()}


class _ChannelMoments(Function):
    """Mean and variance per channel; the gradient is one multiply-add per element, where autograd's own takes ten."""

    @staticmethod
    def forward(ctx, x: Tensor, around: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        if around is None:
            var, mean = torch.var_mean(at_least_float32(x), [0, *range(2, x.ndim)], correction=0)
        else:
            away = at_least_float32(x).movedim(1, -1).flatten(0, -2) - around
            mean = away.mean(0)
            var = (away.square().mean(0) - mean.square()).clamp(min=0)
            mean = mean + around
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx, dmean: Tensor, dvar: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        x, mean = ctx.saved_tensors
        per_channel = (-1, *(1 for _ in x.shape[2:]))
        factor = dvar * (2 * len(mean) / x.numel())
        offset = dmean * (len(mean) / x.numel()) - factor * mean
        return torch.addcmul(offset.view(per_channel), x, factor.view(per_channel)).to(x.dtype), None


def channel_moments(
    x: Float[Tensor, "batch channel ..."], around: Float[Tensor, " channel"] | None = None
) -> tuple[Float[Tensor, " channel"], Float[Tensor, " channel"]]:
    """Return the mean and the (biased) variance of every channel over batch and positions.

    With values to look ``around``, which should be near the means, they come from one sum and one of squares, not from
    Welford's updates: ten times as fast, and a third faster when it is fused with what follows.
    """
    mean, var = _ChannelMoments.apply(x, around)  # type: ignore[no-untyped-call]
    return mean, var


def safe_sqrt(x: Tensor) -> Tensor:
    """Return the square root with a finite slope at zero."""
    return (x + 1e-8).sqrt()


def soft_cross_entropy(
    logits: Float[Tensor, "batch num_classes"], soft_label: Float[Tensor, "batch num_classes"]
) -> Float[Tensor, ""]:
    """Return the cross-entropy of the teacher's answer with the soft label, averaged over the batch."""
    return F.cross_entropy(logits, soft_label)


def total_variation(images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, ""]:
    """Return the mean absolute difference between neighbouring pixels, in the unit of the images."""
    return images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()
