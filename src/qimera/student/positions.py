"""A layer and what enters and leaves it -> what its weights see at some positions, and should make of it."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.fx import Node

from qimera.graph.nodes import aten, pair

_MIN_POSITIONS = 8192
_POSITIONS_PER_INPUT = 20
"""Positions that a layer is seen at: enough to know each of its inputs' products with every other."""


def look_at_layer(
    node: Node, weight: Tensor, bias: Tensor | None, entering: Tensor, leaving: Tensor, rng: torch.Generator
) -> tuple[Float[Tensor, "group position input"], Float[Tensor, "group position output"]]:
    """Return what enters the layer at some random positions of every image, and what its weights should make of it."""
    num_inputs = weight[0].numel()
    wanted = max(_MIN_POSITIONS, _POSITIONS_PER_INPUT * num_inputs)
    chosen = choose_positions(node, leaving, wanted, rng)
    return inputs_at(node, weight, entering, chosen), outputs_at(node, weight, bias, leaving, chosen)


def choose_positions(node: Node, leaving: Tensor, wanted: int, rng: torch.Generator) -> Int[Tensor, " position"]:
    """Return ``wanted`` random positions of what the layer returns, as many of every image, counted through all images.

    Where there are not so many, they are all.
    """
    if node.target is aten.linear.default:
        return torch.randperm(leaving[..., 0].numel(), generator=rng)[:wanted].to(leaving.device)
    images, size = len(leaving), leaving.shape[2:].numel()
    each = min(size, -(-wanted // images))
    drawn = [index * size + torch.randperm(size, generator=rng)[:each] for index in range(images)]
    return torch.cat(drawn).to(leaving.device)


def inputs_at(
    node: Node, weight: Tensor, entering: Tensor, chosen: Int[Tensor, " position"]
) -> Float[Tensor, "group position input"]:
    """Return what the weights of the layer are multiplied by at the chosen positions."""
    num_inputs = weight[0].numel()
    if node.target is aten.linear.default:
        return entering.reshape(-1, num_inputs)[chosen][None]
    stride, padding, dilation = (pair(argument_of(node, *each)) for each in ((3, 1), (4, 0), (5, 1)))
    height, width = entering.shape[2:]
    kernel = weight.shape[2:]
    columns = _length(width, kernel[1], stride[1], padding[1], dilation[1])
    rows = _length(height, kernel[0], stride[0], padding[0], dilation[0])
    image, row, column = chosen // (rows * columns), chosen // columns % rows, chosen % columns
    pixels = entering.permute(0, 2, 3, 1).flatten(0, 2)  # (batch * height * width, channel)
    parts = []
    for down in range(kernel[0]):
        for right in range(kernel[1]):
            y = row * stride[0] - padding[0] + down * dilation[0]
            x = column * stride[1] - padding[1] + right * dilation[1]
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            seen = pixels[(image * height + y.clamp(0, height - 1)) * width + x.clamp(0, width - 1)]
            parts.append(torch.where(inside[:, None], seen, 0.0))
    patches = torch.stack(parts, 2)  # (position, channel, kernel)
    groups = int(argument_of(node, 6, 1))
    return patches.reshape(len(chosen), groups, num_inputs).permute(1, 2, 0).contiguous().mT


def outputs_at(
    node: Node, weight: Tensor, bias: Tensor | None, leaving: Tensor, chosen: Int[Tensor, " position"]
) -> Float[Tensor, "group position output"]:
    """Return what the weights of the layer should make of their inputs there, which is without its bias."""
    is_linear = node.target is aten.linear.default
    values = leaving.reshape(-1, len(weight)) if is_linear else leaving.permute(0, 2, 3, 1).flatten(0, 2)
    values = values[chosen] - (0 if bias is None else bias)
    if is_linear:
        return values[None]
    groups = int(argument_of(node, 6, 1))
    return values.reshape(len(chosen), groups, -1).permute(1, 2, 0).contiguous().mT


def _length(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Return how many positions a convolution computes along one direction."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def argument_of(node: Node, index: int, default: Any) -> Any:
    """Return the argument of ``node`` at this place, or ``default`` where it has none."""
    return node.args[index] if len(node.args) > index else default
