"""Puts gates where a traced model's channels are made."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import torch
from torch import nn

from slim.errors import SlimError
from slim.gate import Gate, attach_gate, gate_vectors, gates_in, site_of
from slim.graph import ChannelGraph, Site

logger = logging.getLogger(__name__)


class GateLayout(TypedDict):
    """Where one gate sits and which vectors feed it: plain data, enough to put it back on a fresh model."""

    path: str
    axis: int
    groups: list[str]
    vectors: list[str]
    sizes: list[int]
    index: list[int] | None


def add_gates(
    model: nn.Module, graph: ChannelGraph, *, tie: Literal["group", "layer"] = "group"
) -> dict[str, nn.Parameter]:
    """Put a gate, all factors 1, behind every activation whose channels can be pruned; in place and idempotent.

    Where channels reach a weight past no activation module of their own (one that runs several times in a forward pass,
    a function, a sum), the gate sits behind the norm or layer that makes them. ``tie="group"`` gives the gates of one group one
    shared vector, ``tie="layer"`` each its own. Returns the gate vectors by group name (``group@module`` where a group has
    several).
    """
    if tie not in ("group", "layer"):
        raise SlimError(f"tie is {tie!r}; expected 'group' or 'layer'")
    if any(True for _ in gates_in(model)):
        return gate_vectors(model)
    shared: dict[str, nn.Parameter] = {}
    for site in graph.sites:
        numbers = list(dict.fromkeys(group for group, _ in site.channels))
        groups = [graph.groups[n] for n in numbers]
        frozen = next((g for g in groups if not g.prunable), None)
        if frozen is not None:
            logger.debug("no gate at %s: group %s is frozen (%s)", site.path, frozen.name, frozen.frozen_reason)
            continue
        device = next(model.parameters()).device
        vectors = []
        for group in groups:
            key = group.name if tie == "group" else f"{group.name}@{site.path}"
            if key not in shared:
                shared[key] = nn.Parameter(torch.ones(group.size, dtype=torch.float32, device=device))
            vectors.append(shared[key])
        gate = Gate([g.name for g in groups], vectors, gate_index(site, numbers, [g.size for g in groups]), site.axis)
        attach_gate(model.get_submodule(site.path), gate.to(device))
    if not shared:
        raise SlimError("no gate could be placed: the graph has no channels that can be pruned; see graph.report()")
    model.slim_example = graph.example  # type: ignore[assignment]
    return gate_vectors(model)


def gate_index(site: Site, numbers: Sequence[int], sizes: Sequence[int]) -> torch.Tensor | None:
    """For each channel of the site its place in the concatenation of the groups' vectors; None when in order."""
    start = {n: sum(sizes[:i]) for i, n in enumerate(numbers)}
    index = [start[group] + channel for group, channel in site.channels]
    return None if index == list(range(sum(sizes))) else torch.tensor(index)


def gate_layout(model: nn.Module) -> list[GateLayout]:
    """The layout of all gates of a model."""
    names: dict[int, str] = {id(vector): name for name, vector in gate_vectors(model).items()}
    return [
        {
            "path": site_of(path),
            "axis": gate.axis,
            "groups": list(gate.groups),
            "vectors": [names[id(v)] for v in gate.vectors],
            "sizes": [v.numel() for v in gate.vectors],
            "index": None if gate.index is None else gate.index.tolist(),
        }
        for path, gate in gates_in(model)
    ]


def restore_gates(model: nn.Module, layout: Sequence[GateLayout], example: Any) -> None:
    """Put gates back by their layout, factors 1, in place; ``example`` tells fold_gates what inputs look like."""
    model.slim_example = example
    shared: dict[str, nn.Parameter] = {}
    for place in layout:
        vectors = [
            shared.setdefault(name, nn.Parameter(torch.ones(size)))
            for name, size in zip(place["vectors"], place["sizes"], strict=True)
        ]
        index = None if place["index"] is None else torch.tensor(place["index"])
        try:
            attach_gate(model.get_submodule(place["path"]), Gate(place["groups"], vectors, index, place["axis"]))
        except AttributeError as error:
            raise SlimError(
                f"a gate belongs at {place['path']}, but the built model has no such module ({error})"
            ) from error
