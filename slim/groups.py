"""From the labels of a finished propagation to groups, classes of united labels that occur alike, and to where gates go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from slim.channels import ChannelPropagation
from slim.errors import SlimError
from slim.forward import transparent_gates
from slim.gate import gate_parameters
from slim.graph import OUTPUT, ChannelGraph, ChannelGroup, Example, FreezingOp, GateSite, Member, Role, unique_name
from slim.propagate import varying_axes
from slim.rules import RULES

Key = tuple[str, int, Role]
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
    unreadable = [(r.labels, run.unreadable[r.param]) for r in run.records if r.param in run.unreadable]
    frozen, inexact = first_reasons([*run.frozen, *unreadable], roots), first_reasons(run.inexact, roots)
    # For each class what it occupies: keys, and the position on each one's axis.
    keys: dict[int, list[Key]] = {}
    positions: dict[int, list[int]] = {}
    for record in [*run.records, *run.counts]:
        key = (record.param, record.axis, record.role)
        for position, root in enumerate(roots[record.labels].tolist()):
            if root:
                keys.setdefault(root, []).append(key)
                positions.setdefault(root, []).append(position)
    alike: dict[tuple[Any, ...], list[int]] = {}
    for root, found in keys.items():
        alike.setdefault((tuple(found), frozen.get(root), inexact.get(root)), []).append(root)
    groups: list[ChannelGroup] = []
    owners = torch.full((len(roots), 2), -1)
    for (found, reason, mixed), classes in alike.items():
        members = gather_members(found, [positions[root] for root in classes])
        producer = next((m for m in members if m.produces), None)
        if producer is None:
            continue
        owners[classes] = torch.tensor([(len(groups), channel) for channel in range(len(classes))])
        name = unique_name(producer.layer or producer.param, {group.name for group in groups})
        groups.append(ChannelGroup(name, len(classes), members, reason, mixed))
    owners = owners[roots]
    gates = {id(p) for p in gate_parameters(run.model)}
    shapes = {name: tuple(p.shape) for name, p in run.model.named_parameters() if id(p) not in gates}
    filters = {layer.weight: layer.shape for layer in run.layers if layer.weight and layer.weight not in shapes}
    used = {name.rpartition(".")[0] for key, name in run.tensors.items() if key in run.seen}
    layers = dict.fromkeys(name.rpartition(".")[0] for name in shapes)
    made = {m.param for group in groups for m in group.members if m.produces}
    unfollowed = tuple(layer for layer in run.layers if layer.weight not in made)
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


def first_reasons(given: list[tuple[Tensor, str]], roots: Tensor) -> dict[int, str]:
    """The first reason given for each class."""
    found: dict[int, str] = {}
    for labels, reason in given:
        for root in roots[labels[labels != 0]].tolist():
            found.setdefault(root, reason)
    return found


def gather_members(keys: Sequence[Key], rows: list[list[int]]) -> tuple[Member, ...]:
    """One member per (parameter, axis, role) from the positions of each channel, in the order of ``keys``; each once."""
    columns: dict[Key, list[int]] = {}
    for column, key in enumerate(keys):
        columns.setdefault(key, []).append(column)
    return tuple(
        Member(*key, tuple(position for row in rows for position in dict.fromkeys([row[c] for c in numbers])))
        for key, numbers in columns.items()
    )


def example_spec(example_inputs: Any) -> Example | None:
    """Shapes and types of positional tensor inputs, from which an example can be made again; None for other inputs."""
    leaves = [example_inputs] if isinstance(example_inputs, Tensor) else example_inputs
    if not isinstance(leaves, (list, tuple)) or not all(isinstance(leaf, Tensor) for leaf in leaves):
        return None
    return tuple((tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in leaves)


def find_gate_sites(run: ChannelPropagation, owners: Tensor) -> list[GateSite]:
    """Where gates can go: behind activations, and behind layers whose channels reach a reader past no activation of their own.

    Activations count straight behind layers, where they run once per forward and their every channel belongs to a group
    (a ResNet block runs one ReLU module three times, and its last norm is summed before it). ``owners`` [labels, 2]: group
    and channel of each label, -1 for none.
    """
    activations = [path for kind, path, _, _ in run.flow if kind == "activation"]
    sites = [site for path in dict.fromkeys(activations) if (site := site_at(run, owners, path))]
    layers = ungated_layers(run, {site.path for site in sites})
    return sites + [site for path in layers if (site := site_at(run, owners, path))]


def find_norm_sites(run: ChannelPropagation, owners: Tensor) -> list[GateSite]:
    """Where gates go that come before the activations: behind layers whose channels reach a reader, of a convolution and its
    norm behind the norm.

    Groups that meet an activation module with f(0) != 0, such as a softplus, have none: a gate before it would close nothing.
    """
    shifted = {key for kind, _, _, outputs in run.flow if kind == "end" for key in outputs}
    behind = [tensor for outputs in run.module_outputs.values() for tensor in outputs if id(tensor) in shifted]
    labels = [found for tensor in behind if (found := run.get(tensor)) is not None]
    barred = {group for found in labels for group in owners[found.flatten()][:, 0].tolist()}
    sites = [site for path in ungated_layers(run, set()) if (site := site_at(run, owners, path))]
    return [site for site in sites if barred.isdisjoint(group for group, _ in site.channels)]


def site_at(run: ChannelPropagation, owners: Tensor, path: str) -> GateSite | None:
    outputs = run.module_outputs[path]
    labels = run.get(outputs[0])
    if len(outputs) != 1 or labels is None or len(varying_axes(labels)) != 1:
        return None
    axis = varying_axes(labels)[0]
    channels = owners[labels.flatten()]
    if len(channels) != outputs[0].shape[axis] or not bool((channels >= 0).all()):
        return None
    return GateSite(path, axis, tuple((group, channel) for group, channel in channels.tolist()))


def ungated_layers(run: ChannelPropagation, gated: set[str]) -> list[str]:
    """The layers whose outputs reach some reader past no gated activation: of a convolution and its norm, the norm."""
    reaching: dict[int, frozenset[str]] = {}
    found: dict[str, None] = {}
    nothing: frozenset[str] = frozenset()
    for kind, what, inputs, outputs in run.flow:
        if kind == "activation" and what not in gated:
            # The module's operators ran before; what they passed on stands.
            continue
        layers = nothing.union(*(reaching.get(key, nothing) for key in inputs))
        if kind == "read":
            found.update(dict.fromkeys(sorted(layers)))
        if kind != "move":
            layers = frozenset([what]) if kind == "layer" else nothing
        for key in outputs:
            reaching[key] = layers
    return list(found)
