"""A budget, and how sensitive each layer is -> the bits of each layer."""

import glob
import textwrap

from torch import nn

from qimera.config.base import Settings
from qimera.config.bits import parse_bits, parse_layer_bits, spell_layer_bits
from qimera.config.settings import LayerBits, QuantizationSettings
from qimera.errors import ConfigError
from qimera.machine.progress import ProgressCallback, silent
from qimera.mixed_precision.budget import Budget, LayerChoice, check_budget, fixed_cost, layer_choices
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
    chosen = solve_knapsack(options, limit - fixed)
    layers, cost = [], fixed
    for choice, layer_options, index in zip(choices, options, chosen, strict=True):
        weight_bits, activation_bits = list(choice.costs)[index]
        cost += layer_options[index].cost
        if not choice.is_fixed:
            layers.append(
                LayerAllocation(
                    name=choice.name,
                    weight_bits=weight_bits,
                    activation_bits=activation_bits,
                    loss=layer_options[index].loss,
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


def _options(choice: LayerChoice, sensitivity: Sensitivity, budget: Budget) -> list[Option]:
    """Return cost and loss of each pair of bits; what is not open to choice has no loss here."""
    if choice.is_fixed:
        return [Option(cost, 0.0) for cost in choice.costs.values()]
    by_budget = len({activation_bits for _, activation_bits in choice.costs}) > 1
    if choice.name not in sensitivity.weights or (by_budget and choice.name not in sensitivity.activations):
        raise ConfigError(
            f"sensitivity: does not hold what budget {budget} needs of {choice.name}; leave it out, or give what "
            "measure_sensitivity returns for this model"
        )
    return [
        Option(cost, sensitivity.loss(choice.name, weight_bits, activation_bits if by_budget else None))
        for (weight_bits, activation_bits), cost in choice.costs.items()
    ]
