"""What a plan aims at and what bounds it: the target, the widths that each group may take, and what such widths cost.

Costs come from widths: a layer's MACs are the elements of its weight times its output positions, and every axis of a weight
is as long as the kept channels that occupy it, so nothing is cut or run while solving.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import ceil, gcd, lcm, prod
from typing import Literal

from slim.errors import SlimError
from slim.graph import ChannelGraph, ChannelGroup

Widths = list[int]
"""How many of its own channels each of the graph's groups keeps, in the graph's order."""

UNITS = {"macs": "MACs", "params": "parameters", "channels": "channels"}


@dataclass(frozen=True)
class Target:
    """What must come down, and to what: ``value`` is a share of it up to 1, a count above 1; for a threshold, a score."""

    kind: Literal["macs", "params", "channels", "threshold"]
    value: float

    @staticmethod
    def of(**targets: float | None) -> Target:
        """The one target that is given; SlimError when there is not exactly one, or its value is of neither form."""
        given = [(kind, value) for kind, value in targets.items() if value is not None]
        if len(given) != 1:
            raise SlimError(
                "give exactly one target: macs=, params= or channels= (a keep ratio above 0 and at most 1, or a whole number "
                "above 1 to keep), or threshold= (a score)"
            )
        kind, value = given[0]
        real = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
        if kind == "threshold" and not real:
            raise SlimError(f"threshold={value!r}: expected a score; every channel below it goes")
        if kind != "threshold" and not (real and (0 < value <= 1 or is_count(value))):
            raise SlimError(
                f"{kind}={value!r}: expected a keep ratio above 0 and at most 1 (0.4 keeps 40 %), or a whole number above 1 "
                f"(how many {UNITS[kind]} may remain)"
            )
        return Target(kind, value)  # type: ignore[arg-type]

    def budget(self, whole: int) -> float:
        """How much may remain of ``whole``; SlimError where there is nothing of it."""
        if not whole:
            raise SlimError(f"{self}: the network has no {UNITS[self.kind]} that could be counted; see graph.report()")
        return self.value if self.value > 1 else self.value * whole

    def __str__(self) -> str:
        return f"{self.kind}={self.value:.0f}" if self.value > 1 else f"{self.kind}={self.value:g}"


def is_count(value: float) -> bool:
    """Whether a number is whole and above 1."""
    return value > 1 and float(value).is_integer()


@dataclass(frozen=True)
class WidthConstraint:
    """The widths that a group may take, in its own channels: ``floor``, larger multiples of ``step``, or the whole group.

    ``bound_by`` says what else than rounding and ``min_channels`` sets the floor. Groups that are not ``ranked`` stay at
    their floor; the channels of those that are not ``counted`` are in no total.
    """

    group: ChannelGroup
    floor: int
    step: int = 1
    bound_by: str = ""
    ranked: bool = False
    counted: bool = True

    def nearest(self, width: int) -> int:
        """The nearest allowed width."""
        return min(self.group.size, max(self.floor, (2 * width + self.step) // (2 * self.step) * self.step))

    def at_least(self, width: int) -> int:
        """The least allowed width that holds ``width`` channels."""
        return min(self.group.size, max(self.floor, -(-width // self.step) * self.step))

    def wider(self, width: int) -> int:
        """The next allowed width."""
        return min(self.group.size, width + self.step)


def width_constraints(
    graph: ChannelGraph,
    scored: set[str],
    overrides: Mapping[str, float],
    ignore: Iterable[str],
    *,
    round_to: int,
    min_channels: int,
    min_keep: float,
) -> list[WidthConstraint]:
    """The constraint on every group of the graph: ``ignore`` wins over ``overrides``, of which the first that matches counts.

    Others keep for every layer that produces the channels a multiple of ``round_to`` output channels and at least
    ``min_channels``, and at least the share ``min_keep`` of the group.
    """
    if any(not isinstance(n, int) or n < 1 for n in (round_to, min_channels)):
        raise SlimError(f"round_to={round_to}, min_channels={min_channels}: expected whole numbers, at least 1")
    if not 0 <= min_keep <= 1:
        raise SlimError(f"min_keep={min_keep}: expected a share of each group, 0 to 1")
    check_patterns(graph, scored, overrides, ignore)
    constraints = []
    for group in graph.groups:
        whole = WidthConstraint(group, group.size)
        pattern = next((p for p in overrides if matches(p, group)), None)
        if not group.prunable:
            constraints.append(replace(whole, bound_by=f"frozen: {group.frozen_reason}", counted=False))
        elif group.name not in scored:
            constraints.append(replace(whole, bound_by="no scores", counted=False))
        elif any(matches(p, group) for p in ignore):
            constraints.append(replace(whole, bound_by="ignored"))
        elif pattern is not None:
            width = override_width(pattern, overrides[pattern], group)
            constraints.append(WidthConstraint(group, width, bound_by="override"))
        else:
            # Every layer that produces the channels is rounded; one channel can stand for several of a layer's.
            counts = [len(m.index) // group.size for m in group.members if m.produces] or [1]
            step = lcm(*(round_to // gcd(round_to, count) for count in counts))
            least, share = -(-min_channels // min(counts)), ceil(min_keep * group.size - 1e-9)
            floor, without_share = (-(-width // step) * step for width in (max(least, share), least))
            unrounded = "round_to" if min(group.size, floor) > least else "min_channels"
            bound_by = "min_keep" if floor > without_share else unrounded
            constraints.append(WidthConstraint(group, min(group.size, floor), step, bound_by, ranked=True))
    return constraints


def names_of(group: ChannelGroup) -> list[str]:
    """The group's name and the paths of the layers that produce its channels."""
    return list(dict.fromkeys([group.name, *(m.layer for m in group.members if m.produces)]))


def matches(pattern: str, group: ChannelGroup) -> bool:
    return any(fnmatchcase(name, pattern) for name in names_of(group))


def check_patterns(
    graph: ChannelGraph, scored: set[str], overrides: Mapping[str, float], ignore: Iterable[str]
) -> None:
    """SlimError for a pattern that matches no group, and for an override that matches none that can be cut."""
    names = sorted({name for group in graph.groups for name in names_of(group)})
    for option, patterns in (("overrides", overrides), ("ignore", ignore)):
        for pattern in patterns:
            matched = [g for g in graph.groups if matches(pattern, g)]
            if not matched:
                near = get_close_matches(pattern.strip("*."), names, cutoff=0.4)
                hint = f"near names: {', '.join(near)}" if near else f"names are {', '.join(names[:5])}, ..."
                raise SlimError(f"{option}: no group or producing layer is named {pattern!r}; {hint}")
            if option == "overrides" and not any(g.prunable and g.name in scored for g in matched):
                first = matched[0]
                why = "has no scores" if first.prunable else f"is frozen: {first.frozen_reason}"
                raise SlimError(f"overrides: {pattern!r} matches no group that can be cut; {first.name} {why}")


def override_width(pattern: str, value: float, group: ChannelGroup) -> int:
    """Width in the group's own channels from a keep ratio or a count of output channels."""
    each, whole = group.per_channel, group.size * group.per_channel
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and (isinstance(value, int) or is_count(value)):
        if 1 <= value <= whole and value % each == 0:
            return int(value) // each
        raise SlimError(
            f"overrides: {pattern!r} wants {value:.0f} channels of group {group.name}; expected 1 to {whole}"
            + (f", in multiples of {each}, which go together" if each > 1 else "")
        )
    if not number or not 0 < value <= 1:
        raise SlimError(
            f"overrides: {pattern!r} is {value!r}; expected a keep ratio above 0 and at most 1 (a float), or a whole number "
            "of channels (an integer)"
        )
    return max(1, int(value * group.size + 0.5))


class WidthCosts:
    """Parameters, MACs and channels of a graph as functions of how many channels each of its groups keeps.

    Channels are output channels of the producing layers, of the groups that count: those with scores.
    """

    def __init__(self, graph: ChannelGraph, constraints: list[WidthConstraint]) -> None:
        self.sizes = [constraint.group.size for constraint in constraints]
        self.each = [constraint.group.per_channel if constraint.counted else 0 for constraint in constraints]
        axes: dict[str, dict[int, list[tuple[int, int]]]] = {}
        self.touched: list[list[str]] = []
        for number, constraint in enumerate(constraints):
            # The same axis can appear in two roles (a layer that feeds itself); each position counts once.
            occupied: dict[tuple[str, int], set[int]] = {}
            for m in constraint.group.members:
                if m.param in graph.shapes:
                    occupied.setdefault((m.param, m.axis), set()).update(m.index)
            for (param, axis), positions in occupied.items():
                axes.setdefault(param, {}).setdefault(axis, []).append(
                    (number, len(positions) // constraint.group.size)
                )
            self.touched.append(list(dict.fromkeys(param for param, _ in occupied)))
        self.axes = axes
        self.shapes, self.filters = graph.shapes, graph.filters
        self.positions: dict[str, int] = {}
        for layer in graph.layers:
            self.positions[layer.weight] = self.positions.get(layer.weight, 0) + layer.positions
        self.fixed = {
            "params": sum(prod(s) for n, s in graph.shapes.items() if n not in axes and n not in graph.filters),
            "macs": graph.macs - sum(prod(graph.shapes[n]) * self.positions.get(n, 0) for n in axes),
        }

    def cost_of(self, kind: str, param: str, widths: Widths) -> int:
        """Elements (params) or MACs of a parameter when group i keeps widths[i] channels."""
        times = int(param not in self.filters) if kind == "params" else self.positions.get(param, 0)
        if not times:
            return 0
        shape = list(self.shapes[param])
        for axis, parts in self.axes[param].items():
            shape[axis] -= sum((self.sizes[n] - widths[n]) * each for n, each in parts)
        return prod(shape) * times

    def measure(self, kind: str, widths: Widths) -> int:
        """Total of ``macs``, ``params`` or ``channels``."""
        if kind == "channels":
            return sum(width * each for width, each in zip(widths, self.each, strict=True))
        return self.fixed[kind] + sum(self.cost_of(kind, param, widths) for param in self.axes)

    def change(self, kind: str, widths: Widths, number: int, width: int) -> int:
        """How much the total rises when one group goes to another width."""
        if kind == "channels":
            return (width - widths[number]) * self.each[number]
        other = [*widths[:number], width, *widths[number + 1 :]]
        return sum(self.cost_of(kind, p, other) - self.cost_of(kind, p, widths) for p in self.touched[number])


REMEDIES = {"override": "lower the overrides", "ignored": "ignore fewer groups"}


def check_reachable(
    target: Target,
    constraints: list[WidthConstraint],
    costs: WidthCosts,
    floors: Mapping[str, float],
    constrain: Callable[..., list[WidthConstraint]],
) -> None:
    """SlimError for a target below what the floors allow: how far it goes, what binds most of the rest, and what would do.

    Args:
        target: what is to come down
        constraints: the widths that each group may take
        costs: of widths
        floors: ``round_to``, ``min_channels`` and ``min_keep``
        constrain: the constraints with other floors than these
    """
    if target.kind == "threshold":
        return
    lowest = costs.measure(target.kind, [c.floor for c in constraints])
    whole = costs.measure(target.kind, costs.sizes)
    if lowest <= target.budget(whole):
        return
    least = [c.floor for c in constraints]
    gains = [(-costs.change(target.kind, least, n, 0), c.group.name, n) for n, c in enumerate(constraints)]
    order = [constraints[n] for gain, _, n in sorted(gains, reverse=True) if gain]
    binding, stuck = [c for c in order if c.counted][:5], [c for c in order if not c.counted][:3]
    named = []
    for c in binding:
        channels = c.floor * c.group.per_channel
        named.append(f"{c.group.name} ({c.bound_by}: {channels} channel{'' if channels == 1 else 's'})")
    fixed = lowest - costs.measure(target.kind, [c.floor if c.counted else 0 for c in constraints])
    note = ""
    if stuck and fixed >= 0.05 * lowest:
        reasons = ", ".join(f"{c.group.name} ({c.bound_by})" for c in stuck)
        note = f"; {fixed / whole:.3f} hangs on groups that cannot be cut: {reasons}"
    if not any(c.ranked for c in constraints):
        note += "; no group can be pruned"
    remedies = []
    for option in dict.fromkeys(c.bound_by for c in binding):
        if option in floors:
            lower = (
                n for n in lower_values(floors[option]) if reaches(target, costs, constrain(**{**floors, option: n}))
            )
            value = next(lower, None)
            remedies.append(f"lower {option}" if value is None else f"{option}={value:g} would do")
        else:
            remedies.append(REMEDIES[option])
    raise SlimError(
        f"{target} cannot be reached: with every group at its floor {lowest / whole:.3f} remains ({lowest:,} of {whole:,} "
        f"{UNITS[target.kind]}); the floors that bind most: {', '.join(named) or 'none'}{note}; "
        + ", ".join([*remedies, "or raise the target" if remedies else "raise the target"])
    )


def lower_values(value: float) -> list[float]:
    """Halves of a whole number down to 1, and of a share down to 0."""
    if isinstance(value, int):
        return [value >> n for n in range(1, value.bit_length())]
    return [value / 2, value / 4, 0.0] if value else []


def reaches(target: Target, costs: WidthCosts, constraints: list[WidthConstraint]) -> bool:
    """Whether the floors of these constraints allow the target."""
    budget = target.budget(costs.measure(target.kind, costs.sizes))
    return costs.measure(target.kind, [c.floor for c in constraints]) <= budget
