"""The dry run: narrow the traced model for a moment and see that every layer still meets the channels that it should.

User code may hold channel counts as Python constants (``x.view(n, 64, h, w)``, ``x[:, :32]``). A forward pass of the narrow model
carries labels again; each weight must meet the same classes of channels as before, without those that went. So the check
needs no numbers: a slice that silently takes other channels is found as surely as a shape that does not fit.
"""

from __future__ import annotations

import random
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
from slim.surgery import narrowed

if TYPE_CHECKING:
    from slim.trace import ChannelPropagation, Record


@dataclass(frozen=True)
class Failure:
    """What went wrong in a dry run, and the groups that had to do with it (none: unknown)."""

    reason: str
    suspects: tuple[str, ...]


def freeze_what_breaks(graph: ChannelGraph, run: ChannelPropagation, example_inputs: Any) -> ChannelGraph:
    """The graph with those groups frozen that cannot lose channels, each with the reason."""
    broken: dict[str, str] = {}
    while True:
        candidates = [g for g in graph.groups if g.prunable and g.size > 1 and g.name not in broken]
        failure = next(
            (f for keeps in dry_plans(candidates, bool(broken)) if (f := attempt(keeps, graph, run, example_inputs))),
            None,
        )
        if failure is None:
            break
        broken.update(culprits(failure, candidates, graph, run, example_inputs))
    groups = tuple(replace(g, frozen_reason=broken[g.name]) if g.name in broken else g for g in graph.groups)
    return replace(graph, groups=groups, dry_run=True)


Keeps = list[tuple[ChannelGroup, int]]
"""Groups to cut, each with the number of channels that it keeps."""


def dry_plans(groups: list[ChannelGroup], thorough: bool) -> Iterator[Keeps]:
    """All groups, to a half and to a little more of their channels by turns: so parts of one layer show that must stay as
    wide as each other. ``thorough``: the other way round too. Small groups, which have few widths to differ in, are cut
    again, every other one of them."""
    if groups:
        yield [(g, dry_width(g.size, n)) for n, g in enumerate(groups)]
    if groups and thorough:
        yield [(g, dry_width(g.size, n + 1)) for n, g in enumerate(groups)]
    small = [g for g in groups if g.size < 8]
    for parity in (0, 1) if len(small) > 1 else ():
        yield [(g, dry_width(g.size, n + 1)) for n, g in enumerate(small) if n % 2 == parity]


def dry_width(size: int, number: int) -> int:
    """How many channels the ``number``-th group keeps: of three and more at least two, since one passes for anything."""
    half = min(max(2, size // 2), size - 1)
    return min(size - 1, half + max(1, size // 4)) if number % 2 else half


def dry_keep(size: int, width: int, mirrored: bool = False) -> tuple[int, ...]:
    """That many channels: not the first one, so that constant offsets show; not in step with what takes every second to fourth
    channel. ``mirrored``: counted from the other end, so that offsets from the last one show, as a roll has."""
    keep: list[int] = list(range(1, size))
    for seed in range(8 if width < size - 1 else 0):
        keep = sorted(random.Random(size + seed).sample(range(1, size), width))
        if not any(all(k % step == place % step for place, k in enumerate(keep)) for step in (2, 3, 4)):
            break
    return tuple(sorted(size - 1 - k for k in keep)) if mirrored else tuple(keep)


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
        again = next((f for keeps in dry_plans(half, True) if (f := attempt(keeps, graph, run, inputs))), None)
        if again is not None:
            found.update(culprits(again, half, graph, run, inputs))
    return found or {g.name: failure.reason for g in suspects}


def attempt(keeps: Keeps, graph: ChannelGraph, run: ChannelPropagation, example_inputs: Any) -> Failure | None:
    """Cut these groups and compare what every operator does; None when all is as it should be."""
    # Labels are followed again only where something arranges the channels that go; else it does not matter which go.
    runs = {g.name: tuple(range(g.size - width, g.size)) for g, width in keeps}
    keep, gone = kept_and_gone(keeps, runs, run)
    if not any(bool(gone[labels].any()) for labels in run.arranged):
        return attempt_with(keep, None, keeps, graph, run, example_inputs)
    for mirrored in (False, True):
        channels = {g.name: dry_keep(g.size, width, mirrored) for g, width in keeps}
        keep, gone = kept_and_gone(keeps, channels, run)
        failure = attempt_with(keep, gone, keeps, graph, run, example_inputs)
        if failure is not None:
            return failure
    return None


def attempt_with(
    keep: Keep, gone: Tensor | None, keeps: Keeps, graph: ChannelGraph, run: ChannelPropagation, example_inputs: Any
) -> Failure | None:
    """As ``attempt``, of these channels; labels are followed where it is said which ones go."""
    with narrowed(run.model, keep):
        again = type(run)(
            run.model, allow_inexact=run.allow_inexact, depthwise=frozenset(run.depthwise), muted=gone is None
        )
        try:
            with transparent_gates(run.model):
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
    path = shared_path(run, again, graph)
    return compare_operators(run, again, path) if gone is None else compare(run, again, keep, gone, graph, path)


def kept_and_gone(keeps: Keeps, channels: dict[str, tuple[int, ...]], run: ChannelPropagation) -> tuple[Keep, Tensor]:
    """What such a cut keeps of every tensor, and which labels are of channels that go."""
    planned = tuple(GroupPlan(group.name, group.size, channels[group.name], group.members) for group, _ in keeps)
    keep = positions_kept(run.model, Plan(planned, (0, 0), (0, 0), {}))
    return keep, removed_labels(run, run.classes.roots(), keep)


SIZED_BY_DATA = {"nonzero", "masked_select", "nms", "_unique2", "unique_dim"}
"""Operators whose results are as long as the data make them."""


def shared_path(run: ChannelPropagation, again: ChannelPropagation, graph: ChannelGraph) -> int:
    """How many operators must be the same: all, or those up to where the data, not the width, chose others.

    Behind an operator of ``SIZED_BY_DATA``, as a detector's choice of boxes has one, a narrow network's other numbers may lead
    elsewhere. Where no channel that could go is met any more, that says nothing of the code.
    """
    names, others = [name for name, *_ in run.called], [name for name, *_ in again.called]
    whole = max(len(names), len(others))
    same = next(
        (i for i, pair in enumerate(zip(names, others, strict=False)) if pair[0] != pair[1]),
        min(len(names), len(others)),
    )
    chosen = next((i for i, name in enumerate(names[:same]) if name in SIZED_BY_DATA), None)
    if same == whole or chosen is None or 0 < len(again.records) != len(run.records):
        return whole
    met = [labels.flatten() for step in run.steps[chosen:] for labels in step.labels if labels is not None]
    roots = run.classes.roots()[torch.cat([torch.zeros(1, dtype=torch.int64), *met]).unique()]
    return whole if any(graph.by_name[name].prunable for name in group_names(roots[roots > 0], run, graph)) else same


def compare_operators(run: ChannelPropagation, again: ChannelPropagation, path: int) -> Failure | None:
    """Both runs must call the same operators with the same numbers, of the first ``path`` ones."""
    for (name, where, numbers), (other, _, others) in zip(run.called[:path], again.called[:path], strict=False):
        if name != other:
            return Failure(
                f"{name} in {where} is another operator after a cut: the code depends on the number of channels", ()
            )
        if numbers != others:
            return Failure(f"{name} in {where} computes with a channel count as a number", ())
    if len(run.called[:path]) != len(again.called[:path]):
        return Failure("the model runs other operators after a cut: its code depends on the number of channels", ())
    return None


def compare(
    run: ChannelPropagation, again: ChannelPropagation, keep: Keep, gone: Tensor, graph: ChannelGraph, path: int
) -> Failure | None:
    """Both runs must do the same to the same channels: operator by operator of the first ``path`` ones, weight by weight, and
    unite the same ones."""
    before, after = run.classes.roots(), again.classes.roots()
    old: list[Tensor] = []
    new: list[Tensor] = []
    reasons: list[str] = []
    for reason, labels, found in facing(run, again, keep, gone, path):
        if found is None or len(labels) != len(found):
            return Failure(reason, group_names(before[labels], run, graph))
        old.append(labels)
        new.append(found)
        reasons.append(reason)
    if len(run.steps[:path]) != len(again.steps[:path]) or len(run.records) != len(again.records):
        return Failure("the model runs other operators after a cut: its code depends on the number of channels", ())
    where = torch.arange(len(old)).repeat_interleave(torch.tensor([len(x) for x in old], dtype=torch.int64))
    first, second = (torch.cat([torch.zeros(1, dtype=torch.int64), *found]) for found in (old, new))
    bad = unlike(first, second) | unlike(before[first], after[second])
    if bool(bad.any()):
        place = int(bad.nonzero()[0]) - 1
        return Failure(reasons[int(where[place])], group_names(before[first[bad]], run, graph))
    back = torch.zeros(len(after), dtype=torch.int64)
    back[after[second]] = before[first]
    return newly_frozen(run, again, before, back, graph)


def removed_labels(run: ChannelPropagation, roots: Tensor, keep: Keep) -> Tensor:
    """Which labels are of channels that went, [labels]."""
    gone = torch.zeros(len(roots), dtype=torch.bool)
    for record in run.records:
        kept = keep.get(record.param, {}).get(record.axis)
        if kept is not None:
            lost = torch.ones(len(record.labels), dtype=torch.bool)
            lost[kept] = False
            gone[roots[record.labels[lost]]] = True
    gone[0] = False
    return gone[roots]


def facing(
    run: ChannelPropagation, again: ChannelPropagation, keep: Keep, gone: Tensor, path: int
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """What is said of the place if it is wrong, the labels there without those that went, and the cut model's."""
    nothing = torch.zeros(0, dtype=torch.int64)
    for record, found, labels in matched(run, again, keep):
        reason = (
            f"{record.param} meets other channels after a cut: the code holds a channel count or an index as a constant"
        )
        yield reason, record.labels if labels is None else labels, None if labels is None else found.labels
    for step, twin in zip(run.steps[:path], again.steps[:path], strict=False):
        there = f"{step.op} in {step.where}"
        flat = [nothing if x is None else x.flatten() for x in step.labels]
        if step.op != twin.op or len(step.labels) != len(twin.labels):
            yield f"{there} is another operator after a cut: the code depends on the number of channels", flat[0], None
        if step.numbers != twin.numbers:
            yield f"{there} computes with a channel count as a number", flat[0], None
        for labels, other in zip(flat, twin.labels, strict=False):
            reason = (
                f"{there} meets other channels after a cut: the code holds a channel count or an index as a constant"
            )
            yield reason, labels[~gone[labels]], nothing if other is None else other.flatten()


def unlike(old: Tensor, new: Tensor) -> Tensor:
    """Where two sequences of labels do not correspond one to one, 0 to 0; both begin with a 0."""
    forward, backward = (
        torch.zeros(int(old.max()) + 1, dtype=torch.int64),
        torch.zeros(int(new.max()) + 1, dtype=torch.int64),
    )
    # Of several that claim one place the last one stays; all others then differ from it.
    forward[old], backward[new] = new, old
    return (forward[old] != new) | (backward[new] != old) | ((old == 0) != (new == 0))


def newly_frozen(
    run: ChannelPropagation, again: ChannelPropagation, before: Tensor, back: Tensor, graph: ChannelGraph
) -> Failure | None:
    """What the cut model freezes and the whole one does not; ``back`` leads from its classes to the whole model's."""
    after = again.classes.roots()
    spared = {root for labels, _ in run.frozen for root in before[labels].tolist()}
    for labels, why in again.frozen:
        newly = [root for root in back[after[labels]].tolist() if root and root not in spared]
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
