"""Two plans in turn as one: the later plan's positions are carried back through what the first one kept."""

from __future__ import annotations

from dataclasses import replace

from slim.errors import SlimError
from slim.graph import Member
from slim.plan import GroupPlan, Plan

Axis = tuple[str, int]
"""A parameter's (or buffer's, or attribute's) name and one of its axes."""
Channel = tuple[int, int]
"""The number of one of the first plan's groups, and a channel of it."""


def compose(first: Plan, later: Plan) -> Plan:
    """The plan for the first one's network that leaves what the two leave in turn; see ``Plan.then``.

    Groups are matched by the positions that they occupy: what the later plan removes must be whole channels of the first
    one's groups, or channels that occupy nothing of these; the latter make groups of their own.
    """
    removed = removed_positions(first)
    check_fit(first, later, removed)
    owners = kept_owners(first)
    gone: set[Channel] = set()
    taken: dict[Axis, set[int]] = {}
    judges: dict[int, list[GroupPlan]] = {}
    new: list[GroupPlan] = []
    for group in later.groups:
        group = replace(group, members=carried_back(group, removed))
        homes = homes_of(group, owners)
        for number in {number for home in homes for number, _ in home}:
            judges.setdefault(number, []).append(group)
        for channel in group.removed:
            gone |= homes[channel]
            if homes[channel]:
                occupy(taken, group.members, [channel], group.size)
        strangers = [channel for channel, home in enumerate(homes) if not home]
        if strangers:
            new.append(part_of(group, strangers))
    check_whole(first, gone, taken)
    known = [narrowed(group, n, gone, judges.get(n, [])) for n, group in enumerate(first.groups)]
    names = {group.name for group in known}
    for group in new:
        known.append(replace(group, name=free_name(group.name, names)))
        names.add(known[-1].name)
    return Plan(
        tuple(known),
        (first.macs[0], later.macs[1]),
        (first.params[0], later.params[1]),
        {**first.shapes, **{name: shape for name, shape in later.shapes.items() if name not in first.shapes}},
        first.example,
    )


def occupy(places: dict[Axis, set[int]], members: tuple[Member, ...], channels: list[int], size: int) -> None:
    """Add what some of a group's channels occupy; changes ``places``."""
    for m in members:
        places.setdefault((m.param, m.axis), set()).update(m.positions(channels, size))


def removed_positions(plan: Plan) -> dict[Axis, set[int]]:
    places: dict[Axis, set[int]] = {}
    for group in plan.groups:
        occupy(places, group.members, list(group.removed), group.size)
    return places


def check_fit(first: Plan, later: Plan, removed: dict[Axis, set[int]]) -> None:
    """SlimError when the later plan was not made on the network that the first one leaves."""
    for param, shape in first.shapes.items():
        left = tuple(n - len(removed.get((param, axis), ())) for axis, n in enumerate(shape))
        if later.shapes.get(param, left) != left:
            raise SlimError(
                f"the later plan does not fit: its network's {param} has shape {later.shapes[param]}, this plan leaves {left}; "
                "make it on the network that this plan gives"
            )
    for unit, ours, theirs in (("parameters", first.params, later.params), ("MACs", first.macs, later.macs)):
        if ours[1] != theirs[0]:
            raise SlimError(
                f"the later plan does not fit: its network has {theirs[0]} {unit}, this plan leaves {ours[1]}; make it on "
                "the network that this plan gives, traced with inputs of the same size"
            )


def kept_owners(plan: Plan) -> dict[Axis, dict[int, Channel]]:
    """Which kept channel of which group occupies each position."""
    owners: dict[Axis, dict[int, Channel]] = {}
    for number, group in enumerate(plan.groups):
        for m in group.members:
            owned = owners.setdefault((m.param, m.axis), {})
            for channel in group.keep:
                owned.update(dict.fromkeys(m.positions([channel], group.size), (number, channel)))
    return owners


def carried_back(group: GroupPlan, removed: dict[Axis, set[int]]) -> tuple[Member, ...]:
    """The members of a later group with the positions that they had before the first plan."""
    members = []
    for m in group.members:
        gone = removed.get((m.param, m.axis), set())
        kept = [position for position in range(max(m.index) + 1 + len(gone)) if position not in gone]
        members.append(replace(m, index=tuple(kept[position] for position in m.index)))
    return tuple(members)


def homes_of(group: GroupPlan, owners: dict[Axis, dict[int, Channel]]) -> list[set[Channel]]:
    """For each channel of a later group, the first plan's channels that occupy some of its positions."""
    homes: list[set[Channel]] = [set() for _ in range(group.size)]
    for m in group.members:
        owned = owners.get((m.param, m.axis), {})
        each = len(m.index) // group.size
        for n, position in enumerate(m.index):
            if position in owned:
                homes[n // each].add(owned[position])
    return homes


def check_whole(first: Plan, gone: set[Channel], taken: dict[Axis, set[int]]) -> None:
    """SlimError unless what the later plan takes is exactly all that the channels that go occupy."""
    whole: dict[Axis, set[int]] = {}
    for number, channel in gone:
        group = first.groups[number]
        occupy(whole, group.members, [channel], group.size)
    for param, axis in {**whole, **taken}:
        if whole.get((param, axis), set()) != taken.get((param, axis), set()):
            raise SlimError(
                f"the later plan does not fit: it removes other positions of {param} (axis {axis}) than the channels of this "
                "plan that it removes occupy; apply the two plans one after the other"
            )


def narrowed(group: GroupPlan, number: int, gone: set[Channel], judges: list[GroupPlan]) -> GroupPlan:
    """A group of the first plan without the channels that went later, with the scores of who judged it last."""
    keep = tuple(channel for channel in group.keep if (number, channel) not in gone)
    if not keep:
        raise SlimError(f"the later plan does not fit: it leaves no channel of group {group.name}")
    group = replace(group, keep=keep)
    ranges = [judge.score_range for judge in judges if judge.score_range is not None]
    if not ranges:
        return group
    kept = [judge.lowest_kept for judge in judges if judge.lowest_kept is not None]
    removed = [judge.highest_removed for judge in judges if judge.highest_removed is not None]
    return replace(
        group,
        score_range=(min(low for low, _ in ranges), max(high for _, high in ranges)),
        lowest_kept=min(kept, default=None),
        highest_removed=max(removed, default=None),
    )


def part_of(group: GroupPlan, channels: list[int]) -> GroupPlan:
    """Some of a group's channels as a group of their own."""
    kept = set(group.keep)
    keep = tuple(n for n, channel in enumerate(channels) if channel in kept)
    if not keep:
        raise SlimError(f"the later plan does not fit: it leaves none of the channels that only it has of {group.name}")
    members = tuple(replace(m, index=tuple(m.positions(channels, group.size))) for m in group.members)
    return replace(group, size=len(channels), keep=keep, members=members)


def free_name(name: str, taken: set[str]) -> str:
    """The name, numbered when it is taken."""
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name}#{number}"
    return found
