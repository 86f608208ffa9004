"""A teacher and bit widths -> the student: the same graph with fake quantizers, its first ranges, its integer form."""

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from qimera.config.input_spec import InputSpec
from qimera.config.settings import QuantizationSettings
from qimera.errors import ConfigError, first_line
from qimera.graph.files import save_graph
from qimera.graph.folding import fold_batch_norms, unfold_batch_norms, unshare_biases_
from qimera.graph.nodes import WEIGHTED, name_of_reader, node_at, tensor_of, to_channels_last_, with_outputs
from qimera.machine.acceleration import to_device_
from qimera.machine.files import check_types, save_tensors
from qimera.quantization.ends import with_rules_for_ends
from qimera.quantization.fake_quantize import (
    FakeQuantize,
    LearnedStepFakeQuantize,
    MinMaxFakeQuantize,
    PerChannelBiasFakeQuantize,
)
from qimera.quantization.scheme import HardwareQuantizer, PaperQuantizer, end_of_kernel, quantizer_of
from qimera.student.equalization import edge_into, scale_channels_
from qimera.student.exact_int8 import with_exact_rounding
from qimera.student.rounding import round_layers_
from qimera.teacher.teacher import Teacher

logger = logging.getLogger(__name__)

_SCALES = "channel_scales."
"""Prefix of the scales' names in a file, before the name of the node."""

_STATE, _INPUT, _QUANTIZATION = "student/", "input_spec", "quantization"
"""In a file of ``Student.save``: the prefix of the student's own tensors, and the names of the notes."""


class Student(nn.Module):
    """The quantized model in training form; calling it maps normalised images to logits, as the teacher does.

    In evaluation mode, in which it is made, it computes as integer kernels do: sums are exact, and no gradients are
    recorded. In training mode layers compute in floating point, with gradients. The logits of both differ where
    rounding errors carry a sum over the edge between two levels.
    """

    def __init__(self, teacher: Teacher, settings: QuantizationSettings) -> None:
        super().__init__()
        self.settings = settings = with_rules_for_ends(settings, teacher)
        self.input_spec = teacher.input_spec
        self.num_classes = teacher.num_classes
        self.teacher_hash = teacher.hash
        self.module = _prepare(teacher, settings)
        # Tuples, for neither holds parameters that the student owns beside those of self.module.
        self._exact = (with_exact_rounding(self.module, settings.target),)
        self._reference = (fold_batch_norms(teacher.module),)
        self._teacher = (teacher,)
        self.channel_scales: dict[str, Float[Tensor, " channel"]] = {}
        """Scales of the channels that each layer reads, by its node's name; the reference's are scaled alike."""
        self.eval()

    @classmethod
    def load(cls, path: Path | str) -> "Student":
        """Return the student that ``save`` wrote; nothing in the file is executed.

        Raises:
            ConfigError: no such file, a damaged one, or one that asks for more than operations on tensors.
        """
        try:
            with safe_open(path, "pt") as file:
                notes = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(_STATE)}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path}: does not hold a student: {first_line(error)}") from error
        if not {_INPUT, _QUANTIZATION} <= notes.keys():
            raise ConfigError(
                f"{path}: does not hold a student; give a file that Student.save wrote, or qimera.load a run"
            )
        teacher = Teacher.load(path, InputSpec.from_json(notes[_INPUT], path))
        student = cls(teacher, QuantizationSettings.from_json(notes[_QUANTIZATION], path))
        student._restore_({name.removeprefix(_STATE): tensor for name, tensor in tensors.items()}, path)
        return student

    def save(self, path: Path | str) -> None:
        """Write the student, its teacher and its settings into one file (safetensors)."""
        notes = {_INPUT: self.input_spec.model_dump_json(), _QUANTIZATION: self.settings.model_dump_json()}
        state = {_STATE + name: tensor for name, tensor in self._state().items()}
        save_graph(self._teacher[0].module, Path(path), state, notes)

    @classmethod
    def load_state(cls, path: Path | str, teacher: Teacher, settings: QuantizationSettings) -> "Student":
        """Rebuild a student from its teacher, its settings and the file that ``save_state`` wrote."""
        student = cls(teacher, settings)
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path}: does not hold the student of these settings: {error}") from error
        student._restore_(tensors, path)
        return student

    def save_state(self, path: Path | str) -> None:
        """Write weights, steps and zero points, and the scales of channels, for ``load_state`` (safetensors)."""
        save_tensors(self._state(), Path(path))

    def _state(self) -> dict[str, Tensor]:
        return self.module.state_dict() | {f"{_SCALES}{name}": scale for name, scale in self.channel_scales.items()}

    def _restore_(self, tensors: dict[str, Tensor], path: Path | str) -> None:
        check_types(path, tensors, {name: value.dtype for name, value in self.module.state_dict().items()})
        scales = {name: tensors.pop(name) for name in sorted(tensors) if name.startswith(_SCALES)}
        try:
            self.module.load_state_dict(tensors)
            self._scale_reference_({name.removeprefix(_SCALES): scale for name, scale in scales.items()})
        except RuntimeError as error:
            raise ConfigError(f"{path}: does not hold the student of these settings: {error}") from error

    @torch.no_grad()
    def _scale_reference_(self, scales: Mapping[str, Tensor]) -> None:
        """Scale the reference's channels as those of the student were, layer after layer."""
        for node in [each for each in self.module.graph.nodes if each.name in scales]:
            edge = edge_into(self.module, node)
            if edge is None:
                raise RuntimeError(f"the channels that {node.name} reads cannot be scaled")
            self.channel_scales[node.name] = scales[node.name]
            scale_channels_(self.reference, edge, scales[node.name])

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.module.parameters()).device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Student":
        """Move the reference along, and let graphs make their own tensors where the rest is."""
        before = self.device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.device != before:
            for graph in (self.module, self.reference):
                to_device_(graph, self.device)
            self._exact = (with_exact_rounding(self.module, self.settings.target),)
        return self

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch num_classes"]:
        """Return the logits."""
        if self.training:
            logits = self.module(images)
        else:
            with torch.no_grad():
                logits = self._exact[0](images)
        assert isinstance(logits, Tensor)
        return logits

    def with_features(self, names: Sequence[str]) -> GraphModule:
        """Return a graph that computes (logits, [tensors of the nodes called ``names``]), sharing all parameters."""
        return with_outputs(self.module, names)

    @property
    def reference(self) -> GraphModule:
        """The teacher with folded batch norms, in full precision, its channels scaled as this student's are."""
        return self._reference[0]

    def converted(self) -> GraphModule:
        """Return the integer graph in ``quantized_decomposed`` operations.

        It equals the student bit for bit as long as it is run in floating point, with gradients recorded or not.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchao's own deprecations, nothing that a user can act on
            module = copy.deepcopy(self.module)
            with torch.no_grad():
                for weight, quantizer in _weight_quantizers(module):
                    quantizer(weight)  # a range that follows its weight is as old as the last call
            names = self.layer_names()
            converted = convert_pt2e(module)
            for node in [each for each in converted.graph.nodes if each.name in names]:
                _name_integers_(converted, node, names[node.name])
            converted.recompile()  # once: for each layer it would take five times as long as all else
            return _lay_out_(converted)

    def layer_names(self) -> dict[str, str]:
        """Return the name of each layer by that of its node; a layer that is called again gets a number."""
        names: dict[str, str] = {}
        for node in self.module.graph.nodes:
            if node.target in WEIGHTED and isinstance(node.args[1], Node) and node.args[1].op == "call_module":
                owner = name_of_reader(str(node_at(node.args[1], 0).target))
                calls = sum(name.partition("@")[0] == owner for name in names.values())
                names[node.name] = f"{owner}@{calls}" if calls else owner
        return names

    @torch.no_grad()
    def integers(self, images: Float[Tensor, "batch channel height width"]) -> dict[str, UInt8[Tensor, "..."]]:
        """Return the integers that the kernel of each layer writes, by the layer's name; float logits are left out."""
        if self.settings.scheme != "hardware":
            raise ConfigError(f"integers: scheme {self.settings.scheme} has none; make the student in scheme hardware")
        quantizers, layers = {}, {node.name: node for node in self.module.graph.nodes}
        for layer, name in self.layer_names().items():
            if behind := [user for user in end_of_kernel(layers[layer]).users if user.op == "call_module"]:
                quantizers[name] = behind[0]
        _, values = with_outputs(self._exact[0], [node.name for node in quantizers.values()])(images)
        found = {}
        for (name, node), value in zip(quantizers.items(), values, strict=True):
            quantizer = self.module.get_submodule(str(node.target))
            assert isinstance(quantizer, LearnedStepFakeQuantize)
            found[name] = ((value / quantizer.scale).round() + quantizer.zero_point).to(torch.uint8)
        return found

    @property
    def steps(self) -> list[nn.Parameter]:
        """Logarithms of all learned quantizer steps."""
        return [each.log_scale for each in self.module.modules() if isinstance(each, LearnedStepFakeQuantize)]

    @property
    def weights(self) -> list[nn.Parameter]:
        """Every other parameter: weights, biases and batch norms that were not folded."""
        steps = {id(step) for step in self.steps}
        return [each for each in self.module.parameters() if id(each) not in steps]

    def weight_steps(self) -> list[tuple[nn.Parameter, Float[Tensor, "..."]]]:
        """Return each quantized parameter with its quantizer's present step, shaped to multiply it."""
        return [
            (weight, quantizer.scale.detach().clone())
            for weight, quantizer in _weight_quantizers(self.module)  # buffers among them, which are not trained
            if isinstance(weight, nn.Parameter) and isinstance(quantizer, LearnedStepFakeQuantize | MinMaxFakeQuantize)
        ]

    @torch.no_grad()
    def initialize_ranges_(self, batches: Iterable[Float[Tensor, "batch channel height width"]]) -> None:
        """Fit every quantizer to ``batches``, in the order of the graph, each behind its quantized predecessors.

        Learned steps are searched by squared error on the first batch (deviation D23); min-max ranges average over all
        batches (deviation D12).
        """
        with self._searching_ranges() as averaging:
            for batch in batches:
                self.module(batch)
                if not averaging:
                    break

    def initialize_layers_(
        self,
        images: Float[Tensor, "batch channel height width"],
        rng: torch.Generator,
        *,
        equalize: bool = True,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Fit every quantizer to ``images``, and round every layer's weight to suit its quantized inputs.

        For learned steps (scheme ``hardware``); see ``rounding.py`` (deviation D29). Channels are first scaled between
        layers where that helps (deviation D30), unless ``equalize`` is false. ``report`` is told how many layers are
        done, and how many there are.
        """
        with self._searching_ranges():
            scales = round_layers_(self.module, self.reference, images, rng, equalize=equalize, report=report)
        self.channel_scales = {name: scale.cpu() for name, scale in scales.items()}

    @contextmanager
    def _searching_ranges(self) -> Iterator[bool]:
        """Let quantizers fit their ranges to what they see; yields whether these are averages over all batches."""
        quantizers = [m for m in self.module.modules() if isinstance(m, FakeQuantize)]
        averaging = any(isinstance(quantizer, MinMaxFakeQuantize) for quantizer in quantizers)
        for quantizer in quantizers:
            quantizer.search_("minmax" if averaging else "mse")
        try:
            yield averaging
        finally:
            for quantizer in quantizers:
                quantizer.search_(None)


def _weight_quantizers(module: GraphModule) -> Iterator[tuple[Tensor, nn.Module]]:
    """Yield each quantized weight with its quantizer."""
    for node in module.graph.find_nodes(op="get_attr"):
        for user in node.users:
            if user.op == "call_module":
                yield tensor_of(module, node), module.get_submodule(str(user.target))


def _prepare(teacher: Teacher, settings: QuantizationSettings) -> GraphModule:
    hardware = settings.scheme == "hardware"
    # Norms that no layer can take in are written out, or torchao would fold them into layers that others read too.
    graph = unfold_batch_norms(fold_batch_norms(teacher.module) if hardware else teacher.module)
    unshare_biases_(graph)
    quantizer = HardwareQuantizer(settings) if hardware else PaperQuantizer(settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's own deprecations, nothing that a user can act on
        prepared = prepare_pt2e(graph, quantizer)
    if hardware:
        _quantize_parameters_late_(prepared)
        _link_biases_(prepared)
    for method in ("train", "eval"):  # torchao lets them raise, though they change nothing
        vars(prepared).pop(method, None)
    return _lay_out_(prepared.requires_grad_(True))


def _quantize_parameters_late_(prepared: GraphModule) -> None:
    """Let weight and bias be quantized right before their layer, so after the columns of the weight may be scaled."""
    for layer in [node for node in prepared.graph.nodes if node.target in WEIGHTED]:
        for parameter in [node for node in layer.all_input_nodes[1:] if node.op == "call_module"]:
            if len(parameter.users) == 1:
                layer.prepend(parameter)
    prepared.recompile()


def _link_biases_(prepared: GraphModule) -> None:
    """Let every bias quantizer follow those of its layer's input and weight, which run before it."""
    for layer in [node for node in prepared.graph.nodes if len(node.args) > 2]:
        activation, weight, bias = (quantizer_of(prepared, argument) for argument in layer.args[:3])
        if isinstance(bias, PerChannelBiasFakeQuantize):
            assert isinstance(activation, LearnedStepFakeQuantize)
            assert isinstance(weight, LearnedStepFakeQuantize)
            bias.follow_(activation, weight)


def _name_integers_(converted: GraphModule, layer: Node, name: str) -> None:
    """Call the integers of a layer's weight and bias after the layer, where torchao has numbered them."""
    for argument, kind in zip(layer.args[1:3], ("weight", "bias"), strict=False):
        frozen = argument.args[0] if isinstance(argument, Node) and argument.args else None
        if isinstance(frozen, Node) and frozen.op == "get_attr" and str(frozen.target).startswith("_frozen_param"):
            owner = converted
            for part in name.split("."):
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            value = tensor_of(converted, frozen)
            if hasattr(owner, kind):
                delattr(owner, kind)
            owner.register_buffer(kind, value)
            delattr(converted, str(frozen.target))
            frozen.target = f"{name}.{kind}"


def _lay_out_(module: GraphModule) -> GraphModule:
    """Bring weights into one layout in memory, which decides on kernels and so on the last bits."""
    to_channels_last_(module)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4 and tensor.shape[2:].numel() == 1:  # both layouts at once, by the strides of one
            tensor.data = tensor.data.reshape(-1).view(tensor.shape)
    return module
