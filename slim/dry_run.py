"""The dry run: narrow the traced model for a moment and see that every layer still meets the channels that it should.

User code may hold channel counts as Python constants (``x.view(n, 64, h, w)``, ``x[:, :32]``). A forward pass of the narrow model
carries labels again; each weight must meet the same classes of channels as before, without those that went. So the check
needs no numbers: a slice that silently takes other channels is found as surely as a shape that does not fit.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from slim.channels import ChannelPropagation, Record
from slim.counts import proposals
from slim.errors import SlimError
from slim.forward import transparent_gates
from slim.graph import ChannelGraph, ChannelGroup
from slim.groups import NO_CHANNEL, build_graph, group_names
from slim.ops import KINDS
from slim.plan import GroupPlan, Plan
from slim.propagate import varying_axes
from slim.surgery import KeptIndices, kept_indices, narrow_twin

Cut = list[tuple[ChannelGroup, int]]
"""Groups to cut, each with the number of channels that it keeps."""
SIZED_BY_DATA = {"nonzero", "masked_select", "nms", "_unique2", "unique_dim"}
"""Operators whose results are as long as the data make them."""
ENOUGH_OF_A_KIND = 2
"""So many modules of one class without attributes that count channels speak for all of them."""
OTHER_OPERATORS = "the model runs other operators after a cut: its code depends on the number of channels"
OTHER_OPERATOR = "is another operator after a cut: the code depends on the number of channels"
OTHER_OUTPUTS = "an output is narrower after a cut: a part of it comes from code that cannot be followed"
OTHER_NUMBER = "computes with a channel count as a number"
OTHER_CHANNELS = "meets other channels after a cut: the code holds a channel count or an index as a constant"


@dataclass(frozen=True)
class Failure:
    """What went wrong in a dry run, the groups that had to do with it (none: unknown), and the module whose code it was."""

    reason: str
    suspects: tuple[str, ...] = ()
    path: str | None = None


def freeze_what_breaks(
    graph: ChannelGraph, owners: Tensor, run: ChannelPropagation, example_inputs: Any
) -> ChannelGraph:
    """The graph with those groups frozen that cannot lose channels, each with the reason.

    Where the code has a number of channels from an attribute, that is cut along instead.
    """
    trial = DryRun(graph, owners, run, example_inputs)
    broken: dict[str, str] = {}
    tried: Counter[type] = Counter()
    while True:
        candidates = [g for g in trial.graph.groups if g.prunable and g.size > 1 and g.name not in broken]
        failure = trial.first_failure(candidates, bool(broken))
        if failure is None:
            break
        better = trial.with_counts(failure, tried)
        if better is None:
            broken.update(trial.bisect_failures(failure, candidates))
            continue
        if broken:
            # Other groups have other names: what is broken stays so by its channels.
            for number, group in enumerate(trial.graph.groups):
                if group.name in broken:
                    run.freeze((trial.owners[:, 0] == number).nonzero().flatten(), broken[group.name])
            better = DryRun(*build_graph(run, example_inputs), run, example_inputs)
        trial, broken = better, {}
    groups = tuple(replace(g, frozen_reason=broken[g.name]) if g.name in broken else g for g in trial.graph.groups)
    return replace(trial.graph, groups=groups)


def cuts_to_try(groups: list[ChannelGroup], thorough: bool) -> Iterator[Cut]:
    """All groups, to a half and to a little more of their channels by turns: so parts of one layer show that must stay as
    wide as each other. ``thorough``: the other way round too. Small groups, which have few widths to differ in, are cut
    again, every other one of them."""
    if groups:
        yield [(g, width_to_try(g.size, n)) for n, g in enumerate(groups)]
    if groups and thorough:
        yield [(g, width_to_try(g.size, n + 1)) for n, g in enumerate(groups)]
    small = [g for g in groups if g.size < 8]
    for parity in (0, 1) if len(small) > 1 else ():
        yield [(g, width_to_try(g.size, n + 1)) for n, g in enumerate(small) if n % 2 == parity]


def width_to_try(size: int, number: int) -> int:
    """How many channels the ``number``-th group keeps: of three and more at least two, since one passes for anything."""
    half = min(max(2, size // 2), size - 1)
    return min(size - 1, half + max(1, size // 4)) if number % 2 else half


def channels_to_try(size: int, width: int, mirrored: bool) -> tuple[int, ...]:
    """That many channels: not the first one, so that constant offsets show; not in step with what takes every second to fourth
    channel. ``mirrored``: counted from the other end, so that offsets from the last one show, as a roll has."""
    keep: list[int] = list(range(1, size))
    for seed in range(8 if width < size - 1 else 0):
        keep = sorted(random.Random(size + seed).sample(range(1, size), width))
        if not any(all(k % step == n % step for n, k in enumerate(keep)) for step in (2, 3, 4)):
            break
    return tuple(sorted(size - 1 - k for k in keep)) if mirrored else tuple(keep)


class DryRun:
    """Tries cuts of a traced model; ``run`` is the propagation through the whole model, ``owners`` the groups of its labels."""

    def __init__(self, graph: ChannelGraph, owners: Tensor, run: ChannelPropagation, example_inputs: Any) -> None:
        self.graph, self.owners, self.run, self.example_inputs = graph, owners, run, example_inputs
        self.roots = run.classes.roots()
        # The number of the first operator of ``SIZED_BY_DATA``, as in a detector's choice of boxes, and the channels behind it.
        self.choice = next((n for n, (name, *_) in enumerate(run.called) if name in SIZED_BY_DATA), len(run.called))
        later = [labels for step in run.steps if step.number >= self.choice for labels in step.labels]
        self.behind_choice = [labels for labels in later if labels is not None]

    def first_failure(self, groups: list[ChannelGroup], thorough: bool, explain: bool = True) -> Failure | None:
        """What goes wrong in the first of the cuts of these groups that does not work. ``explain``: and whose channels had to do
        with it."""
        cuts = cuts_to_try(groups, thorough)
        return next((failure for cut in cuts if (failure := self.attempt(cut, explain))), None)

    def with_counts(self, failure: Failure, tried: Counter[type]) -> DryRun | None:
        """A trial in which attributes of the module that failed, or of one around it, count channels, if it fails later or
        not at all; they stay noted in ``run.counts``. ``tried``: how many modules of a kind turned out to have none."""
        path = failure.path
        while path is not None:
            kind = type(self.run.model.get_submodule(path))
            for records in proposals(self.run, path) if tried[kind] < ENOUGH_OF_A_KIND else ():
                self.run.counts += records
                other = DryRun(*build_graph(self.run, self.example_inputs), self.run, self.example_inputs)
                involved = other.group_names(torch.cat([record.labels for record in records]))
                groups = [g for g in other.graph.groups if g.name in involved and g.prunable and g.size > 1]
                again = other.first_failure(groups, True, explain=False)
                if groups and (again is None or self.begin_of(again.path) > self.begin_of(failure.path)):
                    return other
                del self.run.counts[-len(records) :]
            tried[kind] += 1
            path = path.rpartition(".")[0] if path else None
        return None

    def begin_of(self, path: str | None) -> int:
        """The number of the first operator that a module or one within it called."""
        return next((n for n, step in enumerate(self.run.steps) if is_within(step.path, path)), -1)

    def bisect_failures(self, failure: Failure, candidates: list[ChannelGroup]) -> dict[str, str]:
        """The groups that fail on their own, with the reason; all suspects where only a combination fails."""
        suspects = [g for g in candidates if g.name in failure.suspects]
        if not suspects:
            met = self.groups_met_in(failure.path)
            suspects = [g for g in candidates if g.name in met]
            if len(suspects) in (0, len(candidates)) or self.first_failure(suspects, True) is None:
                suspects = candidates
        if len(suspects) == 1:
            return {suspects[0].name: failure.reason}
        found: dict[str, str] = {}
        for half in (suspects[: len(suspects) // 2], suspects[len(suspects) // 2 :]):
            again = self.first_failure(half, True)
            if again is not None:
                found.update(self.bisect_failures(again, half))
        return found or {g.name: failure.reason for g in suspects}

    def attempt(self, cut: Cut, explain: bool) -> Failure | None:
        """Cut these groups and compare what every operator does; None when all is as it should be."""
        # Where nothing takes the channels that go by position, it does not matter which ones go, and labels are followed again
        # only to tell whose channels a failure is about, or where a narrow network's other numbers may lead elsewhere.
        last = {g.name: tuple(range(g.size - width, g.size)) for g, width in cut}
        keep, gone = self.kept_and_gone(cut, last)
        by_position = any_goes(self.run.position_sensitive, gone)
        unfollowed = None
        if not by_position and not any_goes(self.behind_choice, gone):
            unfollowed = self.attempt_with(keep, gone, muted=True)
            if unfollowed is None or unfollowed.suspects or not explain:
                return unfollowed
        for mirrored in (False, True) if by_position else (False,):
            keep, gone = self.kept_and_gone(cut, {g.name: channels_to_try(g.size, w, mirrored) for g, w in cut})
            failure = self.attempt_with(keep, gone)
            if failure is not None:
                return failure
        return unfollowed

    def kept_and_gone(self, cut: Cut, channels: dict[str, tuple[int, ...]]) -> tuple[KeptIndices, Tensor]:
        """What such a cut keeps of every tensor, and which labels are of channels that go, bool [labels]."""
        planned = tuple(GroupPlan(group.name, group.size, channels[group.name], group.members) for group, _ in cut)
        keep = kept_indices(self.run.model, Plan(planned, (0, 0), (0, 0), {}))
        gone = torch.zeros(len(self.roots), dtype=torch.bool)
        for record in self.run.records:
            kept = keep.get(record.param, {}).get(record.axis)
            if kept is not None:
                lost = torch.ones(len(record.labels), dtype=torch.bool)
                lost[kept] = False
                gone[self.roots[record.labels[lost]]] = True
        gone[0] = False
        return keep, gone[self.roots]

    def attempt_with(self, keep: KeptIndices, gone: Tensor, *, muted: bool = False) -> Failure | None:
        """Run the model without these channels, those of the labels ``gone``, and compare; ``muted``: follow no labels again."""
        again = self.run.again(narrow_twin(self.run.model, keep), muted=muted)
        try:
            with transparent_gates(again.model):
                again.run(self.example_inputs)
        except SlimError as error:
            cause = error.__cause__
            if cause is None:
                raise
            where, inputs = again.failed_at or (again.here(), [])
            text = (str(cause).strip() or repr(cause)).splitlines()[0]
            return Failure(
                f"{where or 'the model'} does not run with fewer channels ({type(cause).__name__}: {text}): a channel "
                "count is a constant there",
                self.suspects_of([x for t in inputs if (x := again.get(t)) is not None], again, keep),
                (again.failed_at or (again.where(),))[0],
            )
        shapes, others = ([t.shape for t in run.outputs] for run in (self.run, again))
        if not self.sized() and shapes != others:
            return Failure(OTHER_OUTPUTS)
        end = self.shared_path(again, gone)
        return self.compare_operators(again, gone, end) if muted else self.compare(again, keep, gone, end)

    def sized(self) -> bool:
        """Whether results of the model are as long as the data make them."""
        return self.choice < len(self.run.called)

    def shared_path(self, again: ChannelPropagation, gone: Tensor) -> int:
        """How many operators must be the same: all, or those up to where the data, not the width, chose others.

        That is behind an operator of ``SIZED_BY_DATA`` and where no channel that goes is seen any more: other numbers there say
        nothing of the code.
        """
        names, others = ([name for name, *_ in r.called] for r in (self.run, again))
        whole, shorter = max(len(names), len(others)), min(len(names), len(others))
        same = next((i for i in range(shorter) if names[i] != others[i]), shorter)
        if self.choice >= same or 0 < len(again.records) != len(self.run.records) or any_goes(self.behind_choice, gone):
            return whole
        return same

    def compare_operators(self, again: ChannelPropagation, gone: Tensor, end: int) -> Failure | None:
        """Both runs must call the same operators with the same numbers, of the first ``end`` ones, and what moves channels must
        give results of the width that is left."""
        ours, theirs = self.run.called[:end], again.called[:end]
        for (name, where, numbers), (other, _, others) in zip(ours, theirs, strict=False):
            if (name, numbers) != (other, others):
                reason = f"{name} in {where} {OTHER_NUMBER if name == other else OTHER_OPERATOR}"
                return Failure(reason, path="" if where == "the model" else where)
        if len(ours) != len(theirs):
            return Failure(OTHER_OPERATORS)
        for step in self.run.steps:
            labels = step.labels[0]
            if labels is None or KINDS.get(step.op) != "move" or len(varying_axes(labels)) != 1 or step.number >= end:
                continue
            (axis,) = varying_axes(labels)
            wanted, found = list(self.run.shapes[step.number]), list(again.shapes[step.number])
            wanted[axis] = int((~gone[labels]).sum())
            if found != wanted and not (self.sized() and found[axis : axis + 1] == [wanted[axis]]):
                return Failure(f"{step.op} in {step.where} {OTHER_CHANNELS}", self.group_names(labels), step.path)
        return None

    def compare(self, again: ChannelPropagation, keep: KeptIndices, gone: Tensor, end: int) -> Failure | None:
        """Both runs must do the same to the same channels: operator by operator of the first ``end`` ones, weight by weight,
        and unite the same ones."""
        before, after = self.roots, again.classes.roots()
        old: list[Tensor] = []
        new: list[Tensor] = []
        reasons: list[tuple[str, str]] = []
        for reason, path, labels, found in self.paired_labels(again, keep, gone, end):
            if found is None or len(labels) != len(found):
                return Failure(reason, self.group_names(labels), path)
            old.append(labels)
            new.append(found)
            reasons.append((reason, path))
        steps, others = (sum(step.number < end for step in run.steps) for run in (self.run, again))
        if steps != others or len(self.run.records) != len(again.records):
            return Failure(OTHER_OPERATORS)
        pair = torch.arange(len(old)).repeat_interleave(torch.tensor([len(x) for x in old], dtype=torch.int64))
        first, second = torch.cat([NO_CHANNEL, *old]), torch.cat([NO_CHANNEL, *new])
        bad = label_mismatch(first, second) | label_mismatch(before[first], after[second])
        if bool(bad.any()):
            reason, path = reasons[int(pair[int(bad.nonzero()[0]) - 1])]
            return Failure(reason, self.group_names(first[bad]), path)
        back = torch.zeros(len(after), dtype=torch.int64)
        back[after[second]] = before[first]
        return self.newly_frozen(again, after, back)

    def paired_labels(
        self, again: ChannelPropagation, keep: KeptIndices, gone: Tensor, end: int
    ) -> Iterator[tuple[str, str, Tensor, Tensor | None]]:
        """For each place: the message if it differs, the module, the whole model's labels without those that went, the cut
        model's."""
        for record, found, labels in self.paired_records(again, keep):
            reason = f"{record.param} {OTHER_CHANNELS}"
            path = record.param.rpartition(".")[0]
            yield reason, path, record.labels if labels is None else labels, None if labels is None else found.labels
        steps, twins = ([step for step in run.steps if step.number < end] for run in (self.run, again))
        for step, twin in zip(steps, twins, strict=False):
            there = f"{step.op} in {step.where}"
            flat, others = ([NO_CHANNEL[1:] if x is None else x.flatten() for x in s.labels] for s in (step, twin))
            if step.op != twin.op or len(flat) != len(others):
                yield f"{there} {OTHER_OPERATOR}", step.path, flat[0], None
            if step.numbers != twin.numbers:
                yield f"{there} {OTHER_NUMBER}", step.path, flat[0], None
            for labels, other in zip(flat, others, strict=False):
                yield f"{there} {OTHER_CHANNELS}", step.path, labels[~gone[labels]], other

    def paired_records(
        self, again: ChannelPropagation, keep: KeptIndices
    ) -> Iterator[tuple[Record, Record, Tensor | None]]:
        """Each record with the one that the cut model has in its place, and the labels that this should have (None: they
        are about different things)."""
        for old, new in zip(self.run.records, again.records, strict=False):
            kept = keep.get(old.param, {}).get(old.axis)
            labels = old.labels if kept is None else old.labels[kept]
            same = (old.param, old.axis, old.role, len(labels)) == (new.param, new.axis, new.role, len(new.labels))
            yield old, new, labels if same else None

    def newly_frozen(self, again: ChannelPropagation, after: Tensor, back: Tensor) -> Failure | None:
        """What the cut model freezes and the whole one does not; ``back`` leads from its classes to the whole model's."""
        frozen = {root for labels, _ in self.run.frozen for root in self.roots[labels].tolist()}
        for labels, why in again.frozen:
            newly = [root for root in back[after[labels]].tolist() if root and root not in frozen]
            if newly:
                return Failure(f"after a cut {why}", self.group_names(torch.tensor(newly)))
        unread = next((why for param, why in again.unreadable.items() if param not in self.run.unreadable), None)
        return None if unread is None else Failure(f"after a cut {unread}")

    def group_names(self, labels: Tensor) -> tuple[str, ...]:
        """The groups that hold the channels of these labels."""
        return group_names(self.graph.groups, self.owners, labels)

    def groups_met_in(self, path: str | None) -> tuple[str, ...]:
        """The groups whose channels a module and those within it met in the whole model; none where the module is unknown."""
        steps = [step for step in self.run.steps if is_within(step.path, path)]
        met = [labels.flatten() for step in steps for labels in step.inputs if labels is not None]
        return self.group_names(torch.cat([NO_CHANNEL, *met]))

    def suspects_of(self, entered: list[Tensor], again: ChannelPropagation, keep: KeptIndices) -> tuple[str, ...]:
        """The groups whose channels entered the operator that failed in the cut model."""
        if not entered:
            return ()
        after = again.classes.roots()
        wanted = torch.unique(torch.cat([after[x.flatten()] for x in entered]))
        found = [
            labels[torch.isin(after[new.labels], wanted)]
            for _, new, labels in self.paired_records(again, keep)
            if labels is not None
        ]
        return self.group_names(torch.cat(found)) if found else ()


def any_goes(met: list[Tensor], gone: Tensor) -> bool:
    """Whether a cut takes any of these channels; ``gone``: which labels it takes, bool [labels]."""
    return any(bool(gone[labels].any()) for labels in met)


def is_within(path: str, outer: str | None) -> bool:
    """Whether a module's path is another one's or lies below it; never where that one is the model itself or unknown."""
    return bool(outer) and f"{path}.".startswith(f"{outer}.")


def label_mismatch(old: Tensor, new: Tensor) -> Tensor:
    """Where two sequences of labels do not correspond one to one, 0 to 0; both begin with a 0."""
    forward, backward = (torch.zeros(int(labels.max()) + 1, dtype=torch.int64) for labels in (old, new))
    # Of several that claim one place the last one stays; all others then differ from it.
    forward[old], backward[new] = new, old
    return (forward[old] != new) | (backward[new] != old) | ((old == 0) != (new == 0))
