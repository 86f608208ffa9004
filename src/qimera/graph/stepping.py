"""One pass through a graph that halts at any node, and can go on from there in more than one way."""

from jaxtyping import Float
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node


class SteppedRun:
    """One pass through a graph that can be halted at every node, and drops values that nothing needs any more."""

    def __init__(self, module: GraphModule, images: Float[Tensor, "batch channel height width"]) -> None:
        self._module, self._images = module, images
        self._interpreter = Interpreter(module)
        self._interpreter.args_iter = iter([images])
        self._ahead = list(reversed(module.graph.nodes))
        self._names = {node.name: node for node in module.graph.nodes}

    def value(self, name: str) -> Tensor:
        """Return what the node called ``name`` was computed to be."""
        found = self._interpreter.env[self._names[name]]
        assert isinstance(found, Tensor)
        return found

    def can_set(self, name: str) -> bool:
        """Return whether nothing that is computed already has read the node called ``name``."""
        node = self._names[name]
        return node in self._ahead or (bool(self._ahead) and node.next is self._ahead[-1])

    def set_(self, name: str, value: Tensor) -> None:
        """Go on as if the node called ``name``, which was computed last, had been ``value``."""
        self._interpreter.env[self._names[name]] = value

    def put(self, value: Tensor) -> None:
        """Take ``value`` for what the node that comes next computes, and go past it."""
        self._step(value)

    def branch(self) -> "SteppedRun":
        """Return a pass that stands where this one does, and goes on without it."""
        other = SteppedRun(self._module, self._images)
        other._interpreter.env, other._ahead = dict(self._interpreter.env), list(self._ahead)
        return other

    def finish(self) -> object:
        """Compute the rest, and return what the graph returns."""
        while len(self._ahead) > 1:
            self._step()
        return self._interpreter.run_node(self._ahead[0])

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

    def _step(self, value: Tensor | None = None) -> None:
        node = self._ahead.pop()
        self._interpreter.env[node] = self._interpreter.run_node(node) if value is None else value
        for unneeded in self._interpreter.user_to_last_uses.get(node, []):
            self._interpreter.env.pop(unneeded, None)
