"""Whether a graph computes what the network computes that it was captured from."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from qimera.config.input_spec import InputSpec
from qimera.errors import UnsupportedModelError
from qimera.graph.folding import fold_batch_norms
from qimera.graph.nodes import copied, logits_node

TOLERANCE = 1e-4
"""Largest difference of two logits that is rounding, as a share of the largest logit."""

_NARROW_TOLERANCE = 0.05
"""The same where the network itself computes a part in bfloat16 or float16."""


@dataclass(frozen=True)
class Answers:
    """A network, images, and the logits that it returned for them."""

    network: nn.Module
    images: Float[Tensor, "batch channel height width"]
    logits: Float[Tensor, "batch num_classes"]


@torch.no_grad()
def check_answers(model: nn.Module, input_spec: InputSpec, name: str) -> Answers:
    """Return the logits of ``model`` for random and for smooth images.

    Raises:
        UnsupportedModelError: they are not finite, or differ when it is asked again, or beside other images.
    """
    rng = torch.Generator().manual_seed(0)
    rough = torch.randn(2, *input_spec.shape, generator=rng)
    coarse = torch.randn(2, input_spec.shape[0], 4, 4, generator=rng)
    images = torch.cat([rough, F.interpolate(coarse, input_spec.shape[1:], mode="bilinear")])
    logits = model(images.clone())  # some networks normalise images in place
    if not bool(logits.isfinite().all()):
        raise UnsupportedModelError(f"{name} returns NaN or infinite logits for random images; give trained weights")
    if not _agree(model(images.clone()), logits):
        raise UnsupportedModelError(
            f"{name} answers differently when it is asked again for the same images; remove what is random in "
            "evaluation mode, such as F.dropout without training=self.training"
        )
    if not _agree(model(images[1:3].clone()), logits[1:3]):
        raise UnsupportedModelError(
            f"{name} answers differently for an image when other images are in the batch; let no layer use the "
            "statistics of the batch in evaluation mode"
        )
    return Answers(model, images, logits)


@torch.no_grad()
def check_graph(module: GraphModule, expected: Answers, *, is_narrow: bool = False) -> bool:
    """Return whether ``module`` gives the logits of the network.

    Args:
        module: Graph that was captured from it.
        expected: From ``check_answers``.
        is_narrow: The network computes a part in bfloat16 or float16, and the graph does not.

    Raises:
        UnsupportedModelError: folding its batch norms changes the logits; the message names the first such node.
    """
    logits = module(expected.images)
    folded = fold_batch_norms(module)
    if not _agree(folded(expected.images), logits) and not _folds_in_float64(module, expected.images):
        node = _first_difference(folded, module, expected.images)
        raise UnsupportedModelError(
            f"{node} changes when batch norms are folded into the layers before them; please report this network"
        )
    if _agree(logits, expected.logits, _NARROW_TOLERANCE if is_narrow else TOLERANCE):
        return True
    return _agree_in_float64(module, expected.network, expected.images)


def raise_for_another_graph(module: GraphModule, exported: GraphModule, expected: Answers, name: str) -> None:
    """Raise UnsupportedModelError for a graph that does not give the logits of the network it was captured from.

    Args:
        module: The graph after simplification.
        exported: The graph as it was exported.
        expected: From ``check_answers``.
        name: What messages call the network.
    """
    with torch.no_grad():
        difference = (module(expected.images) - expected.logits).abs().max() / _largest(expected.logits)
        node = _first_difference(module, exported, expected.images)
    raise UnsupportedModelError(
        f"the graph captured from {name} gives other logits than {name} itself (by {float(difference):.1%} of the "
        f"largest); the first value that differs is {node}. Look there for operations that write into their argument, "
        "or whose result depends on more than the image"
    )


def _folds_in_float64(module: GraphModule, images: Tensor) -> bool:
    """Return whether folding changes no logits where next to nothing is rounded, the folded weights neither."""
    try:
        precise = copied(module).double()
        return _agree(fold_batch_norms(precise)(images.double()), precise(images.double()))
    except Exception:  # of networks that fix a type of their own
        return False


def _agree_in_float64(module: nn.Module, other: nn.Module, images: Tensor) -> bool:
    """Return whether both give the same logits where next to nothing is rounded.

    Untrained networks can make large differences of rounding errors.
    """
    try:
        first, second = (copied(each).double()(images.double()) for each in (module, other))
    except Exception:  # of networks that fix a type of their own
        return False
    return _agree(first, second)


def _agree(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> bool:
    return bool(((actual - expected).abs().max() <= tolerance * _largest(expected)).item())


def _largest(values: Tensor) -> Tensor:
    return values.abs().max().clamp(min=1e-12)


def _first_difference(module: GraphModule, reference: GraphModule, images: Tensor) -> str:
    """Return the name of the first node whose value is another than that of the node of this name in ``reference``."""
    expected = _Values(reference).of(images)
    for name, value in _Values(module).of(images).items():
        other = expected.get(name)
        if other is not None and (value.shape != other.shape or not _agree(value, other)):
            return name
    return f"{logits_node(module).name}, as far as can be told"


class _Values(fx.Interpreter):
    """Keeps what every node of a graph computes."""

    def of(self, images: Tensor) -> dict[str, Tensor]:
        self.kept: dict[str, Tensor] = {}
        self.run(images.clone())
        return self.kept

    def run_node(self, n: Node) -> object:
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.is_floating_point():
            self.kept[n.name] = result.clone()
        return result
