"""A user's network -> its graph: unwrapped, copied, exported, simplified, and checked against the network itself."""

import copy
import inspect
import io
import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import FakeQuantizeBase, ObserverBase
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.optim.swa_utils import AveragedModel

from qimera.config.input_spec import InputSpec
from qimera.errors import ConfigError, UnsupportedModelError, first_line
from qimera.graph.files import is_tensor_name, rebuilt, unsupported_operation
from qimera.graph.nodes import BATCH_NORM, aten, logits_node, node_at, to_channels_last_
from qimera.graph.operations import operation_name
from qimera.graph.shapes import propagate_shapes_
from qimera.graph.simplification import inline_regions_, simplify_, writes_what_is_read_again
from qimera.teacher.logits import choose_logits
from qimera.teacher.self_check import check_answers, check_graph, raise_for_another_graph

logger = logging.getLogger(__name__)

_TORCH = Path(torch.__file__).parent

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
_SOFTMAXES = {aten.softmax.int, aten.log_softmax.int}
_RANDOM = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}


def capture(model: nn.Module, input_spec: InputSpec, logits: str) -> GraphModule:
    """Return the graph of ``model`` in evaluation mode and float32, for batches of any size; the model is left alone.

    Args:
        model: A trained classifier, on any device and of any floating-point type.
        input_spec: What its images look like.
        logits: Which of several outputs the logits are; found if empty.

    Raises:
        ConfigError: the model refuses images of ``input_spec.shape``, or has no output ``logits``.
        UnsupportedModelError: it cannot be copied or exported, returns no logits or several, holds NaN, infinite
            values or negative variances, uses an operation that qimera does not know, or answers differently when it
            is asked again.
    """
    name = type(unwrapped(model)).__name__
    model = _private_copy(unwrapped(model), name)
    _refuse_unusual_names(model)
    _refuse_broken_numbers(model)
    images = torch.zeros(2, *input_spec.shape)
    _return_logits_alone_(model, images, logits, name)
    program = _exported(model, images, name)
    module, is_narrow = _graph_of(program)
    if writes_what_is_read_again(module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # from torch, whose programs hold what it deprecates
            program = program.run_decompositions({})
        module, is_narrow = _graph_of(program)
    _refuse_training_mode(module, name)
    simplify_(module)
    _refuse_unknown_operations(module)
    module = rebuilt(module)
    propagate_shapes_(module, input_spec.shape)
    to_channels_last_(module)
    expected = check_answers(model, input_spec, name)
    if not check_graph(module, expected, is_narrow=is_narrow):
        raise_for_another_graph(module, _graph_of(program)[0], expected, name)
    return _without_softmax(module, name)


# --- the model --------------------------------------------------------------------------------------------------------


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network itself, where ``model`` is one of PyTorch's own wrappers around it.

    Raises:
        UnsupportedModelError: it is a TorchScript program, or prepared for quantization-aware training.
    """
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # of torch.compile
            model = model._orig_mod  # type: ignore[assignment]
        else:
            break
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            "the model is a TorchScript program, whose operations cannot be captured; give the nn.Module that it was "
            "made from, with its weights"
        )
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantizeBase | ObserverBase) or _is_of_quantization(type(module)):
            raise UnsupportedModelError(
                f"{name or type(model).__name__} ({type(module).__name__}) quantizes already; give the network in "
                "floating point, as it was before quantization-aware training or conversion"
            )
    return model


def _is_of_quantization(kind: type) -> bool:
    return kind.__module__.startswith(("torch.ao.nn.", "torch.nn.quantized", "torchao.quantization"))


def _private_copy(model: nn.Module, name: str) -> nn.Module:
    """Return a copy in evaluation mode and float32 on the CPU that records no gradients."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in _tensors_in(vars(module)):
            if tensor.grad_fn is not None:  # copy.deepcopy refuses what was computed with gradients recorded
                memo[id(tensor)] = tensor.detach().clone()
    try:
        model = copy.deepcopy(model, memo).to("cpu").requires_grad_(False)
    except Exception as error:
        raise UnsupportedModelError(
            f"{name} cannot be copied ({first_line(error)}); let copy.deepcopy(model) work, or build the network anew "
            "and load its state_dict"
        ) from error
    model.eval()  # which returns nothing where the network's own train() does not
    narrow = {str(each.dtype) for each in model.state_dict().values() if _is_of_another_width(each)}
    if narrow:
        logger.info("%s holds %s; it is computed in float32", name, ", ".join(sorted(narrow)))
        model = model.float()
    return model


def _is_of_another_width(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float32


def _tensors_in(value: object, depth: int = 4) -> Iterator[Tensor]:
    """Yield the tensors in dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple | set) and depth:
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(each, depth - 1)


def _refuse_unusual_names(model: nn.Module) -> None:
    """Raise UnsupportedModelError for names that generated code and stored networks cannot have."""
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        if not is_tensor_name(name):
            raise UnsupportedModelError(
                f"{name}: names of layers and tensors must be in ASCII, and no keyword of Python; rename this one, in "
                "the weights too"
            )


def _refuse_broken_numbers(model: nn.Module) -> None:
    """Raise UnsupportedModelError for values that no trained network has.

    Buffers may hold minus infinity, as masks of attention do; statistics may not.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):  # extra state may be anything
            continue
        may_hide = name not in parameters and not name.endswith(("running_mean", "running_var"))
        is_broken = ~value.isfinite() & ~(may_hide & value.isneginf()) if value.is_floating_point() else None
        if is_broken is not None and bool(is_broken.any()):
            count = int(is_broken.sum())
            raise UnsupportedModelError(
                f"{name}: {count} of {value.numel()} values are NaN or infinite; the training diverged, or the file is "
                "damaged: give an earlier checkpoint"
            )
        if name.endswith("running_var") and bool((value < 0).any()):
            raise UnsupportedModelError(
                f"{name}: {int((value < 0).sum())} of {value.numel()} variances are negative; the file is damaged, or "
                "the values are of something else: save the weights again"
            )


def _return_logits_alone_(model: nn.Module, images: Tensor, wanted: str, name: str) -> None:
    """Let ``model`` return (batch, num_classes) where it returns more, or positions of size one behind the classes."""
    try:
        with torch.no_grad():
            output = model(images)
    except Exception as error:
        raise ConfigError(
            f"input_shape {tuple(images.shape[1:])}: {name} cannot process such images: {first_line(error)}"
        ) from error
    place = choose_logits(output, len(images), wanted, name)
    if place.path or place.is_map:
        model.register_forward_hook(lambda _module, _images, returned: place.logits_of(returned))


# --- the graph --------------------------------------------------------------------------------------------------------


def _exported(model: nn.Module, images: Tensor, name: str) -> ExportedProgram:
    first = next(iter(inspect.signature(model.forward).parameters.values()), None)
    takes_any = first is not None and first.kind is inspect.Parameter.VAR_POSITIONAL
    batch = {0: Dim.DYNAMIC}
    try:
        with _without_notes_to_developers():
            return torch.export.export(model, (images,), dynamic_shapes=((batch,),) if takes_any else (batch,))
    except Exception as error:
        for path, module in model.named_modules():
            if type(module).__module__.startswith("torchvision.transforms"):
                raise UnsupportedModelError(
                    f"{name} prepares images itself ({path}, {type(module).__name__} of torchvision.transforms), which "
                    "torch.export cannot capture; take it out, and give its mean and std as those of the images"
                ) from error
        reason = first_line(error)
        if isinstance(error, GuardOnDataDependentSymNode):
            reason = "what it computes next depends on the values of a tensor"
        raise UnsupportedModelError(
            f"{name} cannot be captured by torch.export: {reason}{_place_of(error)}; "
            "remove data-dependent control flow and operations that fix the batch size, such as len(x) for x.shape[0]"
        ) from error


@contextmanager
def _without_notes_to_developers() -> Iterator[None]:
    """Keep back what torch warns of and prints while it exports, such as whole graphs before an error."""
    log = logging.getLogger("torch")
    level, said = log.level, io.StringIO()
    try:
        with warnings.catch_warnings(), redirect_stderr(said):
            warnings.simplefilter("ignore")  # such as of attributes that are assigned anew in every call
            log.setLevel(logging.ERROR)
            yield
    finally:
        log.setLevel(level)
        if said.getvalue().strip():
            logger.debug("torch.export: %s", said.getvalue().strip())


def _place_of(error: Exception) -> str:
    """Return the last line outside of torch that led to ``error``; empty if there is none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.line]
    own = [frame for frame in frames if not Path(frame.filename).is_relative_to(_TORCH) and frame.name == "forward"]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno}: {own[-1].line})" if own else ""


def _graph_of(program: ExportedProgram) -> tuple[GraphModule, bool]:
    """Return the graph as it was exported, and whether a part of it asked for a lower precision on the CPU."""
    exported = program.module(check_guards=False)
    assert isinstance(exported, GraphModule)
    is_narrow = inline_regions_(exported)
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(exported.graph, mapping)
    graph.output(mapping[logits_node(exported)])
    return GraphModule(exported, graph).requires_grad_(False), is_narrow  # without the program's own checks of inputs


def _refuse_training_mode(module: GraphModule, name: str) -> None:
    """Raise UnsupportedModelError for a graph that computes as in training; models are in evaluation mode here."""
    for node in module.graph.nodes:
        if node.target is BATCH_NORM and node.args[5] and node.args[3] is not None:
            raise UnsupportedModelError(
                f"{node.name} of {name} normalises by the statistics of the batch, as in training; call model.eval() "
                "before torch.export.export, and do not force training mode"
            )
        if node.target in _RANDOM and node.args[2]:
            raise UnsupportedModelError(
                f"{node.name} of {name} drops values at random in every call; pass training=self.training to "
                "F.dropout, or call model.eval() before torch.export.export"
            )


def _refuse_unknown_operations(module: GraphModule) -> None:
    for node in module.graph.nodes:
        if node.op == "call_function" and operation_name(node.target) is None:
            raise UnsupportedModelError(unsupported_operation(node))


def _without_softmax(module: GraphModule, name: str) -> GraphModule:
    """Take off a softmax at the end: its input is the logits."""
    logits = logits_node(module)
    while logits.target in _SOFTMAXES and logits.args[1] in (1, -1):
        entering = node_at(logits, 0)
        logger.warning(
            "%s returns probabilities (%s); what enters its softmax is taken for the logits", name, logits.name
        )
        logits.replace_all_uses_with(entering)
        module.graph.erase_node(logits)
        logits = entering
    module.recompile()
    return module
