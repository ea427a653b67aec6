"""Plans as text: a table, a comparison of two, and bars. Widths are output channels of the layers that produce them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slim.errors import SlimError

if TYPE_CHECKING:
    from slim.plan import GroupPlan, Plan

SOLID, LIGHT = "█", "░"


def table(plan: Plan) -> str:
    """Each group's width before and after, and its scores: all, the highest that goes, the lowest that stays; then totals."""
    width = name_width(plan)
    lines = [f"{'group':<{width}}  before  after   kept  {'scores':<20}  {'highest out':>11}  {'lowest in':>11}"]
    for g in plan.groups:
        before, after = g.widths
        scores = "" if g.score_range is None else f"{g.score_range[0]:.3g} .. {g.score_range[1]:.3g}"
        row = f"{g.name:<{width}}  {before:>6}  {after:>5}  {share(after, before):>5}  {scores:<20}  "
        lines.append((row + f"{shown(g.highest_removed):>11}  {shown(g.lowest_kept):>11}").rstrip())
    (m0, m1), (p0, p1) = plan.macs, plan.params
    c0, c1 = (sum(g.widths[when] for g in plan.groups) for when in (0, 1))
    lines.append(
        f"MACs {m0 / 1e6:.1f} M -> {m1 / 1e6:.1f} M ({share(m1, m0)}), parameters {p0 / 1e6:.3f} M -> {p1 / 1e6:.3f} M "
        f"({share(p1, p0)}), channels {c0} -> {c1} ({share(c1, c0)})"
    )
    return "\n".join(lines)


def bars(plan: Plan, width: int) -> str:
    """One bar for each group: solid what stays, light what goes; the widest group fills ``width`` characters."""
    if width < 1:
        raise SlimError(f"width={width}: expected at least 1 character")
    names = name_width(plan)
    widest = max((g.widths[0] for g in plan.groups), default=1)
    lines = []
    for g in plan.groups:
        before, after = g.widths
        length, solid = (max(1, round(width * w / widest)) for w in (before, after))
        bar = SOLID * solid + LIGHT * (length - solid)
        lines.append(f"{g.name:<{names}}  {bar:<{width}}  {before:>5} -> {after:>5}  {share(after, before):>6}")
    return "\n".join(lines)


def compare(first: Plan, second: Plan) -> str:
    """Two plans for one network, group by group; SlimError when the networks differ."""
    check_same_network(first, second)
    others = {g.name: g for g in second.groups}
    names = list(dict.fromkeys([*(g.name for g in first.groups), *others]))
    width = max([5, *map(len, names)])
    lines = [f"{'group':<{width}}  before  first  second  both  overlap"]
    firsts = {g.name: g for g in first.groups}
    for name in names:
        a, b = firsts.get(name), others.get(name)
        if a is not None and b is not None:
            both, either = set(a.keep) & set(b.keep), set(a.keep) | set(b.keep)
            counts = (
                f"{a.widths[1]:>5}  {b.widths[1]:>6}  {len(both) * a.per_channel:>4}  {len(both) / len(either):>7.3f}"
            )
            lines.append(f"{name:<{width}}  {a.widths[0]:>6}  {counts}")
        elif a is not None:
            lines.append(f"{name:<{width}}  {a.widths[0]:>6}  {a.widths[1]:>5}  {'-':>6}  only in the first")
        elif b is not None:
            lines.append(f"{name:<{width}}  {b.widths[0]:>6}  {'-':>5}  {b.widths[1]:>6}  only in the second")
    for label, unit, one, two in (
        ("MACs", 1, first.macs, second.macs),
        ("parameters", 3, first.params, second.params),
    ):
        ends = " and ".join(f"{after / 1e6:.{unit}f} M ({share(after, before)})" for before, after in (one, two))
        lines.append(f"{label} {one[0] / 1e6:.{unit}f} M -> {ends}")
    return "\n".join(lines)


def check_same_network(first: Plan, second: Plan) -> None:
    """SlimError where two plans cannot have been made for one network."""
    for param, shape in first.shapes.items():
        if second.shapes.get(param, shape) != shape:
            raise SlimError(
                f"the plans are of different networks: {param} has shape {shape} in the first, {second.shapes[param]} in the "
                "second"
            )
    if first.params[0] != second.params[0]:
        raise SlimError(f"the plans are of different networks: of {first.params[0]} and {second.params[0]} parameters")
    others = {g.name: g for g in second.groups}
    for group in first.groups:
        other = others.get(group.name, group)
        if places(group) != places(other):
            raise SlimError(
                f"the plans are of different networks: group {group.name} of {group.size} channels and of {other.size} does "
                "not occupy the same positions; trace both alike"
            )


def places(group: GroupPlan) -> tuple[int, dict[tuple[str, int], tuple[int, ...]]]:
    """The group's size and what its channels occupy."""
    return group.size, {(m.param, m.axis): m.index for m in group.members}


def name_width(plan: Plan) -> int:
    return max([5, *(len(g.name) for g in plan.groups)])


def share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def shown(score: float | None) -> str:
    return "" if score is None else f"{score:.3g}"
