"""From the labels of a finished propagation to groups: classes of united labels that occur alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from slim.gate import Gate
from slim.graph import ChannelGraph, ChannelGroup, FreezingOp, Member, Role
from slim.sites import find_sites

if TYPE_CHECKING:
    from slim.trace import ChannelPropagation

Key = tuple[str, int, Role]


class Classes:
    """Every occurrence of a label in the records, sorted by the class that it belongs to."""

    def __init__(self, run: ChannelPropagation) -> None:
        self.roots = run.classes.roots()
        self.keys: list[Key] = [(r.param, r.axis, r.role) for r in run.records]
        sizes = torch.tensor([len(r.labels) for r in run.records])
        labels = torch.cat([r.labels for r in run.records]) if run.records else torch.zeros(0, dtype=torch.int64)
        numbers = torch.arange(len(sizes)).repeat_interleave(sizes)
        index = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        present = labels.nonzero().flatten()
        place = self.roots[labels[present]]
        order = torch.sort(place, stable=True).indices
        self.record = numbers[present][order]
        self.index = index[present][order]
        found, counts = torch.unique_consecutive(place[order], return_counts=True)
        starts = counts.cumsum(0) - counts
        # Classes in the order in which they first occur.
        first = torch.sort(order[starts]).indices
        self.root, self.start, self.count = found[first], starts[first], counts[first]


def build_graph(run: ChannelPropagation, example_inputs: Any) -> ChannelGraph:
    """Classes of united labels, gathered into groups of channels that occur alike."""
    classes = Classes(run)
    frozen, inexact = reasons(run, classes), first_reasons(run.inexact, classes.roots)
    records = classes.record.tolist()
    alike: dict[tuple[Any, ...], list[int]] = {}
    for number, (root, start, count) in enumerate(
        zip(classes.root.tolist(), classes.start.tolist(), classes.count.tolist(), strict=True)
    ):
        met = tuple(classes.keys[r] for r in records[start : start + count])
        alike.setdefault((met, frozen.get(root), inexact.get(root)), []).append(number)
    groups: list[ChannelGroup] = []
    home = torch.full((len(classes.roots), 2), -1)
    for (keys, reason, mixed), numbers in alike.items():
        if not any(role in ("out", "depthwise") for _, _, role in keys):
            continue
        chosen = torch.tensor(numbers)
        members = gather_members(keys, classes.index[classes.start[chosen].unsqueeze(1) + torch.arange(len(keys))])
        producer = next(m for m in members if m.role in ("out", "depthwise"))
        home[classes.root[chosen]] = torch.stack([torch.full_like(chosen, len(groups)), torch.arange(len(chosen))], 1)
        groups.append(ChannelGroup(unique_name(producer.layer, groups), len(numbers), members, reason, mixed))
    home = home[classes.roots]
    return ChannelGraph(
        groups=tuple(groups),
        layers=tuple(run.layers),
        shapes=learnable_shapes(run.model),
        sites=tuple(find_sites(run, home)),
        freezing_ops=tuple(freezing_ops(run, home, groups)),
        example=example_spec(example_inputs),
        unused=unused_layers(run),
    )


def first_reasons(said: list[tuple[Tensor, str]], roots: Tensor) -> dict[int, str]:
    """The first reason given for each class."""
    found: dict[int, str] = {}
    for labels, reason in said:
        for root in roots[labels[labels != 0]].tolist():
            found.setdefault(root, reason)
    return found


def reasons(run: ChannelPropagation, classes: Classes) -> dict[int, str]:
    """Why each frozen class is frozen."""
    found = first_reasons(run.frozen, classes.roots)
    kept = [(r.labels, run.unreadable[r.param]) for r in run.records if r.param in run.unreadable]
    return {**first_reasons(kept, classes.roots), **found}


def gather_members(keys: Sequence[Key], index: Tensor) -> tuple[Member, ...]:
    """One member per (parameter, axis, role) from index [channels, occurrences]; each position once."""
    columns: dict[Key, list[int]] = {}
    for column, key in enumerate(keys):
        columns.setdefault(key, []).append(column)
    members = []
    for (param, axis, role), numbers in columns.items():
        met = index[:, numbers]
        if len(numbers) > 1:
            rows = [list(dict.fromkeys(row)) for row in met.tolist()]
            members.append(Member(param, axis, role, tuple(i for row in rows for i in row)))
        else:
            members.append(Member(param, axis, role, tuple(met.flatten().tolist())))
    return tuple(members)


def unique_name(path: str, groups: list[ChannelGroup]) -> str:
    """The producing layer's path, numbered when it makes channels of several groups."""
    taken = {group.name for group in groups}
    name, number = path, 1
    while name in taken:
        number += 1
        name = f"{path}#{number}"
    return name


def learnable_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter that is not a gate's."""
    gates = {id(p) for m in model.modules() if isinstance(m, Gate) for p in m.parameters()}
    return {name: tuple(p.shape) for name, p in model.named_parameters() if id(p) not in gates}


def unused_layers(run: ChannelPropagation) -> tuple[str, ...]:
    """Layers none of whose parameters any operator met; gates are looked through and do not count."""
    met = {name.rpartition(".")[0] for key, name in run.tensors.items() if key in run.met}
    layers = dict.fromkeys(name.rpartition(".")[0] for name in learnable_shapes(run.model))
    return tuple(layer for layer in layers if layer not in met)


def freezing_ops(run: ChannelPropagation, home: Tensor, groups: list[ChannelGroup]) -> list[FreezingOp]:
    found = []
    for op, path, reason, labels in run.freezing_ops:
        met = home[labels[labels != 0]][:, 0]
        names = tuple(groups[n].name for n in torch.unique(met).tolist() if n >= 0)
        found.append(FreezingOp(op, path, reason, names))
    return found


def example_spec(example_inputs: Any) -> tuple[tuple[tuple[int, ...], str], ...] | None:
    """Shapes and types of positional tensor inputs, from which an example can be made again; None for other inputs."""
    leaves = [example_inputs] if isinstance(example_inputs, Tensor) else example_inputs
    if isinstance(leaves, dict) or not all(isinstance(leaf, Tensor) for leaf in tree_flatten(leaves)[0]):
        return None
    if not isinstance(leaves, (list, tuple)) or not all(isinstance(leaf, Tensor) for leaf in leaves):
        return None
    return tuple((tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in leaves)
