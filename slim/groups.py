"""From the labels of a finished propagation to groups: classes of united labels that occur alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from slim.gate import Gate
from slim.graph import ChannelGraph, ChannelGroup, Member, Role, Site, UnknownOp
from slim.labels import varying_axes

if TYPE_CHECKING:
    from slim.trace import ChannelPropagation


def build_graph(run: ChannelPropagation, example_inputs: Any) -> ChannelGraph:
    """Classes of united labels, gathered into groups of channels that occur alike."""
    find = run.classes.find
    occurrences: dict[int, list[tuple[int, int]]] = {}
    for number, record in enumerate(run.records):
        for index, label in enumerate(record.labels.tolist()):
            if label:
                occurrences.setdefault(find(label), []).append((number, index))
    reasons = frozen_reasons(run, occurrences)
    alike: dict[tuple[Any, ...], list[int]] = {}
    for root, places in occurrences.items():
        keys = [(run.records[n].param, run.records[n].axis, run.records[n].role) for n, _ in places]
        alike.setdefault((tuple(keys), reasons.get(root)), []).append(root)
    groups: list[ChannelGroup] = []
    home: dict[int, tuple[int, int]] = {}
    for (keys, reason), roots in alike.items():
        if not any(role in ("out", "depthwise") for _, _, role in keys):
            continue
        members = gather_members(keys, [occurrences[root] for root in roots])
        producer = next(m for m in members if m.role in ("out", "depthwise"))
        home.update({root: (len(groups), k) for k, root in enumerate(roots)})
        groups.append(ChannelGroup(unique_name(producer.layer, groups), len(roots), members, reason))
    return ChannelGraph(
        groups=tuple(groups),
        layers=tuple(run.layers),
        shapes=learnable_shapes(run.model),
        sites=tuple(activation_sites(run, home)),
        unknown_ops=tuple(unknown_ops(run, home, groups)),
        example=example_spec(example_inputs),
    )


def frozen_reasons(run: ChannelPropagation, occurrences: dict[int, list[tuple[int, int]]]) -> dict[int, str]:
    """Why each frozen class is frozen: the first reason found."""
    reasons: dict[int, str] = {}
    for labels, reason in run.frozen:
        for label in labels.tolist():
            if label:
                reasons.setdefault(run.classes.find(label), reason)
    for root, places in occurrences.items():
        for number, _ in places:
            if run.records[number].param in run.unreadable:
                reasons.setdefault(root, run.unreadable[run.records[number].param])
    return reasons


def gather_members(keys: Sequence[tuple[str, int, Role]], places: list[list[tuple[int, int]]]) -> tuple[Member, ...]:
    """One member per (parameter, axis, role); the positions of channel 0 first, each position once."""
    columns: dict[tuple[str, int, Role], list[int]] = {}
    for column, key in enumerate(keys):
        columns.setdefault(key, []).append(column)
    members = []
    for (param, axis, role), numbers in columns.items():
        per_channel = [list(dict.fromkeys(channel[n][1] for n in numbers)) for channel in places]
        members.append(Member(param, axis, role, tuple(i for channel in per_channel for i in channel)))
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


def activation_sites(run: ChannelPropagation, home: dict[int, tuple[int, int]]) -> list[Site]:
    """Activation modules that run once per forward and whose every channel belongs to a group."""
    sites = []
    for path, outputs in run.activations.items():
        labels = run.get(outputs[0])
        if len(outputs) != 1 or labels is None or len(varying_axes(labels)) != 1:
            continue
        axis = varying_axes(labels)[0]
        channels = [home.get(run.classes.find(label)) for label in labels.flatten().tolist()]
        if len(channels) == outputs[0].shape[axis] and all(c is not None for c in channels):
            sites.append(Site(path, axis, tuple(c for c in channels if c is not None)))
    return sites


def unknown_ops(
    run: ChannelPropagation, home: dict[int, tuple[int, int]], groups: list[ChannelGroup]
) -> list[UnknownOp]:
    found = []
    for op, path, labels in run.unknown_ops:
        met = [home.get(run.classes.find(label)) for label in labels.tolist() if label]
        names = dict.fromkeys(groups[place[0]].name for place in met if place is not None)
        found.append(UnknownOp(op, path, tuple(names)))
    return found


def example_spec(example_inputs: Any) -> tuple[tuple[tuple[int, ...], str], ...] | None:
    """Shapes and types of positional tensor inputs, from which an example can be made again; None for other inputs."""
    leaves = [example_inputs] if isinstance(example_inputs, Tensor) else example_inputs
    if isinstance(leaves, dict) or not all(isinstance(leaf, Tensor) for leaf in tree_flatten(leaves)[0]):
        return None
    if not isinstance(leaves, (list, tuple)) or not all(isinstance(leaf, Tensor) for leaf in leaves):
        return None
    return tuple((tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in leaves)
