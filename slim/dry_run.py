"""The dry run: cut a copy of the traced model and see that every layer still meets the channels that it should.

User code may hold channel counts as Python constants (``x.view(n, 64, h, w)``, ``x[:, :32]``). A forward pass of the cut copy
carries labels again; each weight must meet the same classes of channels as before, without those that went. So the check
needs no numbers: a slice that silently takes other channels is found as surely as a shape that does not fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slim.errors import SlimError
from slim.graph import ChannelGraph, ChannelGroup
from slim.groups import Classes
from slim.plan import GroupPlan, Plan
from slim.propagate import transparent_gates
from slim.slicing import Keep, positions_kept
from slim.surgery import cut

if TYPE_CHECKING:
    from slim.trace import ChannelPropagation, Record


@dataclass(frozen=True)
class Failure:
    """What went wrong in a dry run, and the groups that had to do with it (none: unknown)."""

    reason: str
    suspects: tuple[str, ...]


def freeze_what_breaks(graph: ChannelGraph, run: ChannelPropagation, example_inputs: Any) -> ChannelGraph:
    """The graph with those groups frozen that cannot lose channels, each with the reason."""
    candidates = [g for g in graph.groups if g.prunable and g.size > 1]
    broken: dict[str, str] = {}
    while candidates:
        failure = attempt(candidates, graph, run, example_inputs)
        if failure is None:
            break
        found = culprits(failure, candidates, graph, run, example_inputs)
        broken.update(found)
        candidates = [g for g in candidates if g.name not in broken]
    if not broken:
        return graph
    groups = tuple(replace(g, frozen_reason=broken[g.name]) if g.name in broken else g for g in graph.groups)
    return replace(graph, groups=groups)


def culprits(
    failure: Failure, candidates: list[ChannelGroup], graph: ChannelGraph, run: ChannelPropagation, inputs: Any
) -> dict[str, str]:
    """The groups that fail on their own, with the reason; all suspects where only a combination fails."""
    suspects = [g for g in candidates if g.name in failure.suspects] or candidates
    if len(suspects) == 1:
        return {suspects[0].name: failure.reason}
    halves = [suspects[: len(suspects) // 2], suspects[len(suspects) // 2 :]]
    found: dict[str, str] = {}
    for half in halves:
        again = attempt(half, graph, run, inputs)
        if again is not None:
            found.update(culprits(again, half, graph, run, inputs))
    return found or {g.name: failure.reason for g in suspects}


def attempt(
    groups: list[ChannelGroup], graph: ChannelGraph, run: ChannelPropagation, example_inputs: Any
) -> Failure | None:
    """Cut these groups to about half and compare what every layer meets; None when all is as it should be."""
    plan = Plan(tuple(GroupPlan(g.name, g.size, dry_keep(g.size), g.members) for g in groups), (0, 0), (0, 0), {})
    keep = positions_kept(run.model, plan)
    narrow = cut(run.model, plan, keep)
    again = type(run)(narrow, allow_inexact=run.allow_inexact, depthwise=frozenset(run.depthwise))
    try:
        with transparent_gates(narrow):
            again.run(example_inputs)
    except SlimError as error:
        cause = error.__cause__
        met = [x for t in (again.failed_at or ("", []))[1] if (x := again.get(t)) is not None]
        names = suspects_of(met, run, again, keep, graph)
        text = (str(cause).strip() or repr(cause)).splitlines()[0]
        where = (again.failed_at or (again.here(), []))[0] or "the model"
        return Failure(
            f"{where} does not run with fewer channels ({type(cause).__name__}: {text}): a channel count is a constant there",
            names,
        )
    return compare(run, again, keep, graph)


def dry_keep(size: int) -> tuple[int, ...]:
    """About half of the channels: not the first one, so that constant offsets show; an odd number, since few constant
    sizes divide it; of three and more never a single one, which could pass for something else."""
    keep = tuple(range(1, size, 2))
    if len(keep) % 2 == 0 and len(keep) > 2:
        keep = keep[:-1]
    return keep if len(keep) > 1 or size < 3 else tuple(range(1, size))


def compare(run: ChannelPropagation, again: ChannelPropagation, keep: Keep, graph: ChannelGraph) -> Failure | None:
    """Both runs must have the same records, and classes that correspond one to one; nothing else may be frozen."""
    before, after = run.classes.roots(), again.classes.roots()
    forward, backward = torch.full((len(before),), -1), torch.full((len(after),), -1)
    for record, found, labels in matched(run, again, keep):
        reason = (
            f"{record.param} meets other channels after a cut: the code holds a channel count or an index as a constant"
        )
        if labels is None:
            return Failure(reason, group_names(before[record.labels], run, graph))
        old, new = before[labels], after[found.labels]
        fresh = forward[old] < 0
        forward[old[fresh]] = new[fresh]
        fresh = backward[new] < 0
        backward[new[fresh]] = old[fresh]
        bad = (forward[old] != new) | (backward[new] != old) | ((old == 0) != (new == 0))
        if bool(bad.any()):
            return Failure(reason, group_names(old[bad], run, graph))
    if len(run.records) != len(again.records):
        return Failure("the model calls other layers after a cut: its code depends on the number of channels", ())
    spared = set(torch.cat([torch.zeros(0, dtype=torch.int64), *[before[labels] for labels, _ in run.frozen]]).tolist())
    for labels, why in again.frozen:
        newly = [root for root in backward[after[labels]].tolist() if root > 0 and root not in spared]
        if newly:
            return Failure(f"after a cut {why}", group_names(torch.tensor(newly), run, graph))
    unread = next((why for param, why in again.unreadable.items() if param not in run.unreadable), None)
    return None if unread is None else Failure(f"after a cut {unread}", ())


def matched(
    run: ChannelPropagation, again: ChannelPropagation, keep: Keep
) -> Iterator[tuple[Record, Record, Tensor | None]]:
    """Each record with the one that the cut model has in its place, and the labels that this should have (None: they
    are about different things)."""
    for old, new in zip(run.records, again.records, strict=False):
        kept = keep.get(old.param, {}).get(old.axis)
        labels = old.labels if kept is None else old.labels[kept]
        same = (old.param, old.axis, old.role, len(labels)) == (new.param, new.axis, new.role, len(new.labels))
        yield old, new, labels if same else None


def group_names(roots: Tensor, run: ChannelPropagation, graph: ChannelGraph) -> tuple[str, ...]:
    """The groups that hold these classes."""
    holders = {(m.param, m.axis, i): g.name for g in graph.groups for m in g.members for i in m.index}
    classes = Classes(run)
    names: dict[str, None] = {}
    for start in classes.start[torch.isin(classes.root, roots)].tolist():
        param, axis, _ = classes.keys[int(classes.record[start])]
        names[holders.get((param, axis, int(classes.index[start])), "")] = None
    return tuple(name for name in names if name)


def suspects_of(
    met: list[Tensor], run: ChannelPropagation, again: ChannelPropagation, keep: Keep, graph: ChannelGraph
) -> tuple[str, ...]:
    """The groups whose channels entered the operator that failed in the cut model."""
    if not met:
        return ()
    after = again.classes.roots()
    wanted = torch.unique(torch.cat([after[x.flatten()] for x in met]))
    found = [
        labels[torch.isin(after[new.labels], wanted)]
        for _, new, labels in matched(run, again, keep)
        if labels is not None
    ]
    return group_names(run.classes.roots()[torch.cat(found)], run, graph) if found else ()
