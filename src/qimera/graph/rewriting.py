"""How an operation of a graph is read by the names of its arguments, and put in the place of another."""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node


def argument(node: Node, name: str) -> Any:
    """Return the argument of an operation by the name that its schema has for it, given or not."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    for index, each in enumerate(target._schema.arguments):
        if each.name == name:
            if index < len(node.args):
                return node.args[index]
            return node.kwargs.get(name, each.default_value)
    raise KeyError(name)


def arguments(node: Node) -> list[Any]:
    """Return all arguments of an operation in the order of its schema."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return [argument(node, each.name) for each in node.target._schema.arguments]


def replace(node: Node, target: Callable[..., object], *args: Any) -> Node:
    """Put a call of ``target`` in the place of ``node``."""
    new = node.graph.call_function(target, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return new


def called(place: Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """Return a new call of ``target`` before ``place``."""
    new: Node = place.graph.call_function(target, args, kwargs)
    of_values = [each.meta["val"] if isinstance(each, Node) else each for each in args]
    new.meta["val"] = target(*of_values, **kwargs)
    return new
