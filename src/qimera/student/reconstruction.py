"""The first blocks of a student with compensated integers -> integers trained for what each block returns."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qimera.graph.nodes import node_at, tensor_of
from qimera.graph.stepping import SteppedRun
from qimera.quantization.fake_quantize import LearnedStepFakeQuantize
from qimera.quantization.scheme import JOINS, quantizer_of
from qimera.student.blocks import Block, first_blocks, part_of
from qimera.student.crops import Crops
from qimera.student.equalization import parameter_of, shares_weight
from qimera.student.rounding import round_again_, weight_quantizer
from qimera.student.soft_rounding import SoftRounding

_MAX_LEVELS = 16
"""Levels of the tensors that a block's layers read up to which it is reconstructed: those of 4 bits."""

_NUM_STEPS = 600
_BATCH_SIZE = 8
_SOFT_SHARE = 0.75
"""Share of the steps in which weights lie between integers; biases and quantizer steps then adapt to the integers."""

_WEIGHT_RATE, _BIAS_RATE, _STEP_RATE = 1e-2, 3e-3, 3e-4
"""Of Adam: for logits of shares, for biases in their standard deviation, and for logarithms of quantizer steps."""

_MEASURED_SHARE = 0.2
"""Share of the steps in which gradients are only measured, before weights are pulled towards integers."""

_PULL = 10.0
"""The pull towards integers, in measured gradients."""


@torch.no_grad()
def reconstruct_(
    student: GraphModule,
    reference: GraphModule,
    images: Float[Tensor, "batch channel height width"],
    held_out: Float[Tensor, "held_out channel height width"],
    num_blocks: int,
    rng: torch.Generator,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Train the integers of the first blocks, one block after the other, for the squared error of what it returns.

    Every weight starts at its compensated integer and may go to the next one on the side of its real value (as in
    AdaRound, Nagel et al. 2020, and BRECQ, Li et al. 2021; deviation D37). A block keeps what it had where its error on
    ``held_out`` does not fall. Layers behind a block that changed are rounded again.

    Args:
        student: Prepared graph whose layers ``round_layers_`` has rounded.
        reference: The graph in full precision, its channels scaled as the student's are.
        images: What blocks are trained on.
        held_out: What they are judged by.
        num_blocks: How many; a block whose layers all read tensors of more than 4 bits stays as it is, and so do all
            where one of them holds an addition or a concatenation (docs/recipes.md).
        rng: Draws positions and crops.
        report: Told how many blocks are done and how many there are, before the first one and after each.

    Returns:
        The nodes whose tensors the changed blocks return.
    """
    blocks = first_blocks(student, reference, num_blocks)
    changed: list[str] = []
    if any(_has_join(student, block) for block in blocks) or not any(_is_coarse(student, block) for block in blocks):
        return []
    seen, unseen = (tuple(SteppedRun(graph, each) for graph in (student, reference)) for each in (images, held_out))
    report(0, len(blocks))
    for done, block in enumerate(blocks, 1):
        for run in (*seen, *unseen):
            run.advance_to(block.start)
        if not _is_coarse(student, block):
            if changed:
                _round_block_(student, reference, block, seen, rng)
        elif _reconstruct_(student, reference, block, seen, unseen, rng):
            changed.append(block.end)
        report(done, len(blocks))
    if changed:
        _round_rest_(student, reference, blocks[-1].end, seen, rng)
    return changed


def _has_join(student: GraphModule, block: Block) -> bool:
    return any(node.target in JOINS for node in part_of(student, block).graph.nodes)


def _is_coarse(student: GraphModule, block: Block) -> bool:
    """Whether any layer of the block reads a tensor of 4 bits or less."""
    grids = [quantizer_of(student, node_at(layer, 0)) for layer in block.layers]
    return any(
        isinstance(grid, LearnedStepFakeQuantize) and grid.quant_max - grid.quant_min < _MAX_LEVELS for grid in grids
    )


def _reconstruct_(
    student: GraphModule,
    reference: GraphModule,
    block: Block,
    seen: tuple[SteppedRun, ...],
    unseen: tuple[SteppedRun, ...],
    rng: torch.Generator,
) -> bool:
    """Train one block, and return whether its error on unseen samples fell; if it did not, nothing changes."""
    mine, theirs = part_of(student, block), part_of(reference, block)
    entering, target = unseen[0].value(block.start), theirs(unseen[1].value(block.start))
    before = relative_error(mine(entering), target)
    kept = {name: value.clone() for name, value in mine.state_dict().items()}
    real = _round_block_(student, reference, block, seen, rng)
    crops = Crops(seen[0].value(block.start), seen[1].value(block.start), theirs, rng)
    BlockTraining(student, block, real, crops).run_()
    if relative_error(mine(entering), target) < before:
        return True
    mine.load_state_dict(kept)
    return False


def _round_block_(
    student: GraphModule, reference: GraphModule, block: Block, seen: tuple[SteppedRun, ...], rng: torch.Generator
) -> dict[Node, Tensor]:
    """Round the layers of a block again for what they read now; return the weight of each before that."""
    runs = seen[0].branch(), seen[1].branch()
    return {node: round_again_(student, reference, node, runs, rng) for node in block.layers}


def _round_rest_(
    student: GraphModule, reference: GraphModule, end: str, runs: tuple[SteppedRun, ...], rng: torch.Generator
) -> None:
    """Round the layers behind ``end`` again, for their inputs are others now."""
    nodes, theirs = list(student.graph.nodes), {node.name for node in reference.graph.nodes}
    behind = nodes[[node.name for node in nodes].index(end) + 1 :]
    for node in behind:
        if node.name in theirs and weight_quantizer(student, node) is not None and not shares_weight(student, node):
            round_again_(student, reference, node, (runs[0], runs[1]), rng)


def relative_error(
    mine: Float[Tensor, "batch channel height width"], theirs: Float[Tensor, "batch channel height width"]
) -> Float[Tensor, ""]:
    """Return the squared error of all channels over their variances."""
    return (mine - theirs).square().mean((0, 2, 3)).sum() / theirs.var((0, 2, 3)).sum()


class BlockTraining:
    """One block's training, by which its weights choose between two integers each.

    Args:
        student: The graph whose block this is.
        block: Its layers were just rounded.
        real: The weight of each layer before that.
        crops: What the block sees, and should make of it.
    """

    def __init__(self, student: GraphModule, block: Block, real: dict[Node, Tensor], crops: Crops) -> None:
        self._crops = crops
        self._weights = {node: tensor_of(student, parameter_of(node, 1)) for node in block.layers}
        self._biases = {node: tensor_of(student, parameter_of(node, 2)) for node in block.layers if _has_bias(node)}
        self._rounding = [_soft(student, node, weight, real[node]) for node, weight in self._weights.items()]
        given = [*(node_at(node, 1) for node in self._weights), *(node_at(node, 2) for node in self._biases)]
        self._part = part_of(student, block, given)
        self._new_biases = [bias.detach().clone().requires_grad_() for bias in self._biases.values()]
        steps = _own_steps(student, self._part, block)
        biases = [([new], _BIAS_RATE * (float(new.detach().std(correction=0)) + 1e-3)) for new in self._new_biases]
        self._groups = [group for group in [*biases, (steps, _STEP_RATE)] if group[0]]
        self._measured = [0.0] * len(self._rounding)

    @torch.enable_grad()
    def run_(self) -> None:
        """Train, and leave the integers, the biases and the quantizer steps in the student."""
        adam = torch.optim.Adam([{"params": [each.undecided for each in self._rounding], "lr": _WEIGHT_RATE}])
        for parameters, rate in self._groups:
            adam.add_param_group({"params": parameters, "lr": rate})
        for group in adam.param_groups:
            group["betas"] = (0.9, 0.99)
        for step in range(_NUM_STEPS):
            for (_, rate), group in zip(self._groups, adam.param_groups[1:], strict=True):
                group["lr"] = rate * rate_factor(step / _NUM_STEPS)
            self._step(adam, step)
        with torch.no_grad():
            for weight, each in zip(self._weights.values(), self._rounding, strict=True):
                weight.copy_(each.rounded())
            for bias, new in zip(self._biases.values(), self._new_biases, strict=True):
                bias.copy_(new)

    def _step(self, adam: torch.optim.Optimizer, step: int) -> None:
        done, is_soft = step / _NUM_STEPS, step < _SOFT_SHARE * _NUM_STEPS
        entering, target, inside = self._crops.draw(_BATCH_SIZE)
        weights = [each.between() if is_soft else each.rounded() for each in self._rounding]
        missing = (self._part(entering, *weights, *self._new_biases) - target)[inside]
        adam.zero_grad(set_to_none=True)
        (missing.square().sum(1).mean() / self._crops.variance).backward()
        for index, each in enumerate(self._rounding if is_soft else []):
            assert each.undecided.grad is not None
            if done < _MEASURED_SHARE:
                self._measured[index] += float(each.undecided.grad.square().mean().sqrt())
            else:
                pull = _PULL * self._measured[index] / (_MEASURED_SHARE * _NUM_STEPS)
                each.undecided.grad += pull * each.pull(sharpness(done))
        adam.step()


def rate_factor(done: float) -> float:
    """Return the factor on the rates of biases and steps: a half-cosine, and from full rate to 0 beside integers."""
    if done < _SOFT_SHARE:
        return 0.5 * (1 + math.cos(math.pi * done))
    return (1 - done) / (1 - _SOFT_SHARE)


def sharpness(done: float) -> float:
    """Return the exponent of the pull, which falls from 20, where it acts near integers alone, to 2."""
    return 2 + 18 * max(0.0, 1 - (done - _MEASURED_SHARE) / (0.9 * _SOFT_SHARE - _MEASURED_SHARE))


def _has_bias(layer: Node) -> bool:
    """Whether the layer adds a bias, quantized or not."""
    return len(layer.args) > 2 and layer.args[2] is not None


def _soft(student: GraphModule, node: Node, weight: Tensor, real: Tensor) -> SoftRounding:
    quantizer = weight_quantizer(student, node)
    assert quantizer is not None
    return SoftRounding(weight.detach(), real, quantizer.scale.detach(), quantizer.low, quantizer.high)


def _own_steps(student: GraphModule, part: GraphModule, block: Block) -> list[nn.Parameter]:
    """Return the steps of activation grids that are used in this block alone, without the grid of the images."""
    (images,) = student.graph.find_nodes(op="placeholder")
    inside = [node for node in part.graph.nodes if node.op == "call_module"]
    calls = [node.target for node in student.graph.nodes if node.op == "call_module"]
    found = []
    for target in dict.fromkeys(node.target for node in inside):
        quantizer = student.get_submodule(str(target))
        is_own = calls.count(target) == sum(node.target == target for node in inside)
        reads_images = any(node.target == target and node_at(node, 0).name == images.name for node in inside)
        if isinstance(quantizer, LearnedStepFakeQuantize) and is_own and not reads_images:
            found.append(quantizer.log_scale)
    return found
