"""``first_last_bits`` and a teacher -> rules by layer name, as for any other layer."""

import glob
from fnmatch import fnmatchcase

from torch.fx import Node

from qimera.config.bits import check_layer_bits
from qimera.config.settings import LayerBits, QuantizationSettings
from qimera.graph.nodes import has_parameter, is_size, layer_name, node_at
from qimera.quantization.scheme import reading_network_input
from qimera.teacher.teacher import Teacher


def first_and_last_layers(teacher: Teacher) -> list[str]:
    """Return the names of the layers that read the network's input, and of the one that returns the logits."""
    ends = {*reading_network_input(teacher.module), teacher.classifier.name}
    return list(dict.fromkeys(layer.name for layer in teacher.layers if layer.name in ends))


def with_rules_for_ends(settings: QuantizationSettings, teacher: Teacher) -> QuantizationSettings:
    """Return settings whose ``layer_bits`` begin with the rules that ``first_last_bits`` asks for.

    Rules that were given by name come after them, and win. Settings that have the rules already are returned as they
    are.

    Raises:
        ConfigError: a rule fits no layer.
    """
    check_layer_bits(settings.layer_bits, [layer.name for layer in teacher.layers])
    rules = _rules(settings, teacher)
    if settings.layer_bits[: len(rules)] == rules:
        return settings
    return settings.replace(layer_bits=(*rules, *settings.layer_bits))


def rules_beside_ends(settings: QuantizationSettings, teacher: Teacher) -> tuple[LayerBits, ...]:
    """Return ``layer_bits`` without the rules that ``first_last_bits`` brought."""
    rules = _rules(settings, teacher)
    return settings.layer_bits[len(rules) if settings.layer_bits[: len(rules)] == rules else 0 :]


def told_of_ends(settings: QuantizationSettings, teacher: Teacher) -> tuple[int, tuple[LayerBits, ...]]:
    """Return ``first_last_bits``, and ``layer_bits`` beside them, as a person is told.

    Where rules by name take the first and the last layer's bits, this is 0 and every rule that decides on a layer.
    """
    bits, rules, names = settings.first_last_bits, settings.layer_bits, [layer.name for layer in teacher.layers]
    if not bits or any(settings.bits_of(name) == (bits, bits) for name in first_and_last_layers(teacher)):
        return bits, rules_beside_ends(settings, teacher)
    last = {max((i for i, rule in enumerate(rules) if fnmatchcase(name, rule.pattern)), default=-1) for name in names}
    return 0, tuple(rule for i, rule in enumerate(rules) if i in last)


def _rules(settings: QuantizationSettings, teacher: Teacher) -> tuple[LayerBits, ...]:
    """Return rules for both ends and for what reads the first layer, as BRECQ has it (Li et al. 2021)."""
    bits = settings.first_last_bits
    if not bits:
        return ()
    first = reading_network_input(teacher.module)
    behind = {layer_name(node) for node in teacher.module.graph.nodes if has_parameter(node) and _source(node) in first}
    widths = dict.fromkeys(behind, settings.weight_bits)
    widths |= dict.fromkeys(first_and_last_layers(teacher), bits)
    names = [layer.name for layer in teacher.layers if layer.name in widths]
    return tuple(
        LayerBits(pattern=glob.escape(name), weight_bits=widths[name], activation_bits=bits)
        for name in dict.fromkeys(names)
    )


def _source(layer: Node) -> str | None:
    """Return the name of the layer whose output ``layer`` reads, through norms, activation functions and pooling.

    None where tensors are joined in between.
    """
    tensor = node_at(layer, 0)
    while not has_parameter(tensor):
        read = [each for each in tensor.all_input_nodes if each.op != "get_attr" and not is_size(each)]
        if len(read) != 1:
            return None
        tensor = read[0]
    return layer_name(tensor)
