"""Options for every layer, each with a cost and a loss -> one each, of the least loss within a limit on the cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float64, Int64

_TOLERANCE = 1e-12
"""What a bound may be off for the rounding of its sums, as a share of the loss of the cheapest options."""


@dataclass(frozen=True)
class Option:
    """One way to do one layer."""

    cost: int
    loss: float


def solve_knapsack(layers: Sequence[Sequence[Option]], limit: int) -> list[int]:
    """Return the index of the option of each layer for which the losses add up to the least within the limit.

    This is a multiple-choice knapsack, solved exactly: layer after layer every sum of costs and losses is kept that no
    other one beats in both (Nemhauser and Ullmann 1969), unless even the linear relaxation of what is left, whose
    solution is the lower convex hull of the options (Sinha and Zoltners 1979), could not bring it below a solution that
    is known.

    Args:
        layers: The options of each layer; costs are not negative.
        limit: What the costs may add up to.

    Raises:
        ValueError: the cheapest options cost more than the limit.
    """
    if not layers:
        return []
    if sum(min(option.cost for option in options) for options in layers) > limit:
        raise ValueError(f"the cheapest options cost more than {limit}")
    order = sorted(range(len(layers)), key=lambda layer: -_spread(layers[layer]))
    sorted_layers = [layers[layer] for layer in order]
    relaxation = _Relaxation(sorted_layers)
    least = relaxation.rounded_down(limit) + _TOLERANCE * abs(relaxation.loss)
    kept = [_States(np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int64), np.zeros(1, np.int64))]
    for depth, options in enumerate(sorted_layers):
        kept.append(_extend(kept[-1], options, _Relaxation(sorted_layers[depth + 1 :]), limit, least))
    chosen = [0] * len(layers)
    state = int(kept[-1].loss.argmin())
    for layer, states in zip(reversed(order), reversed(kept), strict=False):
        chosen[layer] = int(states.option[state])
        state = int(states.parent[state])
    return chosen


@dataclass(frozen=True)
class _States:
    """Sums over the layers so far, by rising cost and falling loss, and the choices that led to each."""

    cost: Int64[np.ndarray, " state"]
    loss: Float64[np.ndarray, " state"]
    parent: Int64[np.ndarray, " state"]
    option: Int64[np.ndarray, " state"]


def _extend(before: _States, options: Sequence[Option], rest: "_Relaxation", limit: int, least: float) -> _States:
    """Add one layer, and keep what may still become the best."""
    cost = (before.cost[:, None] + np.array([option.cost for option in options])).reshape(-1)
    loss = (before.loss[:, None] + np.array([option.loss for option in options])).reshape(-1)
    promising = loss + rest.bound(limit - cost) <= least
    found = np.flatnonzero(promising & (cost + rest.cost <= limit))
    found = found[np.lexsort((loss[found], cost[found]))]
    lowest_before = np.minimum.accumulate(np.concatenate([[np.inf], loss[found]]))[:-1]
    found = found[loss[found] < lowest_before]
    return _States(cost[found], loss[found], found // len(options), found % len(options))


class _Relaxation:
    """Layers whose options may be mixed: from the cheapest on, steps down the convex hulls, the steepest first."""

    def __init__(self, layers: Sequence[Sequence[Option]]) -> None:
        hulls = [_hull(options) for options in layers]
        self.cost = sum(hull[0].cost for hull in hulls)
        self.loss = sum(hull[0].loss for hull in hulls)
        steps = [
            ((before.loss - after.loss) / (after.cost - before.cost), layer, after.cost - before.cost, before, after)
            for layer, hull in enumerate(hulls)
            for before, after in pairwise(hull)
        ]
        self.steps = sorted(steps, key=lambda step: (-step[0], step[1], step[3].cost))
        self._costs = np.cumsum([self.cost, *(step[2] for step in self.steps)])
        self._losses = np.cumsum([self.loss, *(after.loss - before.loss for _, _, _, before, after in self.steps)])

    def bound(self, limit: Int64[np.ndarray, " state"]) -> Float64[np.ndarray, " state"]:
        """Return the least loss within each limit; no choice of whole options is below it."""
        bound: Float64[np.ndarray, " state"] = np.interp(limit, self._costs, self._losses)
        return bound

    def rounded_down(self, limit: int) -> float:
        """Return the loss of a choice of whole options within the limit: of every layer the steps that fit."""
        cost, loss, closed = self.cost, self.loss, set()
        for _, layer, more, before, after in self.steps:
            if layer not in closed and cost + more <= limit:
                cost, loss = cost + more, loss + after.loss - before.loss
            else:
                closed.add(layer)
        return loss


def _hull(options: Sequence[Option]) -> list[Option]:
    """Return the options on the lower convex hull, from the cheapest down to the one of the least loss."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.cost, option.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _is_above(hull[-1], hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _is_above(middle: Option, left: Option, right: Option) -> bool:
    """Whether ``middle`` lies on or above the line from ``left`` to ``right``."""
    return (left.loss - middle.loss) * (right.cost - left.cost) <= (left.loss - right.loss) * (middle.cost - left.cost)


def _spread(options: Sequence[Option]) -> int:
    costs = [option.cost for option in options]
    return max(costs) - min(costs)
