"""From scores to a plan: the lowest channels go first until the target is met, within floors and rounding."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from math import inf
from typing import Literal

import torch
from torch import Tensor

from slim.errors import SlimError
from slim.graph import ChannelGraph, ChannelGroup
from slim.plan import GroupPlan, Plan
from slim.targets import Room, Rounding, Target, WidthCosts, Widths, rooms_of, unreachable

Scope = Literal["global", "local", "isomorphic"]
SCOPES = ("global", "local", "isomorphic")


def make_plan(
    graph: ChannelGraph,
    scores: Mapping[str, Tensor],
    *,
    macs: float | None = None,
    params: float | None = None,
    channels: float | None = None,
    threshold: float | None = None,
    round_to: int = 8,
    min_channels: int = 8,
    min_keep: float = 0.0,
    scope: Scope = "global",
    cost_aware: bool = False,
    overrides: Mapping[str, float] | None = None,
    ignore: Sequence[str] = (),
) -> Plan:
    """The plan that keeps at most the given MACs, parameters or channels of the traced model.

    Exactly one target. ``macs``, ``params``, ``channels`` (of the groups with scores): a keep ratio up to 1, or a whole
    number above 1 to keep. ``threshold``: every channel with a score below it goes and nothing at or above it, in any scope.

    ``scope``: ``"global"`` ranks all channels against each other; ``"local"`` keeps the same ratio of every group;
    ``"isomorphic"`` ranks channels within classes of groups of like structure, of which each keeps the same ratio (Fang et
    al., "Isomorphic Pruning for Vision Models", ECCV 2024). ``cost_aware`` ranks by score per MAC or parameter that one
    channel of the full network saves: the greedy answer to the knapsack that Shen et al. pose for latency ("Structural
    Pruning via Latency-Saliency Knapsack", NeurIPS 2022). Of equal channels, those go first that stand lowest in their own
    group, so that ties are spread over the groups.

    Channels are counted at the producing layer: where one channel of a group stands for several that go together, all
    count. Every layer that produces a group's channels keeps at least ``min_channels`` and a multiple of ``round_to``, and
    the group at least the share ``min_keep``, or all of its channels. Widths go to the nearest such multiple (a threshold's
    to the next); what this leaves of the budget widens groups again: of the class that keeps the lowest ratio, the group
    whose next channel ranks highest, while the budget lasts.

    ``overrides``: {pattern of a group's or producing layer's name: keep ratio (float) or channels (int)}; the first that
    matches sets the group's exact width, past rounding, floors and ranking. ``ignore``: patterns of groups that stay whole,
    before all else, as do groups without scores.

    SlimError for options out of range, patterns that match nothing, scores that do not fit the graph, and a target that
    cannot be reached, with how far it can go and what binds.
    """
    target = Target.of(macs=macs, params=params, channels=channels, threshold=threshold)
    if scope not in SCOPES:
        raise SlimError(f"scope is {scope!r}; expected one of {', '.join(map(repr, SCOPES))}")
    if cost_aware and target.kind not in ("macs", "params"):
        raise SlimError(f"cost_aware=True needs macs= or params=: {target.kind} has no cost to divide by")
    rounding = Rounding(round_to, min_channels, min_keep)
    patterns = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    rooms = rooms_of(graph, checked_scores(graph, scores), rounding, overrides or {}, patterns)
    costs = WidthCosts(graph, rooms)
    values = {n: flat(scores[room.group.name]) for n, room in enumerate(rooms) if room.ranked}
    if target.kind == "threshold":
        widths = [r.at_least(above(scores[r.group.name], target)) if r.ranked else r.floor for r in rooms]
    else:
        if cost_aware:
            values = {n: per_unit_saved(v, n, rooms[n], costs, target) for n, v in values.items()}
        widths = solve(target, rooms, costs, Ranking(values, classes_of(graph, list(values), scope)))
    return assemble(graph, scores, rooms, costs, widths)


def assemble(
    graph: ChannelGraph, scores: Mapping[str, Tensor], rooms: list[Room], costs: WidthCosts, widths: Widths
) -> Plan:
    """The plan of the groups that may change, each at its width."""
    chosen = [
        keep_best(room.group, flat(scores[room.group.name]), width)
        for room, width in zip(rooms, widths, strict=True)
        if room.counted and room.held != "ignored"
    ]
    touched = {m.param for group in chosen for m in group.members}
    shapes = {name: shape for name, shape in graph.shapes.items() if name in touched}
    after = (costs.measure("macs", widths), costs.measure("params", widths))
    plan = Plan(tuple(chosen), (graph.macs, after[0]), (graph.params, after[1]), shapes, graph.example)
    return plan.seal() if graph.dry_run else plan


def checked_scores(graph: ChannelGraph, scores: Mapping[str, Tensor]) -> set[str]:
    """The names of the groups that have scores; SlimError when scores do not fit the graph."""
    for name, values in scores.items():
        group = graph.by_name.get(name)
        if group is None:
            raise SlimError(f"scores name group {name}, which the graph does not have; trace the model again")
        if tuple(values.shape) != (group.size,):
            raise SlimError(f"scores of group {name} have shape {tuple(values.shape)}; expected ({group.size},)")
        if bool(torch.isnan(values).any()):
            raise SlimError(f"scores of group {name} hold NaN; was the training finite?")
    return set(scores)


def above(values: Tensor, target: Target) -> int:
    """How many scores reach the threshold, compared in their own precision."""
    return int((values >= target.value).sum())


def flat(values: Tensor) -> Tensor:
    return values.detach().double().cpu()


def per_unit_saved(values: Tensor, number: int, room: Room, costs: WidthCosts, target: Target) -> Tensor:
    """Scores over what one output channel of the group saves at full width; what saves nothing goes last."""
    saved = -costs.change(target.kind, costs.sizes, number, room.group.size - 1) / room.group.per_channel
    return values / saved if saved else torch.full_like(values, inf)


def classes_of(graph: ChannelGraph, numbers: list[int], scope: Scope) -> list[list[int]]:
    """The groups, by their numbers, whose channels are ranked against each other."""
    keys = {
        "global": lambda number: (),
        "local": lambda number: number,
        "isomorphic": lambda number: structure(graph, graph.groups[number]),
    }
    classes: dict[object, list[int]] = {}
    for number in numbers:
        classes.setdefault(keys[scope](number), []).append(number)
    return list(classes.values())


def structure(graph: ChannelGraph, group: ChannelGroup) -> tuple[object, ...]:
    """What the group's channels occupy, whatever its width and wherever it is: role, axes, kernel, axis and own name."""
    kinds = []
    for m in group.members:
        shape = graph.shapes.get(m.param)
        axes, kernel = (-1, ()) if shape is None else (len(shape), shape[2:])
        kinds.append((m.role, axes, kernel, m.axis, m.param.rpartition(".")[2]))
    return tuple(sorted(kinds))


class Ranking:
    """The order in which channels go, within each class of groups.

    A ladder of widths: at rung 0 everything is kept, at the last nothing, and every class keeps the same ratio. Widths only
    fall, so costs do too and bisection finds the target.
    """

    def __init__(self, values: dict[int, Tensor], classes: list[list[int]]) -> None:
        self.classes = classes
        self.orders = [channel_order({n: values[n] for n in members}) for members in classes]
        # Where each group's channels stand in the order of its class, ascending.
        self.places = {
            n: (order == n).nonzero().flatten().tolist()
            for members, order in zip(classes, self.orders, strict=True)
            for n in members
        }
        # No class is larger than the number of rungs, so each channel has its own.
        self.rungs = max(1000, sum(len(order) for order in self.orders))

    def kept(self, rung: int) -> dict[int, int]:
        """Channels kept of each group, before rounding."""
        widths = {}
        for members, order in zip(self.classes, self.orders, strict=True):
            kept = round(len(order) * (self.rungs - rung) / self.rungs)
            removed = torch.bincount(order[: len(order) - kept], minlength=max(members) + 1).tolist()
            widths.update({n: len(self.places[n]) - removed[n] for n in members})
        return widths


def channel_order(values: dict[int, Tensor]) -> Tensor:
    """The group number of each channel, lowest channel first."""
    numbers = torch.cat([torch.full_like(v, n, dtype=torch.long) for n, v in values.items()])
    ordered = torch.cat([v.sort().values for v in values.values()])
    places = torch.cat([torch.arange(len(v), dtype=torch.float64) / len(v) for v in values.values()])
    by_place = places.sort(stable=True).indices
    return numbers[by_place[ordered[by_place].sort(stable=True).indices]]


def solve(target: Target, rooms: list[Room], costs: WidthCosts, ranking: Ranking) -> Widths:
    """The widths that meet the target; SlimError when the floors do not allow it."""
    budget = target.budget(costs.measure(target.kind, costs.sizes))
    if costs.measure(target.kind, [room.floor for room in rooms]) > budget:
        raise SlimError(unreachable(target, rooms, costs))

    def widths_at(rung: int) -> Widths:
        kept = ranking.kept(rung)
        return [room.nearest(kept[n]) if room.ranked else room.floor for n, room in enumerate(rooms)]

    def within(rung: int) -> bool:
        return costs.measure(target.kind, widths_at(rung)) <= budget

    widths = widths_at(bisect_left(range(ranking.rungs), True, key=within))
    return give_back(widths, target.kind, budget, rooms, costs, ranking)


def give_back(
    widths: Widths, kind: str, budget: float, rooms: list[Room], costs: WidthCosts, ranking: Ranking
) -> Widths:
    """Spend what rounding left of the budget: widen groups again, of the class that keeps the lowest ratio first, and in it
    those whose next channel ranks highest."""
    widths, cost = list(widths), costs.measure(kind, widths)
    home = {n: c for c, members in enumerate(ranking.classes) for n in members}
    kept = [sum(widths[n] for n in members) for members in ranking.classes]
    candidates = {n for n in home if widths[n] < rooms[n].group.size}

    def turn(n: int) -> tuple[float, int, int]:
        # Places ascend: with w kept, the best removed channel is the one at index size - w - 1.
        next_place = ranking.places[n][len(ranking.places[n]) - widths[n] - 1]
        return kept[home[n]] / len(ranking.orders[home[n]]), home[n], -next_place

    while candidates:
        best = min(candidates, key=turn)
        wider = rooms[best].wider(widths[best])
        more = costs.change(kind, widths, best, wider)
        if cost + more > budget:
            candidates.discard(best)
            continue
        kept[home[best]] += wider - widths[best]
        widths[best], cost = wider, cost + more
        if wider == rooms[best].group.size:
            candidates.discard(best)
    return widths


def keep_best(group: ChannelGroup, values: Tensor, width: int) -> GroupPlan:
    """The ``width`` channels with the highest scores; of equals the ones of lower index."""
    ordered, order = torch.sort(values, descending=True, stable=True)
    return GroupPlan(
        group.name,
        group.size,
        tuple(sorted(order[:width].tolist())),
        group.members,
        score_range=(float(values.min()), float(values.max())),
        lowest_kept=float(ordered[width - 1]),
        highest_removed=float(ordered[width]) if width < group.size else None,
    )
