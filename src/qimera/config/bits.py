"""Text such as ``w4a8`` or ``conv1=8,*fc*=w8a4`` -> bits."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from qimera.config.settings import LayerBits
from qimera.errors import ConfigError

_BITS = re.compile(r"w(\d+)a(\d+)", re.IGNORECASE)


def parse_bits(text: str) -> tuple[int, int]:
    """``"w4a8"`` -> (4, 8): weight bits and activation bits.

    Raises:
        ConfigError: not of that form, or bits outside 2 to 8.
    """
    match = _BITS.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"bits: expected the form w4a4 (weight bits, activation bits), given {text!r}")
    weight_bits, activation_bits = int(match[1]), int(match[2])
    for name, bits in (("weight", weight_bits), ("activation", activation_bits)):
        if not 2 <= bits <= 8:
            raise ConfigError(f"bits: {name} bits must be 2 to 8, given {bits} in {text!r}")
    return weight_bits, activation_bits


def parse_layer_bits(text: str) -> tuple[LayerBits, ...]:
    """``"conv1=8,*fc*=w8a4"`` -> rules; one number stands for weights and activations alike.

    Raises:
        ConfigError: a rule without ``=``, or bits that ``parse_bits`` refuses.
    """
    rules = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        pattern, separator, bits = part.rpartition("=")
        if not separator or not pattern:
            raise ConfigError(f"layer_bits: expected PATTERN=BITS such as conv1=8 or *fc*=w8a4, given {part!r}")
        try:
            weight_bits, activation_bits = parse_bits(f"w{bits}a{bits}" if bits.isdigit() else bits)
        except ConfigError as error:
            raise ConfigError(f"layer_bits: {pattern}: {str(error).removeprefix('bits: ')}") from None
        rules.append(LayerBits(pattern=pattern, weight_bits=weight_bits, activation_bits=activation_bits))
    return tuple(rules)


def check_layer_bits(rules: Iterable[LayerBits], layers: Sequence[str]) -> None:
    """Refuse rules that no layer's name matches.

    Raises:
        ConfigError: it names the first such rule, and the layers that are called most like it.
    """
    for rule in rules:
        if not any(fnmatchcase(name, rule.pattern) for name in layers):
            nearest = get_close_matches(rule.pattern, layers, n=3, cutoff=0.0)
            raise ConfigError(
                f"layer_bits: {rule.pattern!r} fits none of the {len(layers)} layers (nearest: {', '.join(nearest)}); "
                "`qimera inspect --all` lists them"
            )


def spell_layer_bits(rules: Iterable[LayerBits]) -> str:
    """Return the text that ``parse_layer_bits`` reads these rules from."""
    return ",".join(f"{rule.pattern}=w{rule.weight_bits}a{rule.activation_bits}" for rule in rules)
