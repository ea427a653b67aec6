"""A plan: which channels of which group are kept. Plain data that prints, diffs, saves and applies to any fresh copy."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from slim.errors import SlimError
from slim.graph import Member

PLAN_VERSION = 1


@dataclass(frozen=True)
class GroupPlan:
    """The channels kept of one group, ascending, and where the group's channels live."""

    name: str
    size: int
    keep: tuple[int, ...]
    members: tuple[Member, ...]
    score_range: tuple[float, float] | None = None

    @property
    def removed(self) -> tuple[int, ...]:
        """The channels that go, ascending."""
        kept = set(self.keep)
        return tuple(k for k in range(self.size) if k not in kept)


@dataclass(frozen=True)
class Plan:
    """Every prunable group's kept channels, with MACs and parameters (gates not counted) before and after."""

    groups: tuple[GroupPlan, ...]
    macs: tuple[int, int]
    params: tuple[int, int]

    def to_json(self) -> str:
        """Versioned JSON; runs of consecutive integers are written as [first, last + 1] pairs."""
        plain = asdict(self)
        for group in plain["groups"]:
            group["keep"] = to_runs(group["keep"])
            for member in group["members"]:
                member["index"] = to_runs(member["index"])
        return json.dumps({"version": PLAN_VERSION, **plain}, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """The inverse of ``to_json``; SlimError when the text is no plan of this version."""
        try:
            plain = json.loads(text)
            if plain["version"] != PLAN_VERSION:
                raise SlimError(f"the plan has version {plain['version']}; this slim reads version {PLAN_VERSION}")
            groups = tuple(group_from_plain(group) for group in plain["groups"])
            return Plan(groups, pair(plain["macs"]), pair(plain["params"]))
        except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
            raise SlimError(
                f"not a plan: {type(error).__name__} {error}; expected what Plan.to_json() wrote"
            ) from error

    def __str__(self) -> str:
        width = max([5, *(len(g.name) for g in self.groups)])
        lines = [f"{'group':<{width}}  before  after  scores"]
        for g in self.groups:
            scores = "" if g.score_range is None else f"{g.score_range[0]:.3g} .. {g.score_range[1]:.3g}"
            lines.append(f"{g.name:<{width}}  {g.size:>6}  {len(g.keep):>5}  {scores}")
        (m0, m1), (p0, p1) = self.macs, self.params
        lines.append(
            f"MACs {m0 / 1e6:.1f} M -> {m1 / 1e6:.1f} M ({m1 / m0:.1%}), "
            f"parameters {p0 / 1e6:.3f} M -> {p1 / 1e6:.3f} M ({p1 / p0:.1%})"
        )
        return "\n".join(lines)


def group_from_plain(plain: dict[str, Any]) -> GroupPlan:
    members = tuple(
        Member(m["param"], int(m["axis"]), m["role"], tuple(from_runs(m["index"]))) for m in plain["members"]
    )
    scores = plain.get("score_range")
    keep, size = tuple(from_runs(plain["keep"])), int(plain["size"])
    if any(not 0 <= k < size for k in keep) or len(set(keep)) != len(keep) or not keep:
        raise SlimError(f"group {plain['name']}: keep must name some of the channels 0 to {size - 1}, each once")
    return GroupPlan(plain["name"], size, keep, members, None if scores is None else (scores[0], scores[1]))


def pair(values: list[int]) -> tuple[int, int]:
    return int(values[0]), int(values[1])


def to_runs(numbers: tuple[int, ...] | list[int]) -> list[list[int]]:
    """[3, 4, 5, 9] -> [[3, 6], [9, 10]]."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n:
            runs[-1][1] = n + 1
        else:
            runs.append([n, n + 1])
    return runs


def from_runs(runs: list[list[int]]) -> list[int]:
    """The inverse of ``to_runs``."""
    return [n for first, end in runs for n in range(first, end)]
