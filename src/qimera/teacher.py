"""A trained classifier -> the teacher: its ATen graph, its batch-norm statistics and its classifier weight."""

import copy
import hashlib
import io
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node

from qimera.errors import ConfigError, UnsupportedModelError
from qimera.graph import (
    WEIGHTED,
    aten,
    batch_norms,
    has_parameter,
    layer_name,
    logits_node,
    node_at,
    tensor_of,
    with_outputs,
)
from qimera.settings import InputSpec


@dataclass(frozen=True)
class BatchNormTap:
    """One batch norm: what it recorded of its input over the training data."""

    name: str
    node: str
    """Graph node of the tensor that enters the batch norm."""
    mean: Float[Tensor, " channel"]
    var: Float[Tensor, " channel"]


@dataclass(frozen=True)
class Layer:
    """One layer with a weight that can be quantized."""

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    macs: int
    """Multiply-adds for one image."""


@dataclass(frozen=True)
class Classifier:
    """The last linear layer or 1x1 convolution; row k of its weight stands for class k."""

    name: str
    weight: Float[Tensor, "num_classes latent"]


class Teacher(nn.Module):
    """The full-precision classifier as an exported graph that nothing here ever changes.

    Calling it maps normalised images (batch, channel, height, width) to logits (batch, num_classes).
    """

    def __init__(self, program: ExportedProgram, input_spec: InputSpec) -> None:
        super().__init__()
        self.input_spec = input_spec
        self.program = program
        self.module = _graph_of(program)
        self.batch_norms = _batch_norms(self.module)
        self.classifier = _classifier(self.module)
        self.layers = _layers(self.module)
        self.num_classes = self.classifier.weight.shape[0]
        self.hash = _hash(self.module)
        self._tapped = with_outputs(self.module, [tap.node for tap in self.batch_norms])

    @classmethod
    def capture(cls, model: nn.Module, input_spec: InputSpec) -> "Teacher":
        """Export a copy of ``model`` in eval mode with a dynamic batch.

        Raises:
            ConfigError: the model refuses images of ``input_spec.shape``.
            UnsupportedModelError: it cannot be exported, does not return one tensor of logits, or has no batch norm.
        """
        model = copy.deepcopy(model).eval().requires_grad_(False)
        images = torch.zeros(2, *input_spec.shape)
        _check_output(model, images)
        try:
            program = torch.export.export(model, (images,), dynamic_shapes=({0: Dim.DYNAMIC},))
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be captured by torch.export: {_first_line(error)}; "
                "remove data-dependent control flow and operations that fix the batch size"
            ) from error
        if not _batch_norms(_graph_of(program)):
            raise UnsupportedModelError(
                f"no batch norm with running statistics found in {type(model).__name__} "
                f"({len(list(model.modules()))} modules); samples are synthesised from these statistics, "
                "so bring the model with its batch norms, before folding them"
            )
        return cls(program, input_spec)

    @classmethod
    def load(cls, path: Path, input_spec: InputSpec) -> "Teacher":
        """Read a teacher written by ``save``."""
        try:
            return cls(torch.export.load(path), input_spec)
        except Exception as error:
            raise ConfigError(f"{path}: not a teacher saved by qimera: {_first_line(error)}") from error

    def save(self, path: Path) -> None:
        """Write the exported program (.pt2)."""
        buffer = io.BytesIO()
        torch.export.save(self.program, buffer)
        path.write_bytes(buffer.getvalue())

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch num_classes"]:
        """Return the logits."""
        logits = self.module(images)
        assert isinstance(logits, Tensor)
        return logits

    def forward_with_taps(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> tuple[Float[Tensor, "batch num_classes"], list[Tensor]]:
        """Return the logits and the input of every batch norm, in the order of ``batch_norms``."""
        logits, taps = self._tapped(images)
        return logits, taps


def _graph_of(program: ExportedProgram) -> GraphModule:
    module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    module.requires_grad_(False)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # where CPU convolutions are fastest
    return module


def _check_output(model: nn.Module, images: Tensor) -> None:
    try:
        with torch.no_grad():
            logits = model(images)
    except Exception as error:
        raise ConfigError(
            f"input_shape {tuple(images.shape[1:])}: {type(model).__name__} cannot process such images: "
            f"{_first_line(error)}"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != len(images) or logits.shape[1] < 2:
        found = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise UnsupportedModelError(
            f"{type(model).__name__} returns {found} for {len(images)} images; "
            "expected logits of shape (batch, classes) with at least 2 classes: wrap the model so that it returns them"
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _batch_norms(module: GraphModule) -> list[BatchNormTap]:
    taps = []
    for node in batch_norms(module):
        entering, mean, var = (node_at(node, index) for index in (0, 3, 4))
        name = str(mean.target).rpartition(".")[0]
        statistics = (tensor_of(module, each).detach().clone() for each in (mean, var))
        taps.append(BatchNormTap(name, entering.name, *statistics))
    return taps


def _classifier(module: GraphModule) -> Classifier:
    """Walk back from the logits through reshapes to the layer that produced them."""
    node = logits_node(module)
    passing = {aten.flatten.using_ints, aten.view.default, aten.reshape.default, aten.squeeze.dims, aten.mean.dim}
    passing |= {aten.squeeze.dim, aten.squeeze.default, aten.dropout.default, aten.adaptive_avg_pool2d.default}
    while node.target in passing and isinstance(node.args[0], Node):
        node = node.args[0]
    if not has_parameter(node):
        raise UnsupportedModelError(
            f"the logits come from {node.target}, not from a linear layer or 1x1 convolution; "
            "class embeddings are read from the weight of that layer, so let the model return its output unchanged"
        )
    weight = tensor_of(module, node_at(node, 1)).detach().clone().flatten(1)
    return Classifier(layer_name(node), weight)


def _layers(module: GraphModule) -> list[Layer]:
    layers = []
    for node in module.graph.nodes:
        if has_parameter(node):
            shape = tuple(tensor_of(module, node_at(node, 1)).shape)
            positions = math.prod(int(size) for size in node.meta["val"].shape[2:])
            layers.append(Layer(layer_name(node), WEIGHTED[node.target], shape, positions * math.prod(shape)))
    return layers


def _hash(module: GraphModule) -> str:
    """SHA-256 over names, shapes and values of all floating-point parameters and buffers, in order of name."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if value.is_floating_point():
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
