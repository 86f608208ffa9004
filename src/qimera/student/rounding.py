"""First ranges and first integers of a student, layer after layer, each behind its quantized predecessors."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import GraphModule, Node

from qimera.errors import DivergenceError
from qimera.graph.nodes import WEIGHTED, aten, name_of_reader, node_at, node_called, tensor_of
from qimera.graph.stepping import SteppedRun
from qimera.machine.distributed import copy_from_main_, from_main
from qimera.quantization.fake_quantize import LearnedStepFakeQuantize, round_to_grid
from qimera.quantization.scheme import quantizer_of
from qimera.student.equalization import (
    Edge,
    candidate_scales,
    edge_into,
    parameter_of,
    scale_back_columns_,
    scale_channels_,
    scale_rows_,
    scaled,
)
from qimera.student.positions import argument_of, look_at_layer

_DAMPINGS = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Shares of the mean input power to try; the best one is added to the power of every input. GPTQ always adds 0.01.

Damped weights suit the samples less and other images more, which layers with many inputs and few positions need: last
layers are given 3, first ones 0.03.
"""

_MAX_INPUTS = 8192
"""Inputs of one output above which a layer keeps its nearest integers: the matrix of products would not fit."""

_NEXT_TO_NOTHING = 1e-34
"""Power of inputs with which float32 cannot compute, as of dead channels: their weights keep their nearest integers."""


@torch.no_grad()
def round_layers_(
    student: GraphModule,
    reference: GraphModule,
    images: Float[Tensor, "batch channel height width"],
    rng: torch.Generator,
    *,
    equalize: bool,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Tensor]:
    """Replace each layer's weight by the multiples of its steps that bring its output closest to the reference's.

    Rounding to nearest adds up errors that inputs share; instead each weight that is rounded hands its error on to
    those that are still to come, by the second moments of their inputs (GPTQ, Frantar et al. 2023). Before rounding,
    the weights make up for what quantized predecessors lost. After it, the bias makes up for the mean of the remaining
    error (as in bias correction, Nagel et al. 2019). A weight that several calls read is rounded for the first of them;
    at the others the bias alone makes up for what is left.

    Args:
        student: Prepared graph; its quantizers may be searching their ranges in the same pass.
        reference: The graph in full precision with folded batch norms, whose layers bear the same names.
        images: What the layers are looked at on.
        rng: Draws the positions.
        equalize: Scale channels between layers, in both graphs, where that brings an output closer still.
        report: Told how many layers are done and how many there are, before the first one and after each.

    Returns:
        The scales of the channels (channel) that each layer reads, by the name of its node, where there are any.

    Raises:
        DivergenceError: what a layer reads becomes NaN, or too large to compute with.
    """
    scales: dict[str, Tensor] = {}
    mine, theirs = SteppedRun(student, images), SteppedRun(reference, images)
    quantizers = {node: found for node in student.graph.nodes if (found := weight_quantizer(student, node)) is not None}
    rounded: set[LearnedStepFakeQuantize] = set()
    report(0, len(quantizers))
    for done, (node, quantizer) in enumerate(quantizers.items(), 1):
        if theirs.advance_to(node.name):
            edge = edge_into(student, node) if equalize else None
            if edge is not None and mine.can_set(edge.end.name):
                scale = _equalize_(student, reference, edge, quantizer, (mine, theirs), rng)
                if scale is not None:
                    scales[node.name] = scale
            mine.advance_before(node.name)
            seen = _seen(student, node, mine, theirs, rng)
            if quantizer in rounded:
                _shift_bias_(student, node, seen)
            else:
                _round_layer_(student, node, quantizer, seen)
            rounded.add(quantizer)
            mine.repeat(node.all_input_nodes[1:])
            mine.advance_to(node.name)
        report(done, len(quantizers))
    mine.advance_to(next(iter(reversed(student.graph.nodes))).name)
    return scales


@torch.no_grad()
def round_again_(
    student: GraphModule,
    reference: GraphModule,
    node: Node,
    runs: tuple[SteppedRun, SteppedRun],
    rng: torch.Generator,
) -> Float[Tensor, "..."]:
    """Round one layer anew, from its weight in full precision, to suit what it reads now; its steps stay.

    Returns what was rounded: the weight once it makes up for what quantized predecessors lost.

    Args:
        student: The graph whose layer this is; all of its layers were rounded before.
        reference: The graph in full precision.
        node: The layer, of a kind that ``weight_quantizer`` finds a quantizer for.
        runs: Passes through both graphs that have not reached the layer; they halt behind it.
        rng: Draws the positions.
    """
    mine, theirs = runs
    quantizer, layer = weight_quantizer(student, node), node_called(reference, node.name)
    assert quantizer is not None
    theirs.advance_to(node.name)
    mine.advance_before(node.name)
    tensor_of(student, parameter_of(node, 1)).copy_(tensor_of(reference, node_at(layer, 1)))
    if _bias(student, node) is not None:
        tensor_of(student, parameter_of(node, 2)).copy_(tensor_of(reference, node_at(layer, 2)))
    seen = _seen(student, node, mine, theirs, rng)
    _round_layer_(student, node, quantizer, seen)
    mine.repeat(node.all_input_nodes[1:])
    mine.advance_to(node.name)
    return seen.compensated


def _equalize_(
    student: GraphModule,
    reference: GraphModule,
    edge: Edge,
    quantizer: LearnedStepFakeQuantize,
    runs: tuple[SteppedRun, SteppedRun],
    rng: torch.Generator,
) -> Tensor | None:
    """Scale the channels of ``edge`` as leaves least error behind its reader, which is still to be rounded.

    Returns the scales, or None where they are best left as they are.
    """
    mine, theirs = runs
    mine.advance_to(edge.end.name)
    unscaled, state = mine.value(edge.end.name), rng.get_state()
    weight = tensor_of(student, parameter_of(edge.reader, 1))
    grid = quantizer_of(student, node_at(edge.reader, 0))
    assert isinstance(grid, LearnedStepFakeQuantize)
    original, scales = weight.clone(), list(candidate_scales(edge, unscaled, grid.quant_max - grid.quant_min))

    def put_(scale: Tensor, run: SteppedRun) -> None:
        weight.copy_(original)
        scale_back_columns_(student, edge, scale)
        run.set_(edge.end.name, scaled(edge, unscaled, scale))
        rng.set_state(state)

    errors = []
    for scale in scales:
        trial = mine.branch()
        put_(scale, trial)
        trial.advance_before(edge.reader.name)
        seen = _seen(student, edge.reader, trial, theirs, rng)
        errors.append(seen.error(seen.rounded(quantizer)[0]))
    best = from_main(lambda: int(torch.stack(errors).argmin()))  # where scales differ, so do graphs
    copy_from_main_([scales[best]])
    put_(scales[best], mine)
    if not best:
        return None
    scale_rows_(student, edge, scales[best])
    scale_channels_(reference, edge, scales[best])
    return scales[best]


def weight_quantizer(module: GraphModule, node: Node) -> LearnedStepFakeQuantize | None:
    """Return the quantizer of the weight of ``node``, if it is a layer of the kinds that are rounded here."""
    if node.target not in WEIGHTED or node_at(node, 1).op != "call_module":
        return None
    quantizer = module.get_submodule(str(node_at(node, 1).target))
    weight = tensor_of(module, parameter_of(node, 1))
    return quantizer if isinstance(quantizer, LearnedStepFakeQuantize) and can_compensate(node, weight) else None


def can_compensate(layer: Node, weight: Tensor) -> bool:
    """Whether the layer is of the kinds for which integers are found that make up for each other's errors."""
    known = layer.target in (aten.conv2d.default, aten.linear.default) and not isinstance(argument_of(layer, 4, 0), str)
    return known and weight[0].numel() <= _MAX_INPUTS


def _seen(
    student: GraphModule, node: Node, mine: SteppedRun, theirs: SteppedRun, rng: torch.Generator
) -> "Compensation":
    weight, bias = tensor_of(student, parameter_of(node, 1)), _bias(student, node)
    entering, leaving = mine.value(node_at(node, 0).name), theirs.value(node.name)
    if not math.isfinite(entering.norm()):
        name = name_of_reader(str(parameter_of(node, 1).target))
        raise DivergenceError(
            f"{name}: its inputs become NaN or too large when the layers before it are quantized; give these layers "
            "more bits (layer_bits), or look for logarithms, roots and divisions between them"
        )
    return Compensation(weight, bias, *look_at_layer(node, weight, bias, entering, leaving, rng))


def _bias(module: GraphModule, layer: Node) -> Tensor | None:
    has_one = len(layer.args) > 2 and layer.args[2] is not None
    return tensor_of(module, parameter_of(layer, 2)) if has_one else None


def _round_layer_(module: GraphModule, node: Node, quantizer: LearnedStepFakeQuantize, seen: "Compensation") -> None:
    rounded, shifted = seen.rounded(quantizer)
    tensor_of(module, parameter_of(node, 1)).copy_(rounded)
    if shifted is not None:
        tensor_of(module, parameter_of(node, 2)).copy_(shifted)
    quantizer.searching = None


def _shift_bias_(module: GraphModule, node: Node, seen: "Compensation") -> None:
    shifted = seen.bias_of(tensor_of(module, parameter_of(node, 1)))
    if shifted is not None:
        tensor_of(module, parameter_of(node, 2)).copy_(shifted)


class Compensation:
    """What a layer sees and what its weights should make of it, from which weight and bias on any grid follow."""

    def __init__(
        self,
        weight: Float[Tensor, "..."],
        bias: Float[Tensor, " channel"] | None,
        inputs: Float[Tensor, "group position input"],
        target: Float[Tensor, "group position output"],
        damping: float | None = None,
    ) -> None:
        """The damping that suits these inputs is searched unless it is given."""
        self._shape, self._bias, self._inputs, self._target = weight.shape, bias, inputs, target
        rows = weight.reshape(len(inputs), -1, inputs.shape[2])
        missing = target - inputs @ rows.mT
        damping = suiting_damping(inputs, missing) if damping is None else damping
        self._moments = _damped(_products(inputs, inputs), damping)
        self._rows = rows + _products(missing, inputs) @ _inverse(self._moments)

    @property
    def compensated(self) -> Float[Tensor, "..."]:
        """The weight in full precision that makes up for what is missing."""
        return self._rows.reshape(self._shape)

    def rounded(
        self, quantizer: LearnedStepFakeQuantize
    ) -> tuple[Float[Tensor, "..."], Float[Tensor, " channel"] | None]:
        """Return the weight on the grid of ``quantizer``, and the bias that goes with it."""
        weight = _round_rows(self._rows, quantizer, self._moments, len(self._rows)).view(self._shape)
        return weight, self.bias_of(weight)

    def bias_of(self, weight: Float[Tensor, "..."]) -> Float[Tensor, " channel"] | None:
        """Return the bias that makes up for the mean of what ``weight`` leaves of the target."""
        left = self._left(weight.reshape(self._rows.shape)).mean(1).flatten()
        return None if self._bias is None else self._bias + left

    def error(self, weight: Float[Tensor, "..."]) -> Float[Tensor, ""]:
        """Return the mean square of what ``weight`` and a bias that suits it leave of the target."""
        correction = min(1, self._target.shape[1] - 1)  # one position, of a single image, says nothing beside a bias
        return self._left(weight.reshape(self._rows.shape)).var(1, correction=correction).mean()

    def _left(self, rows: Float[Tensor, "group output input"]) -> Float[Tensor, "group position output"]:
        return self._target - self._inputs @ rows.mT


def adapted(
    weight: Float[Tensor, "..."],
    bias: Float[Tensor, " channel"] | None,
    inputs: Float[Tensor, "group position input"],
    target: Float[Tensor, "group position output"],
    damping: float,
) -> tuple[Float[Tensor, "..."], Float[Tensor, " channel"] | None]:
    """Return weight and bias in full precision, changed for inputs that are not what they were.

    Args:
        weight: Of the layer.
        bias: Of the layer, if it has one.
        inputs: What the weight is multiplied by now.
        target: What should come out, without the bias.
        damping: What is added to the power of the inputs, as a share of its mean.
    """
    rows = weight.reshape(len(inputs), -1, inputs.shape[2])
    moments = _products(inputs, inputs)
    missing = _products(target, inputs) - rows @ moments
    rows = rows + torch.cholesky_solve(missing.mT, torch.linalg.cholesky(_damped(moments, damping))).mT
    left = target.mean(1) - (rows @ inputs.mean(1)[:, :, None])[:, :, 0]  # (group, output)
    return rows.reshape(weight.shape), None if bias is None else bias + left.flatten()


def suiting_damping(
    inputs: Float[Tensor, "group position input"], missing: Float[Tensor, "group position output"]
) -> float:
    """Return the damping whose correction, found on one half of the images, leaves the least error on the other half.

    A single position has no halves; it gets the strongest.
    """
    if inputs.shape[1] < 2:
        return max(_DAMPINGS)
    errors = torch.zeros(len(_DAMPINGS), device=inputs.device)
    halves = list(zip(inputs.chunk(2, 1), missing.chunk(2, 1), strict=True))  # positions come image by image
    for (seen, lacking), (unseen, lacking_there) in zip(halves, reversed(halves), strict=True):
        moments, products = _products(seen, seen), _products(lacking, seen)
        for index, damping in enumerate(_DAMPINGS):
            change = products @ _inverse(_damped(moments, damping))
            errors[index] += (lacking_there - unseen @ change.mT).var(1, correction=0).mean()
    return _DAMPINGS[int(errors.argmin())]


def _products(a: Float[Tensor, "group position x"], b: Float[Tensor, "group position y"]) -> Float[Tensor, "group x y"]:
    return a.mT @ b / a.shape[1]


def _damped(moments: Float[Tensor, "group input input"], damping: float) -> Float[Tensor, "group input input"]:
    power = moments.diagonal(dim1=1, dim2=2).mean(1)
    added = torch.where(power > _NEXT_TO_NOTHING, damping * power, 1.0)[:, None, None]
    return moments + added * torch.eye(moments.shape[1], device=moments.device)


def _inverse(moments: Float[Tensor, "group input input"]) -> Float[Tensor, "group input input"]:
    return torch.cholesky_inverse(torch.linalg.cholesky(moments))


def _round_rows(
    rows: Float[Tensor, "group output input"],
    quantizer: LearnedStepFakeQuantize,
    moments: Float[Tensor, "group input input"],
    groups: int,
) -> Float[Tensor, "group output input"]:
    """Round one input's weights after the other, strongest input first; the others make up for its error."""
    scale = quantizer.scale.reshape(-1, 1).expand(rows.shape[0] * rows.shape[1], 1).reshape(groups, -1)
    order = moments.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    by_row = order[:, None, :].expand_as(rows)
    moments = moments.gather(1, order[:, :, None].expand_as(moments)).gather(2, order[:, None, :].expand_as(moments))
    hand_on = torch.linalg.cholesky(_inverse(moments), upper=True)
    left = rows.gather(2, by_row)
    rounded = torch.empty_like(left)
    for index in range(left.shape[2]):
        now = left[:, :, index]
        rounded[:, :, index] = round_to_grid(now, scale, quantizer.low, quantizer.high)
        error = (now - rounded[:, :, index]) / hand_on[:, index, index, None]
        left[:, :, index:] -= error[:, :, None] * hand_on[:, None, index, index:]
    return torch.empty_like(rows).scatter_(2, by_row, rounded)
