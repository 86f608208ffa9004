"""A teacher and its bank -> how far its answers go wrong when a single layer is quantized, at every width."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qimera.config.base import Settings
from qimera.graph.folding import fold_batch_norms
from qimera.graph.nodes import aten, has_bias, has_parameter, layer_name, node_at, tensor_of, with_outputs
from qimera.graph.stepping import SteppedRun
from qimera.machine.progress import Progress, ProgressCallback, silent
from qimera.machine.seeds import check_seed
from qimera.mixed_precision.budget import WIDTHS
from qimera.quantization.fake_quantize import LearnedStepFakeQuantize
from qimera.quantization.losses import kl_loss
from qimera.quantization.ranges import integer_range, weight_range
from qimera.quantization.rounding import Compensation, can_compensate, look_at_layer
from qimera.quantization.scheme import reading_network_input
from qimera.synthesis.bank import SampleBank
from qimera.teacher.teacher import Teacher

_NUM_SAMPLES = 128
_NUM_LARGE_SAMPLES = 32

_MAX_COMPENSATED_BITS = 4
_NUM_FOLLOWERS = 12
"""Layers behind the one that is tried that may make up for it; more would cost time and win little."""


class Sensitivity(Settings):
    """The divergence of the teacher's answers from its own when one layer is quantized and nothing else."""

    weights: dict[str, tuple[float, ...]]
    """By layer, at 2 to 8 weight bits."""

    activations: dict[str, tuple[float, ...]]
    """By layer, at 2 to 8 bits of its input; empty where it was not asked for."""

    def loss(self, layer: str, weight_bits: int, activation_bits: int | None = None) -> float:
        """Return what the bits of this layer cost, those of its input too unless they are None."""
        loss = self.weights[layer][WIDTHS.index(weight_bits)]
        return loss if activation_bits is None else loss + self.activations[layer][WIDTHS.index(activation_bits)]


@torch.no_grad()
def measure_sensitivity(
    teacher: Teacher,
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
    Each of the three tells more of what becomes of the whole student (deviation D31).

    Args:
        teacher: The model.
        bank: Samples of it; half of those used are to fit, half to judge by.
        activations: Whether inputs are of interest; without them it takes half the time.
        seed: Draws the samples.
        progress: Called after every layer.

    Raises:
        ConfigError: the seed is out of range.
    """
    seed = check_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    num_samples = _NUM_LARGE_SAMPLES if teacher.input_spec.has_large_images else _NUM_SAMPLES
    fit_on, judge_on = next(bank.batches(num_samples, rng)).images.chunk(2)
    trial = _Trial(fold_batch_norms(teacher.module), fit_on, judge_on, seed)
    at_input = reading_network_input(teacher.module)
    found: tuple[dict[str, list[float]], ...] = ({}, {})
    for number, node in enumerate(trial.layers, 1):
        trial.advance_before(node)
        _add(found[0], layer_name(node), _losses(trial, trial.with_weight))
        if activations and layer_name(node) not in at_input:
            _add(found[1], layer_name(node), _losses(trial, trial.with_input))
        progress(Progress("sensitivity", number, len(trial.layers)))
    weights, inputs = ({name: tuple(losses) for name, losses in each.items()} for each in found)
    return Sensitivity(weights=weights, activations=inputs)


def _losses(trial: "_Trial", quantize: Callable[[int, bool], "_Outputs"]) -> list[float]:
    """Return the loss at each width; where it is small anyway, the share that is made up for is that of 4 bits."""
    losses, share = [], 1.0
    for bits in WIDTHS:
        alone = trial.loss(quantize(bits, False), 0)
        if bits <= _MAX_COMPENSATED_BITS:
            compensated = trial.loss(quantize(bits, True), _NUM_FOLLOWERS)
            share = min(1.0, compensated / alone) if alone > 0 else 1.0
            losses.append(min(alone, compensated))
        else:
            losses.append(share * alone)
    return losses


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

    def advance_before(self, layer: Node) -> None:
        """Go on to the next layer to be tried."""
        self._position = self.layers.index(layer)
        for run in self._runs:
            run.advance_before(layer.name)
        fit_on, judge_on = (run.value(node_at(layer, 0).name) for run in self._runs)
        self._entering = fit_on, judge_on
        self._own = self._compensation(self._position, fit_on)

    def loss(self, outputs: _Outputs, num_followers: int) -> float:
        """Return the divergence if the layer returned ``outputs``, and so many that follow made up for it."""
        fitting, judging = (run.branch() for run in self._runs)
        fitting.put(outputs[0])
        judging.put(outputs[1])
        first = self._position + 1
        for position in range(first, min(first + num_followers, len(self.layers))):
            layer = self.layers[position]
            fitting.advance_before(layer.name)
            entering = fitting.value(node_at(layer, 0).name)
            compensation = self._compensation(position, entering)
            if compensation is not None:
                judging.advance_before(layer.name)
                adapted = compensation.adapted()
                fitting.put(_call(layer, entering, *adapted))
                judging.put(_call(layer, judging.value(node_at(layer, 0).name), *adapted))
        ended = judging.finish()
        assert isinstance(ended, tuple)
        # float64: at 8 bits the divergence is smaller than the rounding errors of its terms in float32.
        return max(0.0, float(kl_loss(ended[0].double(), self._target.double(), 1.0)))

    def with_weight(self, bits: int, _compensated: bool) -> _Outputs:
        """Return what the layer returns with its weight at ``bits``, rounded as that of a student in either case."""
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
        quantizer.fit_(weight, "mse")
        new = (quantizer(weight), bias) if self._own is None else self._own.rounded(quantizer)
        return _call(layer, self._entering[0], *new), _call(layer, self._entering[1], *new)

    def with_input(self, bits: int, compensated: bool) -> _Outputs:
        """Return what the layer returns for inputs at ``bits``, to which its weight is adapted or not."""
        layer = self.layers[self._position]
        low, high = integer_range(bits, signed=False)
        quantizer = LearnedStepFakeQuantize(
            dtype=torch.uint8, quant_min=low, quant_max=high, qscheme=torch.per_tensor_affine
        )
        quantizer.fit_(self._entering[0], "mse")
        fit_on, judge_on = (quantizer(each) for each in self._entering)
        compensation = self._compensation(self._position, fit_on) if compensated else None
        new = self._parameters(layer) if compensation is None else compensation.adapted()
        return _call(layer, fit_on, *new), _call(layer, judge_on, *new)

    def _parameters(self, layer: Node) -> tuple[Tensor, Tensor | None]:
        bias = tensor_of(self._module, node_at(layer, 2)) if has_bias(layer) else None
        return tensor_of(self._module, node_at(layer, 1)), bias

    def _compensation(self, position: int, entering: Tensor) -> Compensation | None:
        """Return what brings the layer's output for these inputs closest to what it was."""
        layer = self.layers[position]
        weight, bias = self._parameters(layer)
        if not can_compensate(layer, weight):
            return None
        rng = torch.Generator().manual_seed(self._seed)
        leaving = self._leaving[position]
        return Compensation(weight, bias, *look_at_layer(layer, weight, bias, entering, leaving, rng))


def _call(layer: Node, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.ndim == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    assert callable(layer.target)
    result = layer.target(inputs, weight, bias, *layer.args[3:], **layer.kwargs)
    assert isinstance(result, Tensor)
    return result
