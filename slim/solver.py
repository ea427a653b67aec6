"""From scores to a plan: the lowest channels go first until the target is met, within floors and rounding."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import partial
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor

from slim.errors import SlimError
from slim.graph import ChannelGraph, ChannelGroup
from slim.plan import GroupPlan, Plan
from slim.targets import Target, WidthConstraint, WidthCosts, Widths, check_reachable, width_constraints

Scope = Literal["global", "local", "isomorphic"]
SCOPES = ("global", "local", "isomorphic")
KNAPSACK_PASSES = 4


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

    The channels with the lowest scores go first. Widths go to the nearest allowed multiple (a threshold's to the next);
    what this leaves of the budget widens groups again: of the class that keeps the lowest ratio, the group whose next
    channel ranks highest, while the budget lasts. Of equal channels, those go first that stand lowest in their own group,
    so that ties are spread over the groups. Groups without scores stay whole.

    Channels are counted at the producing layer: where one channel of a group stands for several that go together, all
    count.

    Args:
        graph: what ``slim.trace`` found
        scores: {group name: [size]}, larger is kept, see ``slim.score``
        macs: exactly one target: a keep ratio up to 1, or a whole number above 1 to keep; of all MACs
        params: the same of the parameters
        channels: the same of the channels of the groups with scores
        threshold: in place of these: every channel with a score below it goes and nothing at or above it, in any scope
        round_to: every layer that produces a group's channels keeps a multiple of this, or all
        min_channels: such a layer keeps at least so many channels, or all
        min_keep: a group keeps at least this share of its channels, 0..1
        scope: "global" ranks all channels against each other; "local" keeps the same ratio of every group; "isomorphic"
            ranks channels within classes of groups of like structure, of which each keeps the same ratio (Fang et al.,
            "Isomorphic Pruning for Vision Models", ECCV 2024)
        cost_aware: rank by score per MAC or parameter that one channel saves, in the full network and then in the planned
            one: greedy answers to the knapsack that Shen et al. pose for latency ("Structural Pruning via Latency-Saliency
            Knapsack", NeurIPS 2022), of which the one that keeps the largest sum of scores counts
        overrides: {pattern of a group's or producing layer's name: keep ratio (float) or channels (int)}; the first that
            matches sets the group's exact width, past rounding, floors and ranking
        ignore: patterns of groups that stay whole, before all else

    Raises:
        SlimError: for options out of range, patterns that match nothing, scores that do not fit the graph, and a target
            that cannot be reached, with how far it can go and what binds.

    Examples:
        >>> import slim, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
        >>> graph = slim.trace(model, torch.zeros(1, 3, 8, 8))
        >>> scores = {"0": torch.tensor([0.9, 0.1, 0.7, 0.2])}
        >>> plan = slim.make_plan(graph, scores, macs=0.5, round_to=1, min_channels=1)
        >>> plan.groups[0].keep
        (0, 2)
    """
    target = Target.of(macs=macs, params=params, channels=channels, threshold=threshold)
    if scope not in SCOPES:
        raise SlimError(f"scope is {scope!r}; expected one of {', '.join(map(repr, SCOPES))}")
    if cost_aware and target.kind not in ("macs", "params"):
        raise SlimError(f"cost_aware=True needs macs= or params=: {target.kind} has no cost to divide by")
    floors: dict[str, Any] = {"round_to": round_to, "min_channels": min_channels, "min_keep": min_keep}
    patterns = overrides or {}, (ignore,) if isinstance(ignore, str) else tuple(ignore)
    constrain = partial(width_constraints, graph, checked_scores(graph, scores), *patterns)
    constraints = constrain(**floors)
    costs = WidthCosts(graph, constraints)
    check_reachable(target, constraints, costs, floors, constrain)
    values = {n: flat(scores[c.group.name]) for n, c in enumerate(constraints) if c.ranked}
    if target.kind == "threshold":
        # Scores reach the threshold or not in their own precision.
        widths = [
            c.at_least(int((scores[c.group.name] >= target.value).sum())) if c.ranked else c.floor for c in constraints
        ]
    else:
        classes = classes_of(graph, list(values), scope)
        if cost_aware:
            widths = solve_knapsack(target, constraints, costs, values, classes)
        else:
            widths = solve(target, constraints, costs, Ranking(values, classes))
    chosen = [
        keep_best(constraint.group, flat(scores[constraint.group.name]), width)
        for constraint, width in zip(constraints, widths, strict=True)
        if constraint.counted and constraint.bound_by != "ignored"
    ]
    if target.kind == "channels":
        check_worth(graph, target, costs, widths)
    touched = {m.param for group in chosen for m in group.members}
    plan = Plan(
        groups=tuple(chosen),
        macs=(graph.macs, costs.measure("macs", widths)),
        params=(graph.params, costs.measure("params", widths)),
        shapes={name: shape for name, shape in graph.shapes.items() if name in touched},
        example=graph.example,
    )
    return plan.known_from_trace()


def check_worth(graph: ChannelGraph, target: Target, costs: WidthCosts, widths: Widths) -> None:
    """SlimError for a target in channels whose cut hardly saves a MAC, since most of the network cannot be cut."""
    whole = costs.measure("channels", costs.sizes)
    asked = 1 - target.budget(whole) / whole if whole else 0.0
    saved = 1 - costs.measure("macs", widths) / graph.macs if graph.macs else 1.0
    prunable = graph.shares()["prunable"]
    if saved < asked / 10 and prunable < 0.1:
        raise SlimError(
            f"{target} would leave {1 - saved:.1%} of the MACs: the channels that can be cut make "
            f"{prunable:.1%} of them; graph.report() says what freezes the others"
        )


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


def flat(values: Tensor) -> Tensor:
    return values.detach().double().cpu()


def solve_knapsack(
    target: Target,
    constraints: list[WidthConstraint],
    costs: WidthCosts,
    values: dict[int, Tensor],
    classes: list[list[int]],
) -> Widths:
    """The widths that keep the largest sum of scores, of some greedy answers.

    What a channel saves depends on how many others its layers keep: first it is measured in the full network, then at the
    widths of the answer before.
    """
    best: tuple[float, Widths] | None = None
    widths = costs.sizes
    for _ in range(KNAPSACK_PASSES):
        per_unit = {n: per_unit_saved(v, n, costs, target, widths) for n, v in values.items()}
        widths = solve(target, constraints, costs, Ranking(per_unit, classes))
        kept = sum(float(v.sort(descending=True).values[: widths[n]].sum()) for n, v in values.items())
        if best is None or kept > best[0]:
            best = kept, widths
    assert best is not None
    return best[1]


def per_unit_saved(values: Tensor, number: int, costs: WidthCosts, target: Target, widths: Widths) -> Tensor:
    """Scores over what one output channel of the group saves at these widths; what saves nothing goes last."""
    saved = -costs.change(target.kind, widths, number, widths[number] - 1) / costs.each[number]
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
        self.ranks = {
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
            widths.update({n: len(self.ranks[n]) - removed[n] for n in members})
        return widths


def channel_order(values: dict[int, Tensor]) -> Tensor:
    """The group number of each channel, lowest channel first."""
    numbers = torch.cat([torch.full_like(v, n, dtype=torch.long) for n, v in values.items()])
    ordered = torch.cat([v.sort().values for v in values.values()])
    within = torch.cat([torch.arange(len(v), dtype=torch.float64) / len(v) for v in values.values()])
    by_rank = within.sort(stable=True).indices
    return numbers[by_rank[ordered[by_rank].sort(stable=True).indices]]


def solve(target: Target, constraints: list[WidthConstraint], costs: WidthCosts, ranking: Ranking) -> Widths:
    """The widths that meet the target, which the floors allow."""
    budget = target.budget(costs.measure(target.kind, costs.sizes))

    def widths_at(rung: int) -> Widths:
        kept = ranking.kept(rung)
        return [
            constraint.nearest(kept[n]) if constraint.ranked else constraint.floor
            for n, constraint in enumerate(constraints)
        ]

    def within(rung: int) -> bool:
        return costs.measure(target.kind, widths_at(rung)) <= budget

    widths = widths_at(bisect_left(range(ranking.rungs), True, key=within))
    return spend_leftover_budget(widths, target.kind, budget, constraints, costs, ranking)


def spend_leftover_budget(
    widths: Widths, kind: str, budget: float, constraints: list[WidthConstraint], costs: WidthCosts, ranking: Ranking
) -> Widths:
    """Widen groups again while the budget lasts: of the class that keeps the lowest ratio first, and in it those whose next
    channel ranks highest."""
    widths, cost = list(widths), costs.measure(kind, widths)
    class_of = {n: c for c, members in enumerate(ranking.classes) for n in members}
    kept = [sum(widths[n] for n in members) for members in ranking.classes]
    candidates = {n for n in class_of if widths[n] < constraints[n].group.size}

    def priority(n: int) -> tuple[float, int, int]:
        # Ranks ascend: with w kept, the best removed channel is the one at index size - w - 1.
        next_rank = ranking.ranks[n][len(ranking.ranks[n]) - widths[n] - 1]
        return kept[class_of[n]] / len(ranking.orders[class_of[n]]), class_of[n], -next_rank

    while candidates:
        best = min(candidates, key=priority)
        wider = constraints[best].wider(widths[best])
        more = costs.change(kind, widths, best, wider)
        if cost + more > budget:
            candidates.discard(best)
            continue
        kept[class_of[best]] += wider - widths[best]
        widths[best], cost = wider, cost + more
        if wider == constraints[best].group.size:
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
