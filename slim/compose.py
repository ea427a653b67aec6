"""What is made of finished plans: two in turn as one, two side by side as a table, one as bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from slim.errors import SlimError
from slim.graph import Member, unique_name
from slim.plan import GroupPlan, Plan, percent

Place = tuple[str, int, int]
"""A parameter's (or buffer's, or attribute's) name, one of its axes, and a position there."""
Channel = tuple[int, int]
"""The number of one of the first plan's groups, and a channel of it."""


def compose(first: Plan, second: Plan) -> Plan:
    """One plan in place of two that are applied in turn.

    Applied to the first plan's network it gives the very weights that the two give in turn. Groups are matched by the
    positions that they occupy: what the second plan removes must be whole channels of the first one's groups, or channels
    that occupy nothing of these, which make groups of their own. Scores are those of the last plan that ranked the group.

    Args:
        first: a plan for a network
        second: a plan for the network that the first one leaves

    Raises:
        SlimError: naming the parameter, where the second plan does not fit what the first one leaves.

    Examples:
        >>> import slim, torch
        >>> from torch import nn
        >>> model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.zeros(1, 3, 8, 8)
        >>> def plan_for(model, scores):
        ...     graph = slim.trace(model, x)
        ...     return slim.make_plan(graph, {"0": torch.tensor(scores)}, threshold=0.5, round_to=1, min_channels=1)
        >>> first = plan_for(model, [0.9, 0.1, 0.7, 0.8])
        >>> second = plan_for(slim.apply_plan(model, first), [0.6, 0.2, 0.9])
        >>> slim.compose(first, second).groups[0].keep
        (0, 3)
    """
    removed: dict[tuple[str, int], set[int]] = {}
    owners: dict[Place, Channel] = {}
    for number, original in enumerate(first.groups):
        for param, axis, position in places(original, original.removed):
            removed.setdefault((param, axis), set()).add(position)
        owners |= {place: (number, channel) for channel in original.keep for place in held(original, [channel])}
    check_fit(first, second, removed)
    gone: set[Channel] = set()
    taken: set[Place] = set()
    rankings: dict[int, list[GroupPlan]] = {}
    new: list[GroupPlan] = []
    for group in second.groups:
        group = replace(group, members=carried_back(group, removed))
        occupied = [held(group, [channel]) for channel in range(group.size)]
        originals = [{owners[place] for place in found if place in owners} for found in occupied]
        for number in {number for found in originals for number, _ in found}:
            rankings.setdefault(number, []).append(group)
        for channel in group.removed:
            gone |= originals[channel]
            taken.update(occupied[channel] if originals[channel] else ())
        new_channels = [channel for channel, found in enumerate(originals) if not found]
        if new_channels:
            new.append(part_of(group, new_channels))
    whole = {place for number, channel in gone for place in held(first.groups[number], [channel])}
    for place in [*owners, *sorted(taken)]:
        if (place in whole) != (place in taken):
            raise SlimError(
                f"the second plan does not fit: it removes other positions of {place[0]} (axis {place[1]}) than the channels of "
                "the first plan that it removes occupy; apply the two plans one after the other"
            )
    groups = [narrowed(group, n, gone, rankings.get(n, [])) for n, group in enumerate(first.groups)]
    for group in new:
        groups.append(replace(group, name=unique_name(group.name, {g.name for g in groups})))
    both = Plan(
        tuple(groups),
        (first.macs[0], second.macs[1]),
        (first.params[0], second.params[1]),
        first.shapes | second.shapes | first.shapes,
        first.example,
    )
    return both.known_from_trace() if first.traced and second.traced else both


def places(group: GroupPlan, channels: Sequence[int]) -> list[Place]:
    """All that some of a group's channels occupy."""
    return [(m.param, m.axis, position) for m in group.members for position in m.positions(channels, group.size)]


def held(group: GroupPlan, channels: Sequence[int]) -> list[Place]:
    """What they occupy of tensors: a count has no positions that could be told from each other."""
    tensors = replace(group, members=tuple(m for m in group.members if m.role != "width"))
    return places(tensors, channels)


def check_fit(first: Plan, second: Plan, removed: dict[tuple[str, int], set[int]]) -> None:
    """SlimError when the second plan was not made on the network that the first one leaves."""
    for param, shape in first.shapes.items():
        left = tuple(n - len(removed.get((param, axis), ())) for axis, n in enumerate(shape))
        if second.shapes.get(param, left) != left:
            raise SlimError(
                f"the second plan does not fit: its network's {param} has shape {second.shapes[param]}, the first plan leaves "
                f"{left}; make it on the network that the first plan gives"
            )
    for unit, ours, theirs in (("parameters", first.params, second.params), ("MACs", first.macs, second.macs)):
        if ours[1] != theirs[0]:
            raise SlimError(
                f"the second plan does not fit: its network has {theirs[0]} {unit}, the first plan leaves {ours[1]}; make it "
                "on the network that the first plan gives, traced with inputs of the same size"
            )


def carried_back(group: GroupPlan, removed: dict[tuple[str, int], set[int]]) -> tuple[Member, ...]:
    """The members of a group of the second plan with the positions that they had before the first one."""
    members = []
    for m in group.members:
        gone = removed.get((m.param, m.axis), set())
        kept = [position for position in range(max(m.index) + 1 + len(gone)) if position not in gone]
        members.append(replace(m, index=tuple(kept[position] for position in m.index)))
    return tuple(members)


def narrowed(group: GroupPlan, number: int, gone: set[Channel], rankings: list[GroupPlan]) -> GroupPlan:
    """A group of the first plan without the channels that went later, with the scores of the groups that ranked it last."""
    keep = tuple(channel for channel in group.keep if (number, channel) not in gone)
    if not keep:
        raise SlimError(f"the second plan does not fit: it leaves no channel of group {group.name}")
    group = replace(group, keep=keep)
    ranges = [g.score_range for g in rankings if g.score_range is not None]
    if not ranges:
        return group
    return replace(
        group,
        score_range=(min(low for low, _ in ranges), max(high for _, high in ranges)),
        lowest_kept=min((g.lowest_kept for g in rankings if g.lowest_kept is not None), default=None),
        highest_removed=max((g.highest_removed for g in rankings if g.highest_removed is not None), default=None),
    )


def part_of(group: GroupPlan, channels: list[int]) -> GroupPlan:
    """Some of a group's channels as a group of their own."""
    kept = set(group.keep)
    keep = tuple(n for n, channel in enumerate(channels) if channel in kept)
    if not keep:
        raise SlimError(
            f"the second plan does not fit: it leaves none of the channels that only it has of {group.name}"
        )
    members = tuple(replace(m, index=tuple(m.positions(channels, group.size))) for m in group.members)
    return replace(group, size=len(channels), keep=keep, members=members)


def compare(first: Plan, second: Plan) -> str:
    """A table of two plans for one network: widths in both, channels that both keep, and their Jaccard overlap.

    The overlap is the number of channels kept by both over the number kept by either.

    Args:
        first: a plan
        second: another plan for the same network

    Raises:
        SlimError: when the plans are of different networks.

    Examples:
        >>> import slim, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
        >>> graph = slim.trace(model, torch.zeros(1, 3, 8, 8))
        >>> scores = {"0": torch.tensor([0.9, 0.1, 0.7, 0.2])}
        >>> half, most = (slim.make_plan(graph, scores, channels=c, round_to=1, min_channels=1) for c in (0.5, 0.75))
        >>> print(slim.compare(half, most).splitlines()[1])
        0           4      2       3     2    0.667
    """
    check_same_network(first, second)
    firsts, seconds = ({g.name: g for g in plan.groups} for plan in (first, second))
    names = list({**firsts, **seconds})
    width = max([5, *map(len, names)])
    lines = [f"{'group':<{width}}  before  first  second  both  overlap"]
    for name in names:
        a, b = firsts.get(name), seconds.get(name)
        before = (a or seconds[name]).widths[0]
        kept = f"{a.widths[1] if a else '-':>5}  {b.widths[1] if b else '-':>6}"
        if a and b:
            both, either = set(a.keep) & set(b.keep), set(a.keep) | set(b.keep)
            overlap = f"{len(both) * a.per_channel:>4}  {len(both) / len(either):>7.3f}"
        else:
            overlap = f"only in the {'first' if a else 'second'}"
        lines.append(f"{name:<{width}}  {before:>6}  {kept}  {overlap}")
    for label, unit, one, two in (("MACs", 1, first.macs, second.macs), ("parameters", 3, first.params, second.params)):
        ends = " and ".join(f"{after / 1e6:.{unit}f} M ({percent(after, before)})" for before, after in (one, two))
        lines.append(f"{label} {one[0] / 1e6:.{unit}f} M -> {ends}")
    return "\n".join(lines)


def check_same_network(first: Plan, second: Plan) -> None:
    """SlimError where two plans cannot have been made for one network."""
    unlike = [
        f"{param} has shape {shape} in the first, {second.shapes[param]} in the second"
        for param, shape in first.shapes.items()
        if second.shapes.get(param, shape) != shape
    ]
    if first.params[0] != second.params[0]:
        unlike.append(f"of {first.params[0]} and {second.params[0]} parameters")
    others = {g.name: g for g in second.groups}
    for group in first.groups:
        other = others.get(group.name, group)
        ours, theirs = ((g.size, {(m.param, m.axis): m.index for m in g.members}) for g in (group, other))
        if ours != theirs:
            unlike.append(
                f"group {group.name} of {group.size} channels and of {other.size} does not occupy the same positions; trace "
                "both alike"
            )
    if unlike:
        raise SlimError(f"the plans are of different networks: {unlike[0]}")


def chart(plan: Plan, width: int = 60) -> str:
    """A bar for each group: solid what stays, light what goes.

    Args:
        plan: a plan
        width: length of the widest group's bar, in characters

    Raises:
        SlimError: for a width below 1.

    Examples:
        >>> import slim, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
        >>> graph = slim.trace(model, torch.zeros(1, 3, 8, 8))
        >>> scores = {"0": torch.tensor([0.9, 0.1, 0.7, 0.2])}
        >>> print(slim.chart(slim.make_plan(graph, scores, channels=0.75, round_to=1, min_channels=1), width=8))
        0      ██████░░      4 ->     3   75.0%
    """
    if width < 1:
        raise SlimError(f"width={width}: expected at least 1 character")
    names = max([5, *(len(g.name) for g in plan.groups)])
    widest = max((g.widths[0] for g in plan.groups), default=1)
    lines = []
    for g in plan.groups:
        before, after = g.widths
        length, solid = (max(1, round(width * w / widest)) for w in (before, after))
        bar = "█" * solid + "░" * (length - solid)
        lines.append(f"{g.name:<{names}}  {bar:<{width}}  {before:>5} -> {after:>5}  {percent(after, before):>6}")
    return "\n".join(lines)
