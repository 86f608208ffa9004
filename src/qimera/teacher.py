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
from torch.fx import GraphModule

from qimera.acceleration import to_device_
from qimera.errors import ConfigError, UnsupportedModelError, first_line
from qimera.graph import (
    BATCH_NORM,
    WEIGHTED,
    aten,
    batch_norms,
    has_parameter,
    layer_name,
    logits_node,
    node_at,
    simplify_,
    tensor_of,
    to_channels_last_,
    with_outputs,
)
from qimera.input_spec import InputSpec
from qimera.outputs import choose_logits
from qimera.programs import read_program


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
        self.layers = _layers(self.module)
        self.hash = _hash(self.module)
        self._read()

    def _read(self) -> None:
        """Find in the graph what samples are made from."""
        self.batch_norms = _batch_norms(self.module)
        self.classifier = _classifier(self.module)
        self.num_classes = self.classifier.weight.shape[0]
        self._tapped = with_outputs(self.module, [tap.node for tap in self.batch_norms])

    @classmethod
    def capture(
        cls, model: nn.Module, input_spec: InputSpec, logits: str = "", *, without_batch_norms: bool = False
    ) -> "Teacher":
        """Export a copy of ``model`` in eval mode with a dynamic batch.

        Args:
            model: A trained classifier.
            input_spec: What its images look like.
            logits: Which of several outputs the logits are, such as ``0`` or ``head.logits``; found if empty.
            without_batch_norms: Take a model that has none. Its samples then follow from its classes alone, and teach
                little more than noise does.

        Raises:
            ConfigError: the model refuses images of ``input_spec.shape``, or has no output ``logits``.
            UnsupportedModelError: it cannot be exported, returns no logits or several, has no batch norm, or holds NaN,
                infinite values or negative variances.
        """
        model = copy.deepcopy(model).eval().requires_grad_(False)
        _refuse_broken_numbers(model)
        images = torch.zeros(2, *input_spec.shape)
        _return_logits_alone_(model, images, logits)
        try:
            program = torch.export.export(model, (images,), dynamic_shapes=({0: Dim.DYNAMIC},))
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be captured by torch.export: {first_line(error)}; "
                "remove data-dependent control flow and operations that fix the batch size"
            ) from error
        if not without_batch_norms and not _batch_norms(_graph_of(program)):
            raise UnsupportedModelError(
                f"no batch norm with running statistics found in {type(model).__name__} "
                f"({len(list(model.modules()))} modules); samples are synthesised from these statistics, "
                "so bring the model with its batch norms, before folding them. For one that never had any, "
                "--without-batch-norms makes samples from its classes alone, which are little better than noise"
            )
        return cls(program, input_spec)

    @classmethod
    def load(cls, path: Path | str, input_spec: InputSpec) -> "Teacher":
        """Read a teacher written by ``save``."""
        try:
            return cls(read_program(Path(path)), input_spec)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"{path}: not a teacher saved by qimera: {first_line(error)}") from error

    def save(self, path: Path | str) -> None:
        """Write the exported program (.pt2)."""
        buffer = io.BytesIO()
        torch.export.save(self.program, buffer)
        Path(path).write_bytes(buffer.getvalue())

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.classifier.weight.device

    def on(self, device: torch.device) -> "Teacher":
        """Return this teacher if it computes there, else a copy that does."""
        if device == self.device:
            return self
        other = Teacher(self.program, self.input_spec)
        other.module = copy.deepcopy(other.module)  # every module of a program has the program's own parameters
        to_device_(other.module, device)
        other._read()
        return other

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


def _refuse_broken_numbers(model: nn.Module) -> None:
    """Raise UnsupportedModelError for values that no trained network has."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            count = int((~value.isfinite()).sum())
            raise UnsupportedModelError(
                f"{name}: {count} of {value.numel()} values are NaN or infinite; the training diverged, or the file is "
                "damaged: bring an earlier checkpoint"
            )
        if name.endswith("running_var") and bool((value < 0).any()):
            raise UnsupportedModelError(
                f"{name}: {int((value < 0).sum())} of {value.numel()} variances are negative; the file is damaged, or "
                "the values are of something else: bring the weights again"
            )


def _graph_of(program: ExportedProgram) -> GraphModule:
    module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    module.requires_grad_(False)
    simplify_(module)
    to_channels_last_(module)
    return module


def _return_logits_alone_(model: nn.Module, images: Tensor, wanted: str) -> None:
    """Let ``model`` return (batch, num_classes) where it returns more, or positions of size one behind the classes."""
    try:
        with torch.no_grad():
            output = model(images)
    except Exception as error:
        raise ConfigError(
            f"input_shape {tuple(images.shape[1:])}: {type(model).__name__} cannot process such images: "
            f"{first_line(error)}"
        ) from error
    place = choose_logits(output, len(images), wanted, type(model).__name__)
    if place.path or place.is_map:
        model.register_forward_hook(lambda _module, _images, returned: place.logits_of(returned))


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


def _classifier(module: GraphModule) -> Classifier:
    """Walk back from the logits through operations that keep classes apart to the layer that produced them.

    Of several that are added, the first is taken.
    """
    waiting, last = [logits_node(module)], None
    while waiting:
        node = waiting.pop()
        if has_parameter(node):
            weight = tensor_of(module, node_at(node, 1)).detach().clone().flatten(1)
            return Classifier(layer_name(node), weight)
        if node.target in _PER_CLASS:
            waiting += reversed(node.all_input_nodes)
        elif node.op == "call_function":
            last = node
    raise UnsupportedModelError(
        f"the logits come from {last.target if last else 'no layer'}, not from a linear layer or 1x1 convolution; "
        "class embeddings are read from the weight of that layer, so let the model return its output unchanged"
    )


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
