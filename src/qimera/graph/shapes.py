"""A graph -> what each of its nodes returns, by type and shape, for a batch of any size."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from qimera.errors import ConfigError
from qimera.graph.nodes import BATCH_NORM, aten


def propagate_shapes_(module: GraphModule, image_shape: tuple[int, ...]) -> None:
    """Write into ``meta["val"]`` of every node what it returns for a batch of any size; nothing is computed."""
    environment = ShapeEnv()
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=environment)
    sizes = [DimDynamic.DYNAMIC, *(DimDynamic.STATIC for _ in image_shape)]
    # of a size that equals no other by chance: what is true of it must be true of any batch
    images = torch.empty(13, *image_shape, device=_device_of(module))
    fake = mode.from_tensor(images, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
    with mode, enable_python_dispatcher(), torch.no_grad():  # some kernels, such as addcmul's, take no symbols
        _Shapes(module, mode).run(fake)


def _device_of(module: nn.Module) -> torch.device:
    return next((each.device for each in (*module.parameters(), *module.buffers())), torch.device("cpu"))


class _Shapes(fx.Interpreter):
    def __init__(self, module: GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module)
        self._mode = mode

    def run_node(self, n: Node) -> Any:
        if n.target is torch.ops.aten._native_batch_norm_legit_no_training.default:
            self._check_statistics(n)
        result = self._same_as_entering(n)
        if result is None:
            result = super().run_node(n)
        number = result.node.hint if isinstance(result, torch.SymInt) else result
        if isinstance(number, int) and abs(number) >= 1 << 63:  # squared again and again, it would fill the memory
            raise ConfigError(f"computes a size of {number.bit_length()} bits at {n.name}")
        if isinstance(result, Tensor) and n.op == "get_attr":
            result = self._mode.from_tensor(result, static_shapes=True)
        n.meta["val"] = result
        return result

    def _same_as_entering(self, n: Node) -> Tensor | None:
        """Return a tensor like the one that enters a ReLU or a batch norm; None for all else, and where they misfit.

        PyTorch composes each of a dozen operations, which takes most of the time of a whole graph.
        """
        is_norm = n.target is BATCH_NORM and [type(each) for each in n.args[5:]] == [bool, float, float, bool]
        if n.kwargs or not (is_norm or n.target is aten.relu.default):
            return None
        entering, *others = (self.env[each] for each in n.args[:5] if isinstance(each, Node))
        if not isinstance(entering, Tensor) or not entering.is_floating_point():
            return None
        fits = (
            isinstance(each, Tensor) and each.dtype == entering.dtype and tuple(each.shape) == (entering.shape[1],)
            for each in others
        )
        return torch.empty_like(entering) if all(fits) else None

    def _check_statistics(self, n: Node) -> None:
        """Refuse numbers per channel that are too few: the kernel reads as many as there are channels, unchecked."""
        images, *others = (self.env[each] for each in n.all_input_nodes)
        if any(isinstance(each, Tensor) and tuple(each.shape) != (images.shape[1],) for each in others):
            raise ConfigError(f"gives {n.name} other than one number for each of {images.shape[1]} channels")
