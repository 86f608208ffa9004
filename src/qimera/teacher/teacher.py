"""A trained classifier -> the teacher: its ATen graph, its batch-norm statistics and its classifier weight."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qimera.config.input_spec import InputSpec
from qimera.errors import ConfigError, UnsupportedModelError, first_line
from qimera.graph.attention import attentions
from qimera.graph.costs import multiply_adds
from qimera.graph.files import describe, load_graph, save_graph, tensors_of
from qimera.graph.nodes import (
    BATCH_NORM,
    WEIGHTED,
    aten,
    batch_norms,
    copied,
    groups_of,
    has_parameter,
    layer_name,
    logits_node,
    node_at,
    tensor_of,
    to_channels_last_,
    with_outputs,
)
from qimera.graph.shapes import propagate_shapes_
from qimera.machine.acceleration import quick_gradients_, to_device_
from qimera.teacher.capture import capture


@dataclass(frozen=True)
class BatchNormTap:
    """One batch norm: what it recorded of its input over the training data."""

    name: str
    node: str
    """Graph node of the tensor that enters the batch norm."""
    mean: Float[Tensor, " channel"]
    var: Float[Tensor, " channel"]


class Taps(NamedTuple):
    """What the teacher computes of one batch on the way to its logits."""

    batch_norms: list[Tensor]
    """Input of every batch norm, in the order of ``Teacher.batch_norms``, each (batch, channel, ...)."""
    layer_norms: list[Tensor]
    """Input of every layer norm over channels, each (batch, ..., channel)."""
    attentions: list[Tensor]
    """What every attention returns, each (..., token, feature)."""
    scores: list[Tensor]
    """Products of queries and keys of every attention, each (..., token, token)."""


@dataclass(frozen=True)
class Layer:
    """One layer with a weight that can be quantized."""

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    macs: int
    """Multiply-adds for one image."""


@dataclass(frozen=True)
class ClassifierLayer:
    """The last linear layer or convolution; row k of its weight stands for class k."""

    name: str
    weight: Float[Tensor, "num_classes latent"]


class Teacher(nn.Module):
    """The full-precision classifier as a graph that nothing here ever changes.

    Calling it maps normalised images (batch, channel, height, width) to logits (batch, num_classes). It computes as in
    evaluation, whatever ``train`` or ``eval`` is called.
    """

    def __init__(self, module: GraphModule, input_spec: InputSpec) -> None:
        super().__init__()
        self.input_spec = input_spec
        self.module = module
        self.layers = _layers(self.module)
        self.hash = _hash(self.module)
        self._read()

    def _read(self) -> None:
        """Find in the graph what samples are made from."""
        self.batch_norms = _batch_norms(self.module)
        self.classifier = _classifier(self.module)
        self.num_classes = self.classifier.weight.shape[0]
        self.layer_norms = [node_at(node, 0).name for node in _layer_norms(self.module)]
        self._attentions = [(scores.name, output.name) for scores, output in attentions(self.module)]
        of_attentions = [*(output for _, output in self._attentions), *(scores for scores, _ in self._attentions)]
        names = [*(tap.node for tap in self.batch_norms), *self.layer_norms, *of_attentions]
        self._tapped = with_outputs(self.module, names)
        if self.input_spec.has_large_images:  # small ones would gain little, and keep the digits that they had
            quick_gradients_(self._tapped)

    @classmethod
    def capture(cls, model: nn.Module, input_spec: InputSpec, logits: str = "") -> "Teacher":
        """Export a copy of ``model`` in evaluation mode and float32, for batches of any size, and compare the two.

        Args:
            model: A trained classifier, on any device and of any floating-point type; wrappers such as
                ``nn.DataParallel`` and compiled modules are taken off.
            input_spec: What its images look like.
            logits: Which of several outputs the logits are, such as ``0`` or ``head.logits``; found if empty.

        Raises:
            ConfigError: the model refuses images of ``input_spec.shape``, or has no output ``logits``.
            UnsupportedModelError: it cannot be copied or exported, returns no logits or several, holds NaN, infinite
                values or negative variances, uses an operation that qimera does not know, or answers differently when
                it is asked again.
        """
        return cls(capture(model, input_spec, logits), input_spec)

    @classmethod
    def load(cls, path: Path | str, input_spec: InputSpec) -> "Teacher":
        """Read a teacher written by ``save``; nothing in the file is executed.

        Raises:
            ConfigError: no such file, a damaged one, or one that asks for more than operations on tensors.
        """
        module = load_graph(Path(path))
        try:
            propagate_shapes_(module, input_spec.shape)
            to_channels_last_(module)
            return cls(module, input_spec)
        except Exception as error:  # whatever a graph does that does not fit together
            raise ConfigError(f"{path}: not a teacher saved by qimera: {first_line(error)}") from error

    def save(self, path: Path | str) -> None:
        """Write the graph and its tensors (safetensors)."""
        save_graph(self.module, Path(path))

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.classifier.weight.device

    def on(self, device: torch.device) -> "Teacher":
        """Return this teacher if it computes there, else a copy that does."""
        if device == self.device:
            return self
        return Teacher(copied(self.module), self.input_spec).to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Teacher":
        """Let the graph make its own tensors where the rest is, and read from there what samples are made from."""
        before = self.device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = next(self.module.parameters()).device
        if device != before:
            to_device_(self.module, device)
            self._read()
        return self

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch num_classes"]:
        """Return the logits."""
        logits = self.module(images)
        assert isinstance(logits, Tensor)
        return logits

    def forward_with_taps(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> tuple[Float[Tensor, "batch num_classes"], Taps]:
        """Return the logits, and what samples are judged by beside them."""
        logits, found = self._tapped(images)
        counts = (len(self.batch_norms), len(self.layer_norms), len(self._attentions), len(self._attentions))
        rest = iter(found)
        return logits, Taps(*(list(islice(rest, count)) for count in counts))


def _layer_norms(module: GraphModule) -> list[Node]:
    nodes = module.graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    return [node for node in nodes if isinstance(node.args[1], list) and len(node.args[1]) == 1]


def _batch_norms(module: GraphModule) -> list[BatchNormTap]:
    taps = []
    for node in batch_norms(module):
        entering, mean, var = (node_at(node, index) for index in (0, 3, 4))
        name = str(mean.target).rpartition(".")[0]
        statistics = (tensor_of(module, each).detach().clone() for each in (mean, var))
        taps.append(BatchNormTap(name, entering.name, *statistics))
    return taps


_PER_CLASS = {
    *(aten.flatten.using_ints, aten.view.default, aten.reshape.default, aten._unsafe_view.default),
    *(aten.squeeze.dims, aten.squeeze.dim, aten.squeeze.default, aten.contiguous.default, aten.clone.default),
    *(aten.mean.dim, aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default, aten.max_pool2d.default),
    *(aten.dropout.default, aten.log_softmax.int, BATCH_NORM, aten.relu.default, aten.leaky_relu.default),
    *(aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor),
    *(aten.select.int, aten.slice.Tensor, aten.stack.default, aten.unsqueeze.default),
}
"""Operations between the classifier and the logits that keep each class for itself."""


def _classifier(module: GraphModule) -> ClassifierLayer:
    """Step back from the logits, through operations that keep classes apart, to the layer that has a row for each.

    Of several that are added, the first is taken.
    """
    waiting, last = [logits_node(module)], None
    num_classes = waiting[0].meta["val"].shape[1]
    while waiting:
        node = waiting.pop()
        weight = _rows_of_outputs(module, node) if has_parameter(node) else None
        if weight is not None and len(weight) == num_classes:
            return ClassifierLayer(layer_name(node), weight)
        if node.target in _PER_CLASS:
            waiting += reversed(node.all_input_nodes)
        elif node.op == "call_function":
            last = node
    raise UnsupportedModelError(
        f"the logits come from {last.target if last else 'no layer'}, not from a linear layer or convolution with "
        f"one row for each of {num_classes} classes; class embeddings are read from the weight of that layer, so let "
        "the model return its output unchanged"
    )


def _rows_of_outputs(module: GraphModule, layer: Node) -> Float[Tensor, "output input"]:
    """Return a copy of the layer's weight with a row for each of its outputs."""
    weight = tensor_of(module, node_at(layer, 1)).detach().clone()
    if layer.target is aten.conv_transpose2d.input:  # by inputs first, and by outputs within each group
        weight = weight.unflatten(0, (groups_of(layer), -1)).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def _layers(module: GraphModule) -> list[Layer]:
    layers = []
    for node in module.graph.nodes:
        if has_parameter(node):
            shape = tuple(tensor_of(module, node_at(node, 1)).shape)
            layers.append(Layer(layer_name(node), WEIGHTED[node.target], shape, multiply_adds(node)))
    return layers


def _hash(module: GraphModule) -> str:
    """SHA-256 over the graph, whatever its nodes are called, and the names and values of the tensors that it reads."""
    digest = hashlib.sha256(describe(module, named=False).encode())
    for name, value in sorted(tensors_of(module).items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def as_teacher(model: nn.Module, input_spec: InputSpec | None) -> Teacher:
    """Return ``model`` if it is a ``Teacher``, else capture it."""
    if isinstance(model, Teacher):
        return model
    if input_spec is None:
        raise ConfigError("input_spec: missing; pass InputSpec(shape=..., mean=..., std=...) with a plain model")
    return Teacher.capture(model, input_spec)
