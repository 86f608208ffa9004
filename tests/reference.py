"""The method's equations as plain NumPy loops, in float64: slow, obvious, and written from the equations alone."""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

# --- latents and labels -----------------------------------------------------------------------------------------------


def normalize(latent: Array) -> Array:
    """(latent - mean) / standard deviation over the entries of one vector; 1e-5 under the root, as in layer norm."""
    mean = sum(latent) / len(latent)
    variance = sum((value - mean) ** 2 for value in latent) / len(latent)
    return np.array([(value - mean) / math.sqrt(variance + 1e-5) for value in latent])


def superpose(latents: Array, shares: Array) -> Array:
    """Sum over k of share k times latent k, for one sample."""
    mixed = np.zeros(latents.shape[1])
    for latent, share in zip(latents, shares, strict=True):
        for i, value in enumerate(latent):
            mixed[i] += share * value
    return mixed


def soft_label(classes: Labels, shares: Array, num_classes: int) -> Array:
    """The share of each class in one sample; a class drawn twice receives both shares."""
    label = np.zeros(num_classes)
    for each, share in zip(classes, shares, strict=True):
        label[each] += share
    return label


def mixed_latent(
    embedding: Array, noise_scale: float, mapping: Array | None, classes: Labels, shares: Array, noise: Array
) -> Array:
    """One sample's generator input: embed, add noise, normalise and map each class, then superpose."""
    latents = []
    for each, draw in zip(classes, noise, strict=True):
        latent = normalize(embedding[each] + noise_scale * draw)
        latents.append(latent if mapping is None else matrix_times(mapping, latent))
    return superpose(np.array(latents), shares)


def matrix_times(matrix: Array, vector: Array) -> Array:
    """Matrix times vector, entry by entry."""
    return np.array([sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix])


# --- generator --------------------------------------------------------------------------------------------------------


def class_conditional_batch_norm(x: Array, label: Array, scale: Array, shift: Array, eps: float) -> Array:
    """Normalise each channel over the batch; scale and shift are sums over classes, weighted by the label."""
    y = np.empty_like(x)
    for channel in range(x.shape[1]):
        mean = x[:, channel].mean()
        variance = ((x[:, channel] - mean) ** 2).mean()
        for sample in range(x.shape[0]):
            gamma = sum(label[sample, c] * scale[c, channel] for c in range(len(scale)))
            beta = sum(label[sample, c] * shift[c, channel] for c in range(len(shift)))
            y[sample, channel] = gamma * (x[sample, channel] - mean) / math.sqrt(variance + eps) + beta
    return y


# --- losses -----------------------------------------------------------------------------------------------------------


def channel_statistics(x: Array) -> tuple[list[float], list[float]]:
    """Mean and variance of each channel over batch and positions."""
    means, variances = [], []
    for channel in range(x.shape[1]):
        values = [float(value) for value in x[:, channel].flatten()]
        mean = sum(values) / len(values)
        means.append(mean)
        variances.append(sum((value - mean) ** 2 for value in values) / len(values))
    return means, variances


def bns_loss(entering: list[Array], recorded: list[tuple[Array, Array]], relative: bool = False) -> float:
    """Mean over layers of the mean over channels of the gaps of means and of variances.

    Relative: gaps of means and of standard deviations, over the sum of both variances.
    """
    layers = []
    for x, (recorded_means, recorded_variances) in zip(entering, recorded, strict=True):
        channels = []
        for mean, variance, a, b in zip(*channel_statistics(x), recorded_means, recorded_variances, strict=True):
            if relative:
                gap = (mean - a) ** 2 + (math.sqrt(variance) - math.sqrt(b)) ** 2
                channels.append(gap / (variance + b))
            else:
                channels.append((mean - a) ** 2 + (variance - b) ** 2)
        layers.append(sum(channels) / len(channels))
    return sum(layers) / len(layers)


def softmax(logits: Array) -> Array:
    """exp(logit) over the sum of exp(logits), for one sample."""
    top = max(logits)
    powers = [math.exp(value - top) for value in logits]
    return np.array([power / sum(powers) for power in powers])


def soft_cross_entropy(logits: Array, labels: Array) -> float:
    """-sum over classes of label times log probability, mean over samples."""
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        total -= sum(share * math.log(p) for share, p in zip(label, softmax(row), strict=True))
    return total / len(logits)


def kl_divergence(student: Array, teacher: Array, temperature: float) -> float:
    """T^2 times sum over classes of p log(p / q), mean over samples; p is the teacher's, q the student's, at T."""
    total = 0.0
    for mine, theirs in zip(student, teacher, strict=True):
        q, p = softmax(mine / temperature), softmax(theirs / temperature)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(student)


def total_variation(images: Array) -> float:
    """Mean absolute difference of vertical neighbours plus that of horizontal ones."""
    vertical, horizontal = [], []
    for image in images.reshape(-1, *images.shape[2:]):
        height, width = image.shape
        vertical += [abs(image[i + 1, j] - image[i, j]) for i in range(height - 1) for j in range(width)]
        horizontal += [abs(image[i, j + 1] - image[i, j]) for i in range(height) for j in range(width - 1)]
    return sum(vertical) / len(vertical) + sum(horizontal) / len(horizontal)


def feature_loss(features: list[Array], targets: list[Array]) -> float:
    """Mean over blocks of the mean squared error over the unbiased variance of the target."""
    losses = []
    for mine, theirs in zip(features, targets, strict=True):
        error = ((mine - theirs) ** 2).mean()
        losses.append(error / (((theirs - theirs.mean()) ** 2).sum() / (theirs.size - 1)))
    return sum(losses) / len(losses)


# --- quantization -----------------------------------------------------------------------------------------------------


def quantize(x: float, scale: float, zero_point: int, low: int, high: int) -> int:
    """clamp(round(x / scale) + zero point); ties go to the even integer, as in IEEE 754."""
    return min(max(round(x / scale) + zero_point, low), high)


def fake_quantize(x: Array, scale: float, zero_point: int, low: int, high: int) -> Array:
    """(quantize(x) - zero point) * scale, value by value."""
    levels = [(quantize(float(value), scale, zero_point, low, high) - zero_point) * scale for value in x.flatten()]
    return np.array(levels).reshape(x.shape)


def fake_quantize_per_channel(x: Array, scale: Array, zero_point: Labels, low: int, high: int) -> Array:
    """fake_quantize for each slice along the first axis with its own step and zero point."""
    return np.stack([fake_quantize(x[i], float(scale[i]), int(zero_point[i]), low, high) for i in range(len(x))])


def min_max_parameters(x: Array, low: int, high: int, symmetric: bool) -> tuple[float, int]:
    """Scale and zero point of the smallest grid that covers zero and all of x."""
    smallest, largest = min(0.0, float(x.min())), max(0.0, float(x.max()))
    if symmetric:
        return max(largest / high, smallest / low), 0
    scale = (largest - smallest) / (high - low)
    return scale, min(max(round(low - smallest / scale), low), high)


def learned_step_gradients(
    x: Array, dy: Array, scale: float, zero_point: int, low: int, high: int
) -> tuple[Array, float]:
    """Gradients of LSQ to x and to the step, value by value.

    To x: dy where x is rounded, 0 where it is clamped. To the step: round(x / s) - x / s where rounded, the level
    where clamped. A value within half a step outside the last level is still rounded to it, not clamped.
    """
    dx, ds = np.zeros_like(x), 0.0
    for index, value in np.ndenumerate(x):
        v = float(value) / scale
        level = quantize(float(value), scale, zero_point, low, high) - zero_point
        if low - zero_point <= round(v) <= high - zero_point:
            dx[index] = dy[index]
            ds += dy[index] * (level - v)
        else:
            ds += dy[index] * level
    return dx, ds
