"""A teacher and its bank -> how far its answers go wrong when a single layer is quantized, at every width."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qimera.config.base import Settings
from qimera.graph.folding import fold_batch_norms
from qimera.graph.nodes import aten, has_bias, has_parameter, layer_name, node_at, tensor_of, with_outputs
from qimera.graph.stepping import SteppedRun
from qimera.machine.acceleration import exact_convolutions
from qimera.machine.progress import Progress, ProgressCallback, silent
from qimera.machine.seeds import check_seed
from qimera.mixed_precision.budget import WIDTHS
from qimera.quantization.fake_quantize import LearnedStepFakeQuantize
from qimera.quantization.losses import divergence
from qimera.quantization.ranges import integer_range, weight_range
from qimera.quantization.scheme import reading_network_input
from qimera.student.positions import choose_positions, inputs_at, look_at_layer, outputs_at
from qimera.student.rounding import Compensation, adapted, can_compensate, suiting_damping
from qimera.synthesis.bank import SampleBank
from qimera.teacher.teacher import as_teacher

_NUM_SAMPLES = 128
_NUM_LARGE_SAMPLES = 32

_MIN_POSITIONS = 1024
_POSITIONS_PER_INPUT = 5
"""Positions at which layers behind the one that is tried are fitted: fewer than for rounding, as it happens often."""

_NUM_FOLLOWERS = 12
"""Layers behind the one that is tried that may make up for it; more would cost time and win little."""


class Sensitivity(Settings):
    """The divergence of the teacher's answers from its own when one layer is quantized and nothing else."""

    weights: dict[str, tuple[float, ...]]
    """By layer, at 2 to 8 weight bits; infinite where the answers become NaN or infinite."""

    activations: dict[str, tuple[float, ...]]
    """By layer, at 2 to 8 bits of its input; empty where it was not asked for."""

    def loss(self, layer: str, weight_bits: int, activation_bits: int | None = None) -> float:
        """Return what the bits of this layer cost, those of its input too unless they are None."""
        loss = self.weights[layer][WIDTHS.index(weight_bits)]
        return loss if activation_bits is None else loss + self.activations[layer][WIDTHS.index(activation_bits)]


@torch.no_grad()
def measure_sensitivity(
    teacher: nn.Module,
    bank: SampleBank,
    *,
    activations: bool = True,
    seed: int = 0,
    progress: ProgressCallback = silent,
) -> Sensitivity:
    """Quantize the weight or the input of one layer after the other, and see what the teacher then answers.

    That the harm of layers adds up is what ZeroQ (Cai et al. 2020) assumes for its Pareto frontier. Ours differs in how
    it is measured: weights are rounded as those of the student are, the layers that follow may make up for what they
    can, as they do in the student (deviation D29), and the divergence is that on samples that none of this has seen.
    Each of these three makes the sum a better guide to the whole student (deviation D31).

    Args:
        teacher: The model that the bank was made from, or its ``Teacher``.
        bank: Samples of it; half of those used are to fit, half to judge by. A single one serves for both.
        activations: Whether inputs are of interest; without them it takes half the time.
        seed: Draws the samples.
        progress: Called after every layer.

    Raises:
        ConfigError: the seed is out of range.
    """
    seed, teacher = check_seed(seed), as_teacher(teacher, bank.input_spec)
    rng = torch.Generator().manual_seed(seed)
    num_samples = _NUM_LARGE_SAMPLES if teacher.input_spec.has_large_images else _NUM_SAMPLES
    images = next(bank.batches(num_samples, rng)).to(teacher.device).images
    fit_on, judge_on = images.chunk(2) if len(images) > 1 else (images, images)
    at_input = reading_network_input(teacher.module)
    found: tuple[dict[str, list[float]], ...] = ({}, {})
    with exact_convolutions(teacher.device):
        trial = _Trial(fold_batch_norms(teacher.module), fit_on, judge_on, seed)
        for number, node in enumerate(trial.layers, 1):
            trial.advance_before(node)
            with_weight = lru_cache(1)(trial.with_weight)  # 4 bits are tried twice
            _add(found[0], layer_name(node), _losses(trial, with_weight, with_weight))
            if activations and layer_name(node) not in at_input:
                _add(found[1], layer_name(node), _losses(trial, trial.with_input_and_adapted_weight, trial.with_input))
            progress(Progress("sensitivity", number, len(trial.layers)))
    weights, inputs = ({name: tuple(losses) for name, losses in each.items()} for each in found)
    return Sensitivity(weights=weights, activations=inputs)


def _losses(
    trial: "_Trial", adapted_to: Callable[[int], "_Outputs"], alone: Callable[[int], "_Outputs"]
) -> list[float]:
    """Return the loss at each width, of 2 to 8 bits.

    Up to 4 bits the layers that follow make up for what they can. Above, the loss is that of the layer alone, measured
    at 6 bits, times the share that the layers behind leave of it at 4 bits. Each bit more divides it by 4, as it does
    the squared error of any rounding.

    Args:
        trial: Halted before the layer.
        adapted_to: Returns the outputs of the layer at so many bits, once its own weight makes up for what it can.
        alone: Returns those without that.
    """
    losses = [trial.loss(adapted_to(bits), _NUM_FOLLOWERS) for bits in (2, 3, 4)]
    alone_at_4, alone_at_6 = (trial.loss(alone(bits), 0) for bits in (4, 6))
    at_4 = min(losses[2], alone_at_4)
    at_6 = alone_at_6 * at_4 / alone_at_4 if 0 < alone_at_4 < math.inf else alone_at_6
    at_5 = math.sqrt(at_4 * at_6) if max(at_4, at_6) < math.inf else math.inf
    return [*losses[:2], at_4, at_5, at_6, at_6 / 4, at_6 / 16]


def _add(found: dict[str, list[float]], name: str, losses: list[float]) -> None:
    """Add the losses of one call of a layer to those of the calls before."""
    found[name] = [before + loss for before, loss in zip(found.get(name, [0.0] * len(losses)), losses, strict=True)]


_Outputs = tuple[Tensor, Tensor]
"""What a layer returns on the samples to fit and on those to judge by."""


class _Trial:
    """The teacher, halted before one of its layers after the other, that may return something else than it would."""

    def __init__(self, module: GraphModule, fit_on: Tensor, judge_on: Tensor, seed: int) -> None:
        self._module, self._seed = with_outputs(module, []), seed
        self.layers = [node for node in self._module.graph.nodes if has_parameter(node)]
        self._leaving = with_outputs(module, [node.name for node in self.layers])(fit_on)[1]
        self._target = self._module(judge_on)[0]
        self._runs = SteppedRun(self._module, fit_on), SteppedRun(self._module, judge_on)
        self._position, self._entering = 0, (fit_on, judge_on)
        self._own: Compensation | None = None
        self._targets: dict[int, tuple[Tensor, Tensor]] = {}
        self._dampings: dict[int, float] = {}

    def advance_before(self, layer: Node) -> None:
        """Go on to the next layer to be tried."""
        self._position = self.layers.index(layer)
        for run in self._runs:
            run.advance_before(layer.name)
        fit_on, judge_on = (run.value(node_at(layer, 0).name) for run in self._runs)
        self._entering = fit_on, judge_on
        weight, bias = self._parameters(layer)
        self._own = None
        if can_compensate(layer, weight):
            rng, leaving = torch.Generator().manual_seed(self._seed), self._leaving[self._position]
            seen = look_at_layer(layer, weight, bias, fit_on, leaving, rng)
            self._own = Compensation(weight, bias, *seen, self._dampings.get(self._position))

    def loss(self, outputs: _Outputs, num_followers: int) -> float:
        """Return the divergence if the layer returned ``outputs``, and so many that follow made up for it.

        It is infinite where anything on the way becomes NaN or too large to compute with.
        """
        fitting, judging = (run.branch() for run in self._runs)
        fitting.put(outputs[0])
        judging.put(outputs[1])
        first = self._position + 1
        for position in range(first, min(first + num_followers, len(self.layers))):
            layer = self.layers[position]
            fitting.advance_before(layer.name)
            entering = fitting.value(node_at(layer, 0).name)
            if not math.isfinite(entering.norm()):  # the layer cannot be fitted to it
                return math.inf
            parameters = self._adapted(position, entering)
            if parameters is not None:
                judging.advance_before(layer.name)
                fitting.put(_call(layer, entering, *parameters))
                judging.put(_call(layer, judging.value(node_at(layer, 0).name), *parameters))
        ended = judging.finish()
        assert isinstance(ended, tuple)
        return divergence(ended[0], self._target)

    def with_weight(self, bits: int) -> _Outputs:
        """Return what the layer returns with its weight at ``bits``, rounded as that of a student."""
        layer = self.layers[self._position]
        weight, bias = self._parameters(layer)
        low, high = weight_range(bits)
        quantizer = LearnedStepFakeQuantize(
            dtype=torch.int8,
            quant_min=low,
            quant_max=high,
            qscheme=torch.per_channel_symmetric,
            ch_axis=1 if layer.target is aten.conv_transpose2d.input else 0,
            shape=tuple(weight.shape),
        )
        quantizer.to(weight.device).fit_(weight, "mse")
        new = (quantizer(weight), bias) if self._own is None else self._own.rounded(quantizer)
        return self._called(self._entering, new)

    def with_input(self, bits: int) -> _Outputs:
        """Return what the layer returns for inputs at ``bits``."""
        return self._called(self._quantized_inputs(bits), self._parameters(self.layers[self._position]))

    def with_input_and_adapted_weight(self, bits: int) -> _Outputs:
        """Return what the layer returns for inputs at ``bits`` once its weight is adapted to them, where it can be."""
        inputs = self._quantized_inputs(bits)
        adapted_ones = self._adapted(self._position, inputs[0])
        return self._called(inputs, adapted_ones or self._parameters(self.layers[self._position]))

    def _quantized_inputs(self, bits: int) -> tuple[Tensor, Tensor]:
        low, high = integer_range(bits, signed=False)
        quantizer = LearnedStepFakeQuantize(
            dtype=torch.uint8, quant_min=low, quant_max=high, qscheme=torch.per_tensor_affine
        )
        quantizer.to(self._entering[0].device).fit_(self._entering[0], "mse")
        fit_on, judge_on = (quantizer(each) for each in self._entering)
        return fit_on, judge_on

    def _called(self, inputs: tuple[Tensor, Tensor], parameters: tuple[Tensor, Tensor | None]) -> _Outputs:
        layer = self.layers[self._position]
        return _call(layer, inputs[0], *parameters), _call(layer, inputs[1], *parameters)

    def _parameters(self, layer: Node) -> tuple[Tensor, Tensor | None]:
        bias = tensor_of(self._module, node_at(layer, 2)) if has_bias(layer) else None
        return tensor_of(self._module, node_at(layer, 1)), bias

    def _look(self, position: int, entering: Tensor) -> tuple[Tensor, Tensor, float] | None:
        """Return what a layer sees now, what it should return, and the damping that suits both; None for some kinds.

        The damping is that of the first look at the layer.
        """
        layer = self.layers[position]
        weight, bias = self._parameters(layer)
        if not can_compensate(layer, weight):
            return None
        if position not in self._targets:
            wanted = max(_MIN_POSITIONS, _POSITIONS_PER_INPUT * weight[0].numel())
            rng, leaving = torch.Generator().manual_seed(self._seed), self._leaving[position]
            chosen = choose_positions(layer, leaving, wanted, rng)
            self._targets[position] = chosen, outputs_at(layer, weight, bias, leaving, chosen)
        chosen, target = self._targets[position]
        inputs = inputs_at(layer, weight, entering, chosen)
        if position not in self._dampings:
            rows = weight.reshape(len(inputs), -1, inputs.shape[2])
            self._dampings[position] = suiting_damping(inputs, target - inputs @ rows.mT)
        return inputs, target, self._dampings[position]

    def _adapted(self, position: int, entering: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Return the weight and the bias that bring the layer's output for these inputs closest to what it was."""
        look = self._look(position, entering)
        if look is None:
            return None
        weight, bias = self._parameters(self.layers[position])
        return adapted(weight, bias, *look)


def _call(layer: Node, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.ndim == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    assert callable(layer.target)
    result = layer.target(inputs, weight, bias, *layer.args[3:], **layer.kwargs)
    assert isinstance(result, Tensor)
    return result
