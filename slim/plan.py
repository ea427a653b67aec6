"""A plan: which channels of which group are kept. Plain data that prints, is written as JSON and applies to any fresh copy."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from slim.errors import SlimError
from slim.graph import Channels, Example, Member

PLAN_VERSION = 2
MOST_POSITIONS = 1 << 22
"""No plan lists more channels and positions than this: a damaged file must not fill the memory."""


@dataclass(frozen=True)
class GroupPlan(Channels):
    """The channels kept of one group, ascending, and where the group's channels live.

    ``score_range`` is the lowest and the highest score of all its channels.
    """

    name: str
    size: int
    keep: tuple[int, ...]
    members: tuple[Member, ...]
    score_range: tuple[float, float] | None = None
    lowest_kept: float | None = None
    highest_removed: float | None = None

    @property
    def removed(self) -> tuple[int, ...]:
        """The channels that go, ascending."""
        kept = set(self.keep)
        return tuple(k for k in range(self.size) if k not in kept)

    @property
    def widths(self) -> tuple[int, int]:
        """Output channels of the producing layer before and after."""
        return self.size * self.per_channel, len(self.keep) * self.per_channel


@dataclass(frozen=True)
class Plan:
    """Kept channels of the groups that may be cut, made by ``slim.make_plan``.

    Args:
        groups: what is kept of each group
        macs: multiply-accumulates of one image before and after
        params: learnable parameters before and after, gates not counted
        shapes: the traced network's shape of every parameter that the groups occupy, by name
        example: shapes and types of the inputs with which it was traced; None where they were no tensors by position

    Examples:
        >>> import slim, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
        >>> graph = slim.trace(model, torch.zeros(1, 3, 8, 8))
        >>> scores = {"0": torch.tensor([0.9, 0.1, 0.7, 0.2])}
        >>> plan = slim.make_plan(graph, scores, channels=0.5, round_to=1, min_channels=1)
        >>> print(plan)
        group  before  after   kept  scores                highest out    lowest in
        0           4      2  50.0%  0.1 .. 0.9                    0.2          0.7
        MACs 0.0 M -> 0.0 M (50.0%), parameters 0.000 M -> 0.000 M (50.8%), channels 4 -> 2 (50.0%)
        >>> slim.Plan.from_json(plan.to_json()) == plan
        True
    """

    groups: tuple[GroupPlan, ...]
    macs: tuple[int, int]
    params: tuple[int, int]
    shapes: dict[str, tuple[int, ...]]
    example: Example | None = None
    traced: bool = field(default=False, init=False, compare=False, repr=False)
    """Whether the groups are known to be those of a trace; others are compared with one before anything is cut."""

    def known_from_trace(self) -> Plan:
        """This plan, marked as made of what a trace found."""
        object.__setattr__(self, "traced", True)
        return self

    def __str__(self) -> str:
        """Each group's width before and after, and its scores: all, the highest that goes, the lowest that stays; totals."""
        width = max([5, *(len(g.name) for g in self.groups)])
        lines = [f"{'group':<{width}}  before  after   kept  {'scores':<20}  {'highest out':>11}  {'lowest in':>11}"]
        for g in self.groups:
            before, after = g.widths
            scores = "" if g.score_range is None else f"{g.score_range[0]:.3g} .. {g.score_range[1]:.3g}"
            highest, lowest = ("" if s is None else f"{s:.3g}" for s in (g.highest_removed, g.lowest_kept))
            row = f"{g.name:<{width}}  {before:>6}  {after:>5}  {percent(after, before):>5}  {scores:<20}  "
            lines.append((row + f"{highest:>11}  {lowest:>11}").rstrip())
        (m0, m1), (p0, p1) = self.macs, self.params
        c0, c1 = (sum(g.widths[when] for g in self.groups) for when in (0, 1))
        lines.append(
            f"MACs {m0 / 1e6:.1f} M -> {m1 / 1e6:.1f} M ({percent(m1, m0)}), parameters {p0 / 1e6:.3f} M -> "
            f"{p1 / 1e6:.3f} M ({percent(p1, p0)}), channels {c0} -> {c1} ({percent(c1, c0)})"
        )
        return "\n".join(lines)

    def to_json(self) -> str:
        """Versioned JSON; runs of consecutive integers are written as [first, last + 1] pairs."""
        groups = [
            {
                "name": g.name,
                "size": g.size,
                "keep": to_runs(g.keep),
                "members": [
                    {"param": m.param, "axis": m.axis, "role": m.role, "index": to_runs(m.index)} for m in g.members
                ],
                "score_range": g.score_range,
                "lowest_kept": g.lowest_kept,
                "highest_removed": g.highest_removed,
            }
            for g in self.groups
        ]
        costs = {"macs": self.macs, "params": self.params, "example": self.example}
        return json.dumps({"version": PLAN_VERSION, **costs, "shapes": self.shapes, "groups": groups}, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """The inverse of ``to_json``; SlimError that says what and where when the text is no plan of this version."""
        try:
            plain = json.loads(text, object_pairs_hook=unique_keys)
        except SlimError:
            raise
        except (ValueError, TypeError, RecursionError) as error:
            raise SlimError(
                f"not a plan: {type(error).__name__} {error}; expected what Plan.to_json() wrote"
            ) from error
        version = plain.pop("version", None) if isinstance(plain, dict) else None
        if version == 1 and version is not True:
            raise SlimError(
                "the plan has version 1, which did not record the network's shapes; make it again with prune.py "
                f"(this slim reads version {PLAN_VERSION})"
            )
        if version != PLAN_VERSION or not isinstance(version, int):
            raise SlimError(f"not a plan: its version is {version!r}; this slim reads version {PLAN_VERSION}")
        if (total := listed_positions(plain)) > MOST_POSITIONS:
            raise SlimError(f"not a plan: it lists {total} channels and positions, expected at most {MOST_POSITIONS}")
        plan: Plan = decode(Plan, plain, "the plan")
        check_plan(plan)
        return plan


def percent(part: int, whole: int) -> str:
    """A share as it stands in tables."""
    return f"{part / whole:.1%}" if whole else "-"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise SlimError(f"not a plan: {next(k for k in keys if keys.count(k) > 1)!r} stands twice in one object")
    return found


def malformed(where: str, found: Any, expected: str) -> SlimError:
    """What is said of a plan's text that no ``to_json`` wrote."""
    shown = repr(found)
    return SlimError(f"not a plan: {where} is {shown if len(shown) < 60 else shown[:60] + '...'}; expected {expected}")


SCALARS = {int: "an integer of at least 0", float: "a number", str: "a name"}


def decode(kind: Any, value: Any, where: str) -> Any:
    """A value of the type ``kind`` from its JSON form; SlimError that names the place where it is of another type."""
    options = get_args(kind)
    if kind in SCALARS:
        right = type(value) is kind or (kind is float and type(value) is int)
        if not right or value != value or (kind is int and value < 0) or value == "":
            raise malformed(where, value, SCALARS[kind])
        return kind(value)
    if get_origin(kind) is UnionType:
        return None if value is None else decode(options[0], value, where)
    if get_origin(kind) is Literal:
        if value not in options:
            raise malformed(where, value, f"one of {', '.join(options)}")
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise malformed(where, value, "a list")
        kinds = [options[0]] * len(value) if options[-1] is ... else options
        if len(kinds) != len(value):
            raise malformed(where, value, f"{len(kinds)} values")
        return tuple(decode(k, v, f"{where}[{n}]") for n, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if not isinstance(value, dict):
        raise malformed(where, value, "an object")
    if not is_dataclass(kind):
        return {key: decode(options[1], v, f"{where}[{key!r}]") for key, v in value.items()}
    names = [f.name for f in fields(kind) if f.init]
    if set(value) != set(names):
        missing, unknown = sorted(set(names) - set(value)), sorted(set(value) - set(names))
        wrong = f"without {', '.join(missing)}" if missing else f"an object with the unknown {', '.join(unknown)}"
        raise SlimError(f"not a plan: {where} is {wrong}; expected {', '.join(names)}")
    hints = get_type_hints(kind)
    values = {n: (from_runs if n in ("keep", "index") else decode)(hints[n], value[n], f"{where}.{n}") for n in names}
    return kind(**values)  # type: ignore[operator]


def from_runs(kind: Any, value: Any, where: str) -> tuple[int, ...]:
    """Distinct integers from their runs, see ``to_runs``."""
    runs: tuple[tuple[int, int], ...] = decode(tuple[tuple[int, int], ...], value, where)
    if not runs or any(not 0 < end - first <= MOST_POSITIONS for first, end in runs):
        raise malformed(where, value, "runs of integers, [first, last + 1]")
    found = tuple(n for first, end in runs for n in range(first, end))
    if len(set(found)) < len(found):
        raise malformed(where, value, "some integers, each once")
    return found


def listed_positions(value: Any) -> int:
    """How many integers the runs in a plan's JSON stand for, without making them; malformed runs count nothing."""
    if isinstance(value, list):
        return sum(map(listed_positions, value))
    if not isinstance(value, dict):
        return 0
    runs = [run for key in ("keep", "index") if isinstance(value.get(key), list) for run in value[key]]
    pairs = [run for run in runs if isinstance(run, list) and len(run) == 2 and all(type(n) is int for n in run)]
    own: int = sum(end - first for first, end in pairs if 0 < end - first <= MOST_POSITIONS)
    return own + sum(map(listed_positions, value.values()))


def to_runs(numbers: tuple[int, ...] | list[int]) -> list[list[int]]:
    """[3, 4, 5, 9] -> [[3, 6], [9, 10]]."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n:
            runs[-1][1] = n + 1
        else:
            runs.append([n, n + 1])
    return runs


def check_plan(plan: Plan) -> None:
    """SlimError where the values of a plan do not fit each other."""
    for what, (before, after) in (("macs", plan.macs), ("params", plan.params)):
        if after > before:
            raise malformed(what, [before, after], "at most as many after as before")
    if len({g.name for g in plan.groups}) < len(plan.groups):
        raise malformed("the list of groups' names", [g.name for g in plan.groups], "each name once")
    owners: dict[tuple[str, int], dict[int, tuple[str, int]]] = {}
    for g in plan.groups:
        if not 1 <= g.size <= MOST_POSITIONS:
            raise malformed(f"group {g.name}: size", g.size, f"1 to {MOST_POSITIONS} channels")
        if list(g.keep) != sorted(g.keep) or g.keep[-1] >= g.size:
            raise malformed(f"group {g.name}: keep", to_runs(g.keep), f"ascending channels below {g.size}")
        if not g.members:
            raise malformed(f"group {g.name}: members", [], "at least one")
        if g.score_range is not None and g.score_range[0] > g.score_range[1]:
            raise malformed(f"group {g.name}: score_range", g.score_range, "the lowest and the highest score")
        for m in g.members:
            shape = plan.shapes.get(m.param)
            if shape is not None and m.axis >= len(shape):
                raise malformed(f"group {g.name}: the axis of {m.param}", m.axis, f"below {len(shape)}")
            length = MOST_POSITIONS if shape is None else min(shape[m.axis], MOST_POSITIONS)
            if max(m.index) >= length or len(m.index) % g.size:
                expected = f"positions below {length}, equally many for each of {g.size} channels"
                raise malformed(f"group {g.name}: the index of {m.param}", to_runs(m.index), expected)
            taken, each = owners.setdefault((m.param, m.axis), {}), len(m.index) // g.size
            for n, position in enumerate(m.index):
                owner = taken.setdefault(position, (g.name, n // each))
                if owner != (g.name, n // each):
                    raise SlimError(
                        f"not a plan: position {position} of {m.param} (axis {m.axis}) belongs to channel {owner[1]} of group "
                        f"{owner[0]} and to channel {n // each} of group {g.name}"
                    )
