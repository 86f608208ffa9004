"""A graph -> what each of its nodes returns, by type and shape, for a batch of any size."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext


def propagate_shapes_(module: GraphModule, image_shape: tuple[int, ...]) -> None:
    """Write into ``meta["val"]`` of every node what it returns for a batch of any size; nothing is computed."""
    environment = ShapeEnv()
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=environment)
    sizes = [DimDynamic.DYNAMIC, *(DimDynamic.STATIC for _ in image_shape)]
    # of a size that equals no other by chance: what is true of it must be true of any batch
    images = torch.empty(13, *image_shape, device=_device_of(module))
    fake = mode.from_tensor(images, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
    with mode, torch.no_grad():
        _Shapes(module, mode).run(fake)


def _device_of(module: nn.Module) -> torch.device:
    return next((each.device for each in (*module.parameters(), *module.buffers())), torch.device("cpu"))


class _Shapes(fx.Interpreter):
    def __init__(self, module: GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module)
        self._mode = mode

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and n.op == "get_attr":
            result = self._mode.from_tensor(result, static_shapes=True)
        n.meta["val"] = result
        return result
