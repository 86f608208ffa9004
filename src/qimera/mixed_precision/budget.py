"""``size=0.14`` -> what bits cost, layer by layer, and how much they may cost together."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from torch.fx import Node

from qimera.config.settings import QuantizationSettings
from qimera.errors import ConfigError
from qimera.graph.costs import multiply_adds, total_multiply_adds
from qimera.graph.nodes import has_parameter, layer_name
from qimera.quantization.scheme import is_integer_product, reading_network_input, reads_network_input
from qimera.quantization.sizes import float_bytes, stored_layers, unquantized_bytes
from qimera.teacher.teacher import Teacher

WIDTHS = tuple(range(2, 9))
"""Bits that a budget can give to weights or activations."""

Bits = tuple[int, int]
"""Weight bits, activation bits."""

_FORM = re.compile(r"(size|bops)=(\d*\.?\d+(?:e-?\d+)?)", re.IGNORECASE)
_FLOAT_BITS = 32


@dataclass(frozen=True)
class Budget:
    """A share of what the teacher takes in float32."""

    measure: Literal["size", "bops"]
    """``size``: bytes of packed weights, scales, biases and what stays in float32, over those of the teacher. ``bops``:
    multiply-adds times weight bits times activation bits, summed over layers and products, over the same at 32 bits."""

    share: float
    """More than 0, at most 1."""

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read a text such as ``size=0.14`` or ``bops=0.05``.

        Raises:
            ConfigError: not of that form, or a share outside 0 to 1.
        """
        match = _FORM.fullmatch(text.strip())
        if match is None or not 0 < float(match[2]) <= 1:
            raise ConfigError(
                f"budget: expected size=SHARE or bops=SHARE of full precision, such as size=0.14, given {text!r}"
            )
        return cls("size" if match[1].lower() == "size" else "bops", float(match[2]))

    def __str__(self) -> str:
        return f"{self.measure}={self.share:g}"

    def full(self, teacher: Teacher) -> int:
        """Return what the teacher takes: bytes, or multiply-adds times bits squared."""
        if self.measure == "size":
            return float_bytes(teacher)
        return total_multiply_adds(teacher.module) * _FLOAT_BITS**2

    def limit(self, teacher: Teacher) -> int:
        """Return what the student may take, in the same unit."""
        return math.floor(self.share * self.full(teacher))


@dataclass(frozen=True)
class LayerChoice:
    """A layer, and what each pair of bits that it may get would cost."""

    name: str
    costs: dict[Bits, int]
    is_fixed: bool
    """Whether a rule of the user decides."""


def layer_choices(teacher: Teacher, quantization: QuantizationSettings, budget: Budget) -> list[LayerChoice]:
    """Return what is to be decided for each layer, by its name: all its calls compute, and all read the same weight."""
    at_input = reading_network_input(teacher.module)
    calls: dict[str, list[Node]] = {}
    for node in teacher.module.graph.nodes:
        if has_parameter(node):
            calls.setdefault(layer_name(node), []).append(node)
    choices = []
    for name, stored in stored_layers(teacher.module).items():
        given, is_fixed = quantization.bits_of(name), quantization.has_rule_for(name)
        by_budget = budget.measure == "bops" and name not in at_input
        pairs = [(bits, other) for bits in WIDTHS for other in (WIDTHS if by_budget else given[1:])]
        costs = {}
        for weight_bits, activation_bits in [given] if is_fixed else pairs:
            costs[weight_bits, activation_bits] = (
                stored.num_bytes(weight_bits)
                if budget.measure == "size"
                else sum(_operations(call, weight_bits, activation_bits, quantization) for call in calls[name])
            )
        choices.append(LayerChoice(name, costs, is_fixed))
    return choices


def fixed_cost(teacher: Teacher, quantization: QuantizationSettings, budget: Budget) -> int:
    """Return what the student takes beside its layers: what stays in float32, or products of activations."""
    if budget.measure == "size":
        return unquantized_bytes(teacher.module)
    return sum(
        multiply_adds(node) * (quantization.activation_bits if _is_integer(node, quantization) else _FLOAT_BITS) ** 2
        for node in teacher.module.graph.nodes
        if not has_parameter(node)
    )


def bit_operations(teacher: Teacher, quantization: QuantizationSettings) -> int:
    """Return multiply-adds times weight bits times activation bits for one image, of the whole network.

    Products of activations count at the activation bits twice, and at 32 bits where they are in floating point.
    """
    layers = [node for node in teacher.module.graph.nodes if has_parameter(node)]
    return fixed_cost(teacher, quantization, Budget("bops", 1.0)) + sum(
        _operations(layer, *quantization.bits_of(layer_name(layer)), quantization) for layer in layers
    )


def _operations(layer: Node, weight_bits: int, activation_bits: int, quantization: QuantizationSettings) -> int:
    """Return the bit operations of one call of a layer."""
    read = quantization.input_bits if reads_network_input(layer) else activation_bits
    return multiply_adds(layer) * weight_bits * read


def _is_integer(product: Node, quantization: QuantizationSettings) -> bool:
    return quantization.scheme == "hardware" and is_integer_product(product)


def check_budget(teacher: Teacher, quantization: QuantizationSettings) -> None:
    """Refuse a budget that no bits can meet, or that all can.

    Raises:
        ConfigError: no bits can meet it, all bits can, or the scheme has no bits per layer.
    """
    if not quantization.budget:
        return
    if quantization.scheme != "hardware":
        raise ConfigError(f"budget: needs scheme hardware, given {quantization.scheme}; leave one of the two out")
    budget = Budget.parse(quantization.budget)
    choices = layer_choices(teacher, quantization, budget)
    full = budget.full(teacher)
    fixed = fixed_cost(teacher, quantization, budget)
    lowest, highest = (fixed + sum(pick(choice.costs.values()) for choice in choices) for pick in (min, max))
    reachable = f"{budget.measure}={shares_between(lowest, highest, full)}"
    num_fixed = sum(choice.is_fixed for choice in choices)
    given = "first_last_bits and layer_bits" if quantization.first_last_bits else "layer_bits"
    beside = f" beside those of {given}" if num_fixed else ""
    if budget.limit(teacher) < lowest:
        is_given = num_fixed == len(choices)
        bits, reachable = (
            (f"the bits of {given}", f"{reachable} or more") if is_given else (f"2 bits{beside}", reachable)
        )
        raise ConfigError(
            f"budget: {budget} cannot be met: at {bits} the model takes {lowest / full:.4f} of full precision; "
            f"give {reachable}"
        )
    if budget.limit(teacher) > highest and num_fixed < len(choices):
        raise ConfigError(
            f"budget: {budget} leaves nothing to decide: at 8 bits{beside} the model takes {highest / full:.4f} of "
            f"full precision; give {reachable}, or leave budget out and give bits w8a8"
        )


def shares_between(lowest: int, highest: int, full: int) -> str:
    """Return which shares of ``full`` lie between the two, rounded inwards, so that what is named can be given.

    They have four decimals, or as many more as it takes for one to lie there.
    """
    for digits in range(4, 16):
        unit = 10**digits
        low, high = -(-lowest * unit // full), highest * unit // full
        low += math.floor(low / unit * full) < lowest  # a product in floating point may fall short
        if math.floor(low / unit * full) <= highest:
            break
    shown = [f"{number / unit:.{digits + 1}g}" for number in (low, high)]
    return " to ".join(shown) if low < high else shown[0]
