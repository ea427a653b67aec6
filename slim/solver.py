"""From scores to a plan: the lowest channels go first until the target is met, within floors and rounding.

Costs come from widths: a layer's MACs are the elements of its weight times its output positions, and every axis of a weight
is as long as the kept channels that occupy it, so nothing is cut or run while solving.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from slim.errors import SlimError
from slim.graph import ChannelGraph, ChannelGroup
from slim.plan import GroupPlan, Plan

Widths = list[int]


class WidthCosts:
    """Parameters and MACs of a graph as functions of how many channels each of some groups keeps."""

    def __init__(self, graph: ChannelGraph, groups: list[ChannelGroup]) -> None:
        self.sizes = [g.size for g in groups]
        axes: dict[str, dict[int, list[tuple[int, int]]]] = {}
        for number, group in enumerate(groups):
            # The same axis can appear in two roles (a layer that feeds itself); each position counts once.
            seen: set[tuple[str, int]] = set()
            for m in group.members:
                if m.param in graph.shapes and (m.param, m.axis) not in seen:
                    seen.add((m.param, m.axis))
                    axes.setdefault(m.param, {}).setdefault(m.axis, []).append((number, len(m.index) // group.size))
        self.axes = axes
        self.shapes = graph.shapes
        self.positions: dict[str, int] = {}
        for layer in graph.layers:
            self.positions[layer.weight] = self.positions.get(layer.weight, 0) + layer.positions
        self.fixed_params = sum(prod(s) for n, s in graph.shapes.items() if n not in axes)
        self.fixed_macs = graph.macs - sum(prod(graph.shapes[n]) * self.positions.get(n, 0) for n in axes)

    def numel(self, param: str, widths: Widths) -> int:
        """Elements of a parameter when group i keeps widths[i] channels."""
        shape = list(self.shapes[param])
        for axis, parts in self.axes[param].items():
            shape[axis] -= sum((self.sizes[n] - widths[n]) * each for n, each in parts)
        return prod(shape)

    def params(self, widths: Widths) -> int:
        return self.fixed_params + sum(self.numel(p, widths) for p in self.axes)

    def macs(self, widths: Widths) -> int:
        return self.fixed_macs + sum(
            self.numel(p, widths) * self.positions[p] for p in self.axes if p in self.positions
        )

    def channels(self, widths: Widths) -> int:
        return sum(widths)


@dataclass(frozen=True)
class Target:
    """What must come down to ``keep`` of what it was."""

    kind: Literal["macs", "params", "channels"]
    keep: float

    @staticmethod
    def of(macs: float | None, params: float | None, channels: float | None) -> Target:
        given = [(k, v) for k, v in (("macs", macs), ("params", params), ("channels", channels)) if v is not None]
        if len(given) != 1:
            raise SlimError("give exactly one target: macs=, params= or channels=, a keep ratio above 0 and at most 1")
        kind, keep = given[0]
        if not 0 < keep <= 1:
            raise SlimError(f"{kind}={keep}: expected a keep ratio above 0 and at most 1 (0.4 keeps 40 %)")
        return Target(kind, keep)  # type: ignore[arg-type]


def make_plan(
    graph: ChannelGraph,
    scores: Mapping[str, Tensor],
    *,
    macs: float | None = None,
    params: float | None = None,
    channels: float | None = None,
    round_to: int = 8,
    min_channels: int = 8,
    scope: Literal["global", "local"] = "global",
) -> Plan:
    """The plan that keeps the given ratio of MACs, parameters or channels of the traced model, at most.

    ``scope="global"`` ranks all channels against each other, ``"local"`` keeps the same ratio of every group. Of channels
    with equal scores, those go first that stand lowest in their own group, so that ties are spread over the groups. Every
    group keeps at least ``min_channels``, and a multiple of ``round_to``, or all of its channels. Groups without scores
    stay whole. SlimError when the target cannot be reached, with how far it can go and the floors that bind.
    """
    target = Target.of(macs, params, channels)
    if round_to < 1 or min_channels < 1:
        raise SlimError(f"round_to={round_to}, min_channels={min_channels}: expected at least 1")
    if scope not in ("global", "local"):
        raise SlimError(f"scope is {scope!r}; expected 'global' or 'local'")
    groups = scored_groups(graph, scores)
    costs = WidthCosts(graph, groups)
    floors = [rounded(0, g.size, round_to, min_channels) for g in groups]
    measure: Callable[[Widths], int] = getattr(costs, target.kind)
    sizes = [g.size for g in groups]
    budget = target.keep * measure(sizes)
    if measure(floors) > budget:
        raise SlimError(unreachable(target, groups, floors, measure))
    rank = ranking(groups, scores)
    rungs, raw_widths = local_ladder(sizes) if scope == "local" else global_ladder(rank, sizes)

    def widths_at(rung: int) -> Widths:
        return [rounded(w, s, round_to, min_channels) for w, s in zip(raw_widths(rung), sizes, strict=True)]

    widths = widths_at(bisect_left(range(rungs), True, key=lambda rung: measure(widths_at(rung)) <= budget))
    if scope == "global":
        widths = give_back(widths, rank, sizes, round_to, measure, budget)
    chosen = [keep_best(g, scores[g.name], w) for g, w in zip(groups, widths, strict=True)]
    return Plan(tuple(chosen), (graph.macs, costs.macs(widths)), (graph.params, costs.params(widths)))


def scored_groups(graph: ChannelGraph, scores: Mapping[str, Tensor]) -> list[ChannelGroup]:
    """The prunable groups that have scores, in the graph's order."""
    for name, values in scores.items():
        group = graph.by_name.get(name)
        if group is None:
            raise SlimError(f"scores name group {name}, which the graph does not have; trace the model again")
        if tuple(values.shape) != (group.size,):
            raise SlimError(f"scores of group {name} have shape {tuple(values.shape)}; expected ({group.size},)")
        if bool(torch.isnan(values).any()):
            raise SlimError(f"scores of group {name} hold NaN; was the training finite?")
    return [g for g in graph.groups if g.prunable and g.name in scores]


def rounded(width: int, size: int, round_to: int, min_channels: int) -> int:
    """The nearest allowed width: a multiple of ``round_to`` not below the floor, or the whole group."""
    floor = -(-min_channels // round_to) * round_to
    return min(size, max(floor, (2 * width + round_to) // (2 * round_to) * round_to))


def ranking(groups: list[ChannelGroup], scores: Mapping[str, Tensor]) -> list[int]:
    """The group of each channel, lowest channel first."""
    rows: list[tuple[float, float, int]] = []
    for number, group in enumerate(groups):
        ordered = sorted(scores[group.name].tolist())
        rows += [(value, place / group.size, number) for place, value in enumerate(ordered)]
    return [number for _, _, number in sorted(rows)]


Ladder = tuple[int, Callable[[int], Widths]]
"""A number of rungs, and each rung's widths; they only fall, so costs do too and bisection finds the target."""


def global_ladder(rank: list[int], sizes: list[int]) -> Ladder:
    """Widths after removing the lowest 0, 1, 2, ... channels of all."""

    def widths(rung: int) -> Widths:
        removed = Counter(rank[:rung])
        return [size - removed[number] for number, size in enumerate(sizes)]

    return len(rank), widths


def local_ladder(sizes: list[int], steps: int = 1000) -> Ladder:
    """Widths when every group keeps the same ratio, from 1 down to 0."""
    return steps, lambda rung: [round(size * (steps - rung) / steps) for size in sizes]


def give_back(
    widths: Widths, rank: list[int], sizes: list[int], round_to: int, measure: Callable[[Widths], int], budget: float
) -> Widths:
    """Spend what rounding left of the budget: widen groups again, those whose next channel ranks highest first."""
    place = {number: [p for p, n in enumerate(rank) if n == number] for number in set(rank)}
    widths = list(widths)
    candidates = {n for n in place if widths[n] < sizes[n]}
    while candidates:
        # place[n] ascends: with w kept, the best removed channel is the one at index size - w - 1.
        best = max(candidates, key=lambda n: place[n][sizes[n] - widths[n] - 1])
        wider = list(widths)
        wider[best] = min(sizes[best], (widths[best] // round_to + 1) * round_to)
        if measure(wider) <= budget:
            widths = wider
        else:
            candidates.discard(best)
        if widths[best] == sizes[best]:
            candidates.discard(best)
    return widths


def keep_best(group: ChannelGroup, values: Tensor, width: int) -> GroupPlan:
    """The ``width`` channels with the highest scores; of equals the ones of lower index."""
    order = torch.sort(values.double(), descending=True, stable=True).indices[:width]
    keep = tuple(sorted(order.tolist()))
    return GroupPlan(group.name, group.size, keep, group.members, (float(values.min()), float(values.max())))


def unreachable(target: Target, groups: list[ChannelGroup], floors: Widths, measure: Callable[[Widths], int]) -> str:
    """The message for a target below what the floors allow: how far it goes, and the floors that cost most."""
    sizes = [g.size for g in groups]
    lowest, whole = measure(floors), measure(sizes)
    gains = []
    for n, group in enumerate(groups):
        without = [*floors[:n], 0, *floors[n + 1 :]]
        gains.append((lowest - measure(without), group.name, floors[n]))
    binding = ", ".join(f"{name} ({floor} channels)" for _, name, floor in sorted(gains, reverse=True)[:5])
    frozen = "" if gains else "; no group can be pruned"
    return (
        f"{target.kind}={target.keep:g} cannot be reached: with every group at its floor {lowest / whole:.3f} remains; "
        f"the floors that bind most: {binding or 'none'}{frozen}; lower min_channels or round_to, or raise the target"
    )
