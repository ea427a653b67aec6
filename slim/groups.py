"""From the labels of a finished propagation to groups: classes of united labels that occur alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from slim.channels import ChannelPropagation, Record
from slim.errors import SlimError
from slim.forward import transparent_gates
from slim.gate import gate_parameters
from slim.graph import OUTPUT, PRODUCING, ChannelGraph, ChannelGroup, Example, FreezingOp, Member, Role, unique_name
from slim.rules import RULES
from slim.sites import find_gate_sites, find_norm_sites

Key = tuple[str, int, Role]
NO_CHANNEL = torch.zeros(1, dtype=torch.int64)
"""The label of no channel, which sequences of labels begin with so that they are not empty."""
COMPUTED_WEIGHT = "a weight that is computed as the network runs"


def find_groups(
    model: nn.Module, example_inputs: Any, *, allow_inexact: bool
) -> tuple[ChannelGraph, Tensor, ChannelPropagation]:
    """Follow a model's channels with the rules, and gather its groups; no dry run. For the rest see ``slim.trace``.

    Also gives the owner of each label, see ``build_graph``, and the propagation.
    """
    run = ChannelPropagation(model, RULES, allow_inexact=allow_inexact)
    lazy = next((name for name, p in run.model.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        raise SlimError(f"{lazy} has no shape yet (a lazy module); run the model once before slim.trace")
    with transparent_gates(run.model):
        run.run(example_inputs)
    # That it is an output comes first among the reasons why a group is frozen.
    frozen, run.frozen = run.frozen, []
    for tensor in run.outputs:
        run.freeze(run.get(tensor), OUTPUT)
    run.frozen += frozen
    for tensor in run.unread.values():
        if tensor.is_floating_point():  # not the places that a pooling layer took its maxima from
            run.freeze(run.get(tensor), "no operator reads it: an output, for all that can be seen")
    return *build_graph(run, example_inputs), run


def build_graph(run: ChannelPropagation, example_inputs: Any) -> tuple[ChannelGraph, Tensor]:
    """Gather the classes of united labels into groups of channels that occur alike.

    Also gives the owner of each label, [labels, 2]: the number of its group and its channel there, -1 for none.
    """
    roots = run.classes.roots()
    records = [*run.records, *run.counts]
    occurring = [roots[record.labels] for record in records]
    unreadable = [(r.labels, run.unreadable[r.param]) for r in run.records if r.param in run.unreadable]
    frozen, frozen_reasons = first_reasons([*run.frozen, *unreadable], roots)
    inexact, inexact_reasons = first_reasons(run.inexact, roots)
    kinds, made = kinds_of(records, occurring, len(roots))
    traits = (kinds * len(frozen_reasons) + frozen) * len(inexact_reasons) + inexact
    parts = [part for part in alike(in_order(occurring), traits) if int(kinds[part[0]]) in made]
    owners = torch.full((len(roots), 2), -1)
    for number, classes in enumerate(parts):
        owners[classes] = torch.stack([torch.full_like(classes, number), torch.arange(len(classes))], 1)
    groups: list[ChannelGroup] = []
    names: set[str] = set()
    for classes, members in zip(parts, gather_members(records, occurring, owners, len(parts)), strict=True):
        producer = next(m for m in members if m.produces)
        name = unique_name(producer.layer or producer.param, names)
        names.add(name)
        reasons = frozen_reasons[frozen[classes[0]]], inexact_reasons[inexact[classes[0]]]
        groups.append(ChannelGroup(name, len(classes), members, *reasons))
    owners = owners[roots]
    gates = {id(p) for p in gate_parameters(run.model)}
    shapes = {name: tuple(p.shape) for name, p in run.model.named_parameters() if id(p) not in gates}
    filters = {layer.weight: layer.shape for layer in run.layers if layer.weight and layer.weight not in shapes}
    used = {name.rpartition(".")[0] for key, name in run.tensors.items() if key in run.seen}
    layers = dict.fromkeys(name.rpartition(".")[0] for name in shapes)
    producing = {m.param for group in groups for m in group.members if m.produces}
    unfollowed = tuple(layer for layer in run.layers if layer.weight not in producing)
    given_up = {path: reason for _, path, reason, _ in reversed(run.freezing_ops)}
    graph = ChannelGraph(
        groups=tuple(groups),
        layers=tuple(run.layers),
        shapes=shapes | filters,
        gate_sites=tuple(find_gate_sites(run, owners)),
        freezing_ops=tuple(FreezingOp(o, p, why, group_names(groups, owners, x)) for o, p, why, x in run.freezing_ops),
        example=example_spec(example_inputs),
        unused=tuple(layer for layer in layers if layer not in used),
        norm_sites=tuple(find_norm_sites(run, owners)),
        filters=frozenset(filters),
        unfollowed=unfollowed,
        unfollowed_reasons=tuple(
            given_up.get(layer.path, "it cannot be followed") if layer.weight else COMPUTED_WEIGHT
            for layer in unfollowed
        ),
    )
    return graph, owners


def group_names(groups: Sequence[ChannelGroup], owners: Tensor, labels: Tensor) -> tuple[str, ...]:
    """The names of the groups that own these labels."""
    return tuple(groups[n].name for n in torch.unique(owners[labels][:, 0]).tolist() if n >= 0)


def first_reasons(given: list[tuple[Tensor, str]], roots: Tensor) -> tuple[Tensor, list[str | None]]:
    """The number of the first reason given for each class, [labels], and the reasons by their numbers: 0 is none."""
    numbers, reasons = torch.zeros(len(roots), dtype=torch.int64), dict[str | None, int]({None: 0})
    for labels, reason in given:
        classes = roots[labels[labels != 0]]
        numbers[classes[numbers[classes] == 0]] = reasons.setdefault(reason, len(reasons))
    return numbers, list(reasons)


def kinds_of(records: list[Record], occurring: list[Tensor], count: int) -> tuple[Tensor, set[int]]:
    """A number for each class, [labels], equal for those that occur equally often on the same axes in the same order; and
    the numbers of those that a layer makes. ``occurring`` has the class at each position of a record, 0 for none."""
    kinds, numbers = torch.zeros(count, dtype=torch.int64), dict[tuple[Key, int, int], int]()
    made: set[int] = set()
    for record, classes in zip(records, occurring, strict=True):
        classes, times = torch.unique(classes[classes != 0], return_counts=True)
        most = int(times.max()) + 1 if len(times) else 1
        before, which = torch.unique(kinds[classes] * most + times, return_inverse=True)
        after = []
        for old, often in (divmod(number, most) for number in before.tolist()):
            after.append(numbers.setdefault((key_of(record), old, often), len(numbers) + 1))
            if record.role in PRODUCING or old in made:
                made.add(after[-1])
        kinds[classes] = torch.tensor(after, dtype=torch.int64)[which]
    return kinds, made


def in_order(occurring: list[Tensor]) -> Tensor:
    """Each class once, in the order in which they occur."""
    classes = torch.cat([NO_CHANNEL, *occurring])
    once, which = torch.unique(classes, return_inverse=True)
    first = torch.full_like(once, len(classes))
    first.scatter_reduce_(0, which, torch.arange(len(classes)), "amin")
    ordered: Tensor = once[first.argsort()]
    return ordered[1:]


def alike(classes: Tensor, traits: Tensor) -> list[Tensor]:
    """The classes that share a trait, in the order in which the traits occur."""
    _, which, sizes = torch.unique(traits[classes], return_inverse=True, return_counts=True)
    parts = which.argsort(stable=True).split(sizes.tolist())
    return [classes[part] for part in sorted(parts, key=lambda part: int(part[0]))]


def gather_members(
    records: list[Record], occurring: list[Tensor], owners: Tensor, groups: int
) -> list[tuple[Member, ...]]:
    """The members of each group: one per (parameter, axis, role), in the order of the records. ``owners``: group and channel
    of each class, [labels, 2]."""
    found: list[dict[Key, list[Tensor]]] = [{} for _ in range(groups)]
    for record, classes in zip(records, occurring, strict=True):
        group, channel = owners[classes].unbind(1)
        for number in torch.unique(group[group >= 0]).tolist():
            positions = (group == number).nonzero().flatten()
            ordered = positions[channel[positions].argsort(stable=True)]
            found[number].setdefault(key_of(record), []).append(torch.stack([channel[ordered], ordered]))
    return [tuple(Member(*key, index_of(parts)) for key, parts in members.items()) for members in found]


def index_of(parts: list[Tensor]) -> tuple[int, ...]:
    """The positions of each channel one after another, each once, from [channel and position, n] of one or more records."""
    if len(parts) == 1 or all(torch.equal(parts[0], part) for part in parts):
        return tuple(parts[0][1].tolist())
    channels, positions = torch.cat(parts, 1)
    order = channels.argsort(stable=True)
    return tuple(p for _, p in dict.fromkeys(zip(channels[order].tolist(), positions[order].tolist(), strict=True)))


def key_of(record: Record) -> Key:
    return record.param, record.axis, record.role


def example_spec(example_inputs: Any) -> Example | None:
    """Shapes and types of positional tensor inputs, from which an example can be made again; None for other inputs."""
    leaves = [example_inputs] if isinstance(example_inputs, Tensor) else example_inputs
    if not isinstance(leaves, (list, tuple)) or not all(isinstance(leaf, Tensor) for leaf in leaves):
        return None
    return tuple((tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in leaves)
