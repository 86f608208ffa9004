"""``size=0.14`` -> what bits cost, layer by layer, and how much they may cost together."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from qimera.errors import ConfigError
from qimera.quantization.scheme import reading_network_input
from qimera.settings import QuantizationSettings
from qimera.summary import float_bytes, layer_bytes
from qimera.teacher import Teacher

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
    """``size``: bytes of packed weights, scales and biases, over those of the teacher. ``bops``: multiply-adds times
    weight bits times activation bits, summed over layers, over the same at 32 bits."""

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
        return sum(layer.macs for layer in teacher.layers) * _FLOAT_BITS**2

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
    """Return what is to be decided for each layer, by its name; what it costs in several calls counts together."""
    at_input = reading_network_input(teacher.module)
    choices = []
    for name in dict.fromkeys(layer.name for layer in teacher.layers):
        calls = [layer for layer in teacher.layers if layer.name == name]
        given, is_fixed = quantization.bits_of(name), quantization.has_rule_for(name)
        by_budget = budget.measure == "bops" and name not in at_input
        pairs = [(bits, other) for bits in WIDTHS for other in (WIDTHS if by_budget else given[1:])]
        costs = {}
        for weight_bits, activation_bits in [given] if is_fixed else pairs:
            read = quantization.input_bits if name in at_input else activation_bits
            costs[weight_bits, activation_bits] = sum(
                layer_bytes(call, weight_bits) if budget.measure == "size" else call.macs * weight_bits * read
                for call in calls
            )
        choices.append(LayerChoice(name, costs, is_fixed))
    return choices


def check_budget(teacher: Teacher, quantization: QuantizationSettings) -> None:
    """Refuse a budget that no bits can meet, or that all can.

    Raises:
        ConfigError: so it is, or the scheme has no bits per layer.
    """
    if not quantization.budget:
        return
    if quantization.scheme != "hardware":
        raise ConfigError(f"budget: needs scheme hardware, given {quantization.scheme}; leave one of the two out")
    budget = Budget.parse(quantization.budget)
    choices = layer_choices(teacher, quantization, budget)
    full = budget.full(teacher)
    lowest, highest = (sum(pick(choice.costs.values()) for choice in choices) for pick in (min, max))
    # Rounded inwards, so that what the message names can be given.
    reachable = (
        f"{budget.measure}={math.ceil(1e4 * lowest / full) / 1e4:g} to {math.floor(1e4 * highest / full) / 1e4:g}"
    )
    num_fixed = sum(choice.is_fixed for choice in choices)
    beside = " beside those of layer_bits" if num_fixed else ""
    if budget.limit(teacher) < lowest:
        bits = "the bits of layer_bits" if num_fixed == len(choices) else f"2 bits{beside}"
        raise ConfigError(
            f"budget: {budget} cannot be met: at {bits} the model takes {lowest / full:.4f} of full precision; "
            f"give {reachable}"
        )
    if budget.limit(teacher) > highest and num_fixed < len(choices):
        raise ConfigError(
            f"budget: {budget} leaves nothing to decide: at 8 bits{beside} the model takes {highest / full:.4f} of "
            f"full precision; give {reachable}, or leave budget out and give bits w8a8"
        )
