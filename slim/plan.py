"""A plan: which channels of which group are kept. Plain data that prints, diffs, saves and applies to any fresh copy."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from slim import chart
from slim.errors import SlimError
from slim.graph import Example, Member, Role, positions_per_channel

PLAN_VERSION = 2
MOST_POSITIONS = 1 << 22
"""No axis is longer than this: a damaged file must not fill the memory."""


@dataclass(frozen=True)
class GroupPlan:
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
    def per_channel(self) -> int:
        """How many output channels of the producing layer one channel of the group stands for."""
        return positions_per_channel(self.members, self.size)

    @property
    def widths(self) -> tuple[int, int]:
        """Output channels of the producing layer before and after."""
        return self.size * self.per_channel, len(self.keep) * self.per_channel


@dataclass(frozen=True)
class Plan:
    """Kept channels of the groups that may be cut, with MACs and parameters (gates not counted) before and after.

    ``shapes`` holds the traced network's shape of every parameter that the groups occupy, by name; ``example`` shapes and
    types of the inputs with which it was traced (None where they were no tensors by position). ``solved`` is set by
    ``make_plan`` and tells ``apply_plan`` that these very groups need no check.
    """

    groups: tuple[GroupPlan, ...]
    macs: tuple[int, int]
    params: tuple[int, int]
    shapes: dict[str, tuple[int, ...]]
    example: Example | None = None
    solved: int | None = field(default=None, compare=False, repr=False)

    def seal(self) -> Plan:
        """The same plan, marked as solved on a graph whose cut was tried. An altered copy does not pass for it."""
        return replace(self, solved=hash(self.groups))

    @property
    def sealed(self) -> bool:
        """Whether the groups are those that were sealed, in this process."""
        return self.solved is not None and self.solved == hash(self.groups)

    def then(self, later: Plan) -> Plan:
        """One plan in place of two: ``later`` was made on the network that this one leaves.

        Applied to this plan's network it gives the very weights that the two give in turn. Scores are those of the last
        round that judged the group. SlimError, naming the parameter, where ``later`` does not fit.
        """
        from slim.compose import compose

        return compose(self, later)

    def compare(self, other: Plan) -> str:
        """A table of two plans for one network: widths in both, channels that both keep, and their Jaccard overlap (kept by
        both / kept by either). SlimError when the plans are of different networks."""
        return chart.compare(self, other)

    def chart(self, width: int = 60) -> str:
        """A bar for each group, before (light) and after (solid); the widest group is ``width`` characters long."""
        return chart.bars(self, width)

    def __str__(self) -> str:
        return chart.table(self)

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
        check_version(plain)
        plain = fields_of(plain, "the plan", ("version", "macs", "params", "example", "shapes", "groups"))
        shapes = {
            name: tuple(integer(n, f"shapes[{name!r}]", 0) for n in listed(shape, f"shapes[{name!r}]"))
            for name, shape in named(plain["shapes"], "shapes").items()
        }
        groups = tuple(
            read_group(group, f"groups[{n}]", shapes) for n, group in enumerate(listed(plain["groups"], "groups"))
        )
        check_claims(groups)
        macs, params = costs_of(plain["macs"], "macs"), costs_of(plain["params"], "params")
        return Plan(groups, macs, params, shapes, example_of(plain["example"]))


def malformed(where: str, found: Any, expected: str) -> SlimError:
    """What is said of a plan's text that no ``to_json`` wrote."""
    shown = repr(found)
    return SlimError(f"not a plan: {where} is {shown if len(shown) < 60 else shown[:60] + '...'}; expected {expected}")


def check_version(plain: Any) -> None:
    version = named(plain, "the text").get("version")
    if version == 1 and version is not True:
        raise SlimError(
            "the plan has version 1, which did not record the network's shapes; make it again with prune.py "
            f"(this slim reads version {PLAN_VERSION})"
        )
    if version != PLAN_VERSION or not isinstance(version, int):
        raise SlimError(f"not a plan: its version is {version!r}; this slim reads version {PLAN_VERSION}")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise SlimError(f"not a plan: {next(k for k in keys if keys.count(k) > 1)!r} stands twice in one object")
    return found


def named(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise malformed(where, value, "an object")
    return value


def fields_of(value: Any, where: str, names: tuple[str, ...]) -> dict[str, Any]:
    """An object with exactly these fields."""
    found = named(value, where)
    if set(found) != set(names):
        missing, strange = sorted(set(names) - set(found)), sorted(set(found) - set(names))
        wrong = f"without {', '.join(missing)}" if missing else f"an object with the unknown {', '.join(strange)}"
        raise SlimError(f"not a plan: {where} is {wrong}; expected {', '.join(names)}")
    return found


def listed(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise malformed(where, value, "a list")
    return value


def integer(value: Any, where: str, least: int, most: int | None = None) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        raise malformed(where, value, f"an integer from {least}" + ("" if most is None else f" to {most}"))
    return value


def text_in(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise malformed(where, value, "a name")
    return value


def number(value: Any, where: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value != value:
        raise malformed(where, value, "a number")
    return float(value)


def costs_of(value: Any, where: str) -> tuple[int, int]:
    """[before, after]."""
    if len(listed(value, where)) != 2:
        raise malformed(where, value, "two integers, before and after")
    before = integer(value[0], where, 0)
    return before, integer(value[1], where, 0, before)


def example_of(value: Any) -> Example | None:
    """Shape and type of each input."""
    if value is None:
        return None
    found = []
    for n, pair in enumerate(listed(value, "example")):
        where = f"example[{n}]"
        if len(listed(pair, where)) != 2:
            raise malformed(where, pair, "a shape and a type")
        found.append((tuple(integer(size, where, 0) for size in listed(pair[0], where)), text_in(pair[1], where)))
    return tuple(found)


def indices(value: Any, where: str, length: int) -> tuple[int, ...]:
    """Distinct integers from 0 to ``length`` - 1, from their runs."""
    found: list[int] = []
    for n, run in enumerate(listed(value, where)):
        if len(listed(run, f"{where}[{n}]")) != 2:
            raise malformed(f"{where}[{n}]", run, "a run: [first, last + 1]")
        first = integer(run[0], f"{where}[{n}]", 0, length - 1)
        found += range(first, integer(run[1], f"{where}[{n}]", first + 1, length))
        if len(found) > length:
            break
    if not found or len(set(found)) != len(found):
        raise malformed(where, value, "some integers, each once")
    return tuple(found)


def read_group(plain: Any, where: str, shapes: dict[str, tuple[int, ...]]) -> GroupPlan:
    names = ("name", "size", "keep", "members", "score_range", "lowest_kept", "highest_removed")
    plain = fields_of(plain, where, names)
    name = text_in(plain["name"], f"{where}.name")
    where = f"group {name}: "
    size = integer(plain["size"], where + "size", 1, MOST_POSITIONS)
    keep = indices(plain["keep"], where + "keep", size)
    if list(keep) != sorted(keep):
        raise malformed(where + "keep", plain["keep"], "ascending channels")
    members = tuple(
        read_member(m, f"{where}members[{n}]", size, shapes)
        for n, m in enumerate(listed(plain["members"], where + "members"))
    )
    if not members:
        raise malformed(where + "members", [], "at least one")
    scores = plain["score_range"]
    if scores is not None:
        if len(listed(scores, where + "score_range")) != 2:
            raise malformed(where + "score_range", scores, "the lowest and the highest score")
        low, high = (number(score, where + "score_range") for score in scores)
        if low > high:
            raise malformed(where + "score_range", scores, "the lowest and the highest score")
        scores = (low, high)
    edges = [None if plain[k] is None else number(plain[k], where + k) for k in ("lowest_kept", "highest_removed")]
    return GroupPlan(name, size, keep, members, scores, *edges)


def read_member(plain: Any, where: str, size: int, shapes: dict[str, tuple[int, ...]]) -> Member:
    plain = fields_of(plain, where, ("param", "axis", "role", "index"))
    param = text_in(plain["param"], where + ".param")
    where = f"{where} ({param})"
    shape = shapes.get(param)
    axis = integer(plain["axis"], where + ".axis", 0, None if shape is None else len(shape) - 1)
    role = plain["role"]
    if role not in get_args(Role):
        raise malformed(where + ".role", role, f"one of {', '.join(get_args(Role))}")
    index = indices(plain["index"], where + ".index", MOST_POSITIONS if shape is None else shape[axis])
    if len(index) % size:
        raise malformed(where + ".index", f"{len(index)} positions long", f"a multiple of the group's {size} channels")
    return Member(param, axis, role, index)


def check_claims(groups: tuple[GroupPlan, ...]) -> None:
    """Names are unique, and each position of each axis belongs to one channel of one group."""
    names = [group.name for group in groups]
    for name in names:
        if names.count(name) > 1:
            raise SlimError(f"not a plan: two groups are named {name}")
    claims: dict[tuple[str, int], dict[int, tuple[str, int]]] = {}
    for group in groups:
        for m in group.members:
            taken = claims.setdefault((m.param, m.axis), {})
            each = len(m.index) // group.size
            for n, position in enumerate(m.index):
                owner = taken.setdefault(position, (group.name, n // each))
                if owner != (group.name, n // each):
                    raise SlimError(
                        f"not a plan: position {position} of {m.param} (axis {m.axis}) belongs to channel {owner[1]} of group "
                        f"{owner[0]} and to channel {n // each} of group {group.name}"
                    )


def to_runs(numbers: tuple[int, ...] | list[int]) -> list[list[int]]:
    """[3, 4, 5, 9] -> [[3, 6], [9, 10]]."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n:
            runs[-1][1] = n + 1
        else:
            runs.append([n, n + 1])
    return runs
