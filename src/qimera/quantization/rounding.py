"""First ranges and first integers of a student, layer after layer, each behind its quantized predecessors."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional as F

from qimera.graph import aten, node_at, tensor_of
from qimera.quantization.fake_quantize import LearnedStepFakeQuantize, round_to_grid

_DAMPING = 0.01
"""Share of the mean input power that is added to every input's own, as in GPTQ."""

_MIN_POSITIONS = 8192
_POSITIONS_PER_INPUT = 20
"""Positions that a layer is seen at: enough to know each of its inputs' products with every other."""

_MAX_INPUTS = 8192
"""Inputs of one output from which a layer keeps its nearest integers: the matrix of products would not fit."""


@torch.no_grad()
def round_layers_(
    student: GraphModule,
    teacher: GraphModule,
    images: Float[Tensor, "batch channel height width"],
    generator: torch.Generator,
) -> None:
    """Replace each layer's weight by the multiples of its steps that bring its output closest to the teacher's.

    Rounding to nearest adds up errors that inputs share; instead each weight that is rounded hands its error on to
    those that are still to come, by the second moments of their inputs (GPTQ, Frantar et al. 2023). Before, the weights
    take up what quantized predecessors lost, and after, the bias takes up the mean of what is left (as in bias
    correction, Nagel et al. 2019).

    Args:
        student: Prepared graph; its quantizers may be searching their ranges in the same pass.
        teacher: The graph in full precision with folded batch norms, whose layers bear the same names.
        images: What the layers are looked at on.
        generator: Draws the positions.
    """
    mine, theirs = _Run(student, images), _Run(teacher, images)
    for node in student.graph.nodes:
        quantizer = _weight_quantizer(student, node)
        if quantizer is not None and theirs.advance_to(node.name):
            mine.advance_before(node.name)
            entering = mine.value(node_at(node, 0))
            weight = tensor_of(student, node_at(node_at(node, 1), 0))
            inputs, target = _look(node, weight, entering, theirs.value(node.name), generator)
            _round_layer_(student, node, quantizer, inputs, target)
            mine.repeat(node.all_input_nodes[1:])
        mine.advance_to(node.name)


class _Run:
    """One pass through a graph that can be halted at every node, and drops values that nothing needs any more."""

    def __init__(self, module: GraphModule, images: Tensor) -> None:
        self._interpreter = Interpreter(module)
        self._interpreter.args_iter = iter([images])
        self._ahead = list(reversed(module.graph.nodes))
        self._names = {node.name: node for node in module.graph.nodes}

    def value(self, node: Node | str) -> Tensor:
        """Return what ``node`` was computed to be."""
        found = self._interpreter.env[self._names[node] if isinstance(node, str) else node]
        assert isinstance(found, Tensor)
        return found

    def advance_to(self, name: str) -> bool:
        """Compute everything up to the node called ``name``, and say whether there is one."""
        self.advance_before(name)
        if self._ahead and self._ahead[-1].name == name:
            self._step()
        return name in self._names

    def advance_before(self, name: str) -> None:
        """Compute everything before the node called ``name``."""
        if self._names.get(name) in self._ahead:
            while self._ahead[-1].name != name:
                self._step()

    def repeat(self, parameters: list[Node]) -> None:
        """Compute quantized parameters again after they changed."""
        for node in parameters:
            for each in (*node.all_input_nodes, node):
                self._interpreter.env[each] = self._interpreter.run_node(each)

    def _step(self) -> None:
        node = self._ahead.pop()
        self._interpreter.env[node] = self._interpreter.run_node(node)
        for unneeded in self._interpreter.user_to_last_uses.get(node, []):
            self._interpreter.env.pop(unneeded, None)


def _weight_quantizer(module: GraphModule, node: Node) -> LearnedStepFakeQuantize | None:
    """Return the quantizer of the weight of ``node``, if it is a layer of the kinds that are rounded here."""
    if node.target not in (aten.conv2d.default, aten.linear.default) or node_at(node, 1).op != "call_module":
        return None
    quantizer = module.get_submodule(str(node_at(node, 1).target))
    if not isinstance(quantizer, LearnedStepFakeQuantize) or isinstance(_argument(node, 4, 0), str):
        return None
    weight = tensor_of(module, node_at(node_at(node, 1), 0))
    return quantizer if weight[0].numel() <= _MAX_INPUTS else None


def _argument(node: Node, index: int, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else default


def _look(
    node: Node, weight: Tensor, entering: Tensor, leaving: Tensor, generator: torch.Generator
) -> tuple[Float[Tensor, "group position input"], Float[Tensor, "group position output"]]:
    """Return what enters the layer at some random positions of every image, and what should leave it there."""
    num_inputs = weight[0].numel()
    wanted = max(_MIN_POSITIONS, _POSITIONS_PER_INPUT * num_inputs)
    if node.target is aten.linear.default:
        inputs, outputs = entering.reshape(-1, num_inputs), leaving.reshape(-1, len(weight))
        chosen = torch.randperm(len(inputs), generator=generator)[:wanted].to(inputs.device)
        return inputs[chosen][None], outputs[chosen][None]
    groups = int(_argument(node, 6, 1))
    stride, padding, dilation = (_argument(node, index, default) for index, default in ((3, 1), (4, 0), (5, 1)))
    each = min(leaving[0, 0].numel(), -(-wanted // len(entering)))
    patches, targets = [], []
    for image, target in zip(entering.split(1), leaving.flatten(2).split(1), strict=True):
        chosen = torch.randperm(target.shape[2], generator=generator)[:each].to(image.device)
        seen = F.unfold(image, weight.shape[2:], dilation, padding, stride)  # (1, channel * kernel, position)
        patches.append(seen[0, :, chosen].unflatten(0, (groups, num_inputs)))
        targets.append(target[0, :, chosen].unflatten(0, (groups, len(weight) // groups)))
    return torch.cat(patches, 2).transpose(1, 2), torch.cat(targets, 2).transpose(1, 2)


def _round_layer_(
    module: GraphModule,
    node: Node,
    quantizer: LearnedStepFakeQuantize,
    inputs: Float[Tensor, "group position input"],
    target: Float[Tensor, "group position output"],
) -> None:
    weight = tensor_of(module, node_at(node_at(node, 1), 0))
    bias = tensor_of(module, node_at(node_at(node, 2), 0)) if len(node.args) > 2 and node.args[2] is not None else None
    groups, _, num_inputs = inputs.shape
    rows = weight.reshape(groups, -1, num_inputs)
    if bias is not None:
        target = target - bias.view(groups, 1, -1)
    moments = inputs.transpose(1, 2) @ inputs / inputs.shape[1]
    power = moments.diagonal(dim1=1, dim2=2).mean(1)
    damping = torch.where(power > 0, _DAMPING * power, 1.0)[:, None, None]
    moments += damping * torch.eye(num_inputs, device=moments.device)
    missing = target - inputs @ rows.transpose(1, 2)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    rows = rows + (missing.transpose(1, 2) @ inputs / inputs.shape[1]) @ inverse
    rounded = _round_rows(rows, quantizer, moments, groups)
    weight.copy_(rounded.view_as(weight))
    if bias is not None:
        bias += (target - inputs @ rounded.transpose(1, 2)).mean(1).flatten()
    quantizer.searching = None


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
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    hand_on = torch.linalg.cholesky(inverse, upper=True)
    left = rows.gather(2, by_row)
    rounded = torch.empty_like(left)
    for index in range(left.shape[2]):
        now = left[:, :, index]
        rounded[:, :, index] = round_to_grid(now, scale, quantizer.low, quantizer.high)
        error = (now - rounded[:, :, index]) / hand_on[:, index, index, None]
        left[:, :, index:] -= error[:, :, None] * hand_on[:, None, index, index:]
    return torch.empty_like(rows).scatter_(2, by_row, rounded)
