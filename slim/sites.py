"""Where gates can go: behind which modules the channels of groups pass on their way to what reads them."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from slim.channels import ChannelPropagation
from slim.graph import GateSite
from slim.propagate import varying_axes


def find_gate_sites(run: ChannelPropagation, owners: Tensor) -> list[GateSite]:
    """Where gates can go: behind activations, and behind layers whose channels reach a reader past no activation of their own.

    Activations count straight behind layers, where all their runs have the same channels and each belongs to a group
    (a ResNet block runs one ReLU module three times, and its last norm is summed before it). ``owners`` [labels, 2]: group
    and channel of each label, -1 for none.
    """
    activations = Counter(path for kind, path, _, _ in run.flow if kind == "activation")
    direct = [path for path, runs in activations.items() if runs == len(run.module_outputs[path])]
    sites = [site for path in direct if (site := site_at(run, owners, path))]
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
    barred = {group for found in labels for group in torch.unique(owners[found.flatten()][:, 0]).tolist()}
    sites = [site for path in ungated_layers(run, set()) if (site := site_at(run, owners, path))]
    return [site for site in sites if barred.isdisjoint({group for group, _ in site.channels})]


def site_at(run: ChannelPropagation, owners: Tensor, path: str) -> GateSite | None:
    """The place behind a module; None where a run of it has other channels than the others, or some that are in no group."""
    sites = set()
    for output in run.module_outputs[path]:
        labels = run.get(output)
        if labels is None or len(varying_axes(labels)) != 1:
            return None
        (axis,) = varying_axes(labels)
        channels = owners[labels.flatten()]
        if len(channels) != output.shape[axis] or not bool((channels >= 0).all()):
            return None
        sites.add(GateSite(path, axis, tuple(zip(*channels.t().tolist(), strict=True))))
    return sites.pop() if len(sites) == 1 else None


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
