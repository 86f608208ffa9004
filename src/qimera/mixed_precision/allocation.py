"""A budget, and how sensitive each layer is -> the bits of each layer."""

import glob
import math
import textwrap

from torch import nn

from qimera.config.base import Settings
from qimera.config.bits import parse_bits, parse_layer_bits, spell_layer_bits
from qimera.config.settings import LayerBits, QuantizationSettings
from qimera.errors import ConfigError, DivergenceError, enumerate_names
from qimera.machine.progress import ProgressCallback, silent
from qimera.mixed_precision.budget import (
    Bits,
    Budget,
    LayerChoice,
    check_budget,
    fixed_cost,
    layer_choices,
    shares_between,
)
from qimera.mixed_precision.knapsack import Option, solve_knapsack
from qimera.mixed_precision.sensitivity import Sensitivity, measure_sensitivity
from qimera.quantization.ends import with_rules_for_ends
from qimera.synthesis.bank import SampleBank, check_bank
from qimera.teacher.teacher import Teacher, as_teacher

_LINE = 105
"""Characters of a line for a person."""


class LayerAllocation(Settings):
    """The bits that one layer got."""

    name: str
    weight_bits: int
    activation_bits: int
    loss: float
    """What they cost: the divergence from the teacher when nothing else is quantized."""


class Allocation(Settings):
    """The bits of all layers that a budget leaves open, for the least sum of their losses."""

    budget: str
    limit: int
    """What the budget allows: bytes (``size``), or multiply-adds times bits times bits (``bops``)."""

    cost: int
    """What the student takes, at most ``limit``."""

    full: int
    """What the teacher takes."""

    rules: tuple[LayerBits, ...]
    """Bits that were given by name; they count in ``cost``."""

    layers: tuple[LayerAllocation, ...]
    sensitivity: Sensitivity

    @property
    def loss(self) -> float:
        """The losses of the layers together."""
        return sum(layer.loss for layer in self.layers)

    @property
    def all_rules(self) -> tuple[LayerBits, ...]:
        """The rules that were given, and one for each layer that got its bits here."""
        found = (
            LayerBits(
                pattern=glob.escape(layer.name), weight_bits=layer.weight_bits, activation_bits=layer.activation_bits
            )
            for layer in self.layers
        )
        return (*self.rules, *found)

    @property
    def layer_bits(self) -> str:
        """The same as a text that ``quantize`` and ``--layer-bits`` take."""
        return spell_layer_bits(self.all_rules)

    def lines(self) -> tuple[str, ...]:
        """Return what was decided, for a person: a line for each width, its layers by falling loss."""
        given = f", {spell_layer_bits(self.rules)} as given" if self.rules else ""
        lines = [f"{self.budget}: {self.cost / self.full:.4f} of full precision{given}"]
        if self.layers:
            lines.append(f"divergence of each layer alone, {self.loss:.4f} together:")
        for bits in sorted({(layer.weight_bits, layer.activation_bits) for layer in self.layers}):
            group = [layer for layer in self.layers if (layer.weight_bits, layer.activation_bits) == bits]
            group.sort(key=lambda layer: -layer.loss)
            listed = ", ".join(f"{layer.name} {layer.loss:.4f}" for layer in group)
            lines += textwrap.wrap(f"w{bits[0]}a{bits[1]}  {listed}", _LINE, subsequent_indent=" " * 6)
        return tuple(lines)


def allocate_bits(
    model: nn.Module,
    bank: SampleBank,
    budget: str,
    bits: str = "w4a4",
    *,
    layer_bits: str = "",
    first_last_bits: int = 0,
    sensitivity: Sensitivity | None = None,
    seed: int = 0,
    progress: ProgressCallback = silent,
) -> Allocation:
    """Return the bits of each layer of ``model`` that are best within a budget, for ``quantize(layer_bits=...)``.

    Args:
        model: The classifier that the bank was made from, or its ``Teacher``. It is not changed.
        bank: From ``synthesize``, or loaded.
        budget: ``size=0.14``: packed weights, scales, biases and what stays in float32 take at most this share of the
            teacher's float32 bytes. ``bops=0.05``: multiply-adds times weight bits times activation bits at most this
            share of those at 32 bits.
        bits: What the budget leaves open: with ``size``, the activation bits of every layer.
        layer_bits: Bits by layer name that are kept, and count in the budget.
        first_last_bits: Bits of the first and the last layer that are kept, and count in the budget; 0 if these two are
            to be chosen as well.
        sensitivity: Of ``measure_sensitivity``, or of an earlier call with the same measure, ``size`` or ``bops``; it
            does not depend on the share.
        seed: Same seed, bank and machine: same allocation.
        progress: Called after every layer.

    Raises:
        ConfigError: a budget that no bits can meet, or all can, wrong bits, a bank of another teacher, or a sensitivity
            that lacks a layer.
        DivergenceError: the answers become NaN or infinite at all bits of a layer.
    """
    weight_bits, activation_bits = parse_bits(bits)
    quantization = QuantizationSettings(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        layer_bits=parse_layer_bits(layer_bits),
        first_last_bits=first_last_bits,
        budget=budget,
    )
    teacher = as_teacher(model, bank.input_spec)
    check_bank(bank, teacher)
    return allocate(teacher, bank, quantization, sensitivity=sensitivity, seed=seed, progress=progress)


def allocate(
    teacher: Teacher,
    bank: SampleBank,
    quantization: QuantizationSettings,
    *,
    sensitivity: Sensitivity | None = None,
    seed: int = 0,
    progress: ProgressCallback = silent,
) -> Allocation:
    """``allocate_bits`` with every setting spelled out."""
    quantization = with_rules_for_ends(quantization, teacher)
    check_budget(teacher, quantization)
    budget = Budget.parse(quantization.budget)
    choices = layer_choices(teacher, quantization, budget)
    if all(choice.is_fixed for choice in choices):
        sensitivity = Sensitivity(weights={}, activations={})
    elif sensitivity is None:
        activations = budget.measure == "bops"
        sensitivity = measure_sensitivity(teacher, bank, activations=activations, seed=seed, progress=progress)
    options = [_options(choice, sensitivity, budget) for choice in choices]
    limit, fixed = budget.limit(teacher), fixed_cost(teacher, quantization, budget)
    _check_limit(options, choices, limit - fixed, fixed, budget, budget.full(teacher))
    chosen = solve_knapsack([list(each.values()) for each in options], limit - fixed)
    layers, cost = [], fixed
    for choice, layer_options, index in zip(choices, options, chosen, strict=True):
        (weight_bits, activation_bits), option = list(layer_options.items())[index]
        cost += option.cost
        if not choice.is_fixed:
            layers.append(
                LayerAllocation(
                    name=choice.name, weight_bits=weight_bits, activation_bits=activation_bits, loss=option.loss
                )
            )
    return Allocation(
        budget=str(budget),
        limit=limit,
        cost=cost,
        full=budget.full(teacher),
        rules=quantization.layer_bits,
        layers=tuple(layers),
        sensitivity=sensitivity,
    )


def _options(choice: LayerChoice, sensitivity: Sensitivity, budget: Budget) -> dict[Bits, Option]:
    """Return cost and loss of each pair of bits at which the answers stay finite.

    What is not open to choice has no loss here.
    """
    if choice.is_fixed:
        return {bits: Option(cost, 0.0) for bits, cost in choice.costs.items()}
    by_budget = len({activation_bits for _, activation_bits in choice.costs}) > 1
    if choice.name not in sensitivity.weights or (by_budget and choice.name not in sensitivity.activations):
        raise ConfigError(
            f"sensitivity: does not hold what budget {budget} needs of {choice.name}; leave it out, or give what "
            "measure_sensitivity returns for this model"
        )
    losses = {bits: sensitivity.loss(choice.name, bits[0], bits[1] if by_budget else None) for bits in choice.costs}
    options = {bits: Option(choice.costs[bits], loss) for bits, loss in losses.items() if math.isfinite(loss)}
    if not options:
        raise DivergenceError(
            f"budget: the model's answers become NaN or infinite when {choice.name} is quantized, at all of 2 to 8 "
            "bits; check the layers behind it, such as logarithms, roots and divisions"
        )
    return options


def _check_limit(
    options: list[dict[Bits, Option]], choices: list[LayerChoice], limit: int, fixed: int, budget: Budget, full: int
) -> None:
    """Refuse a limit that is met only by bits at which the answers become NaN or infinite."""
    lowest, highest = (sum(pick(each.cost for each in some.values()) for some in options) for pick in (min, max))
    if lowest <= limit:
        return
    broken = [choice.name for choice, some in zip(choices, options, strict=True) if len(some) < len(choice.costs)]
    raise ConfigError(
        f"budget: {budget} cannot be met: the model's answers become NaN or infinite at some bits of "
        f"{enumerate_names(broken)}, and other bits take {(fixed + lowest) / full:.4f} of full precision; give "
        f"{budget.measure}={shares_between(fixed + lowest, fixed + highest, full)}"
    )
