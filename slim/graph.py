"""The channel graph: what must be removed together, what it costs, and what is frozen why. Plain data, no model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

Role = Literal["out", "in", "depthwise", "scale", "width"]
"""What a parameter's axis is to a channel: "out" produces it, "in" consumes it linearly, "depthwise" both, "scale" acts on
it alone; "width" is no tensor but a module's integer attribute that counts the channels (a norm's ``num_features``)."""
PRODUCING = ("out", "depthwise")
"""The roles of axes along which a layer makes its channels."""
OUTPUT = "a model output"
"""Why a group is frozen whose channels leave the model."""
Example = tuple[tuple[tuple[int, ...], str], ...]
"""Shape and type (such as ``float32``) of each tensor that a model takes by position."""


def inputs_like(example: Example, model: nn.Module) -> tuple[Tensor, ...]:
    """Zeros of these shapes and types, where the model is."""
    device = next((p.device for p in model.parameters()), None)
    return tuple(torch.zeros(shape, dtype=getattr(torch, kind), device=device) for shape, kind in example)


@dataclass(frozen=True)
class Member:
    """One axis of one parameter or buffer that a group's channels occupy.

    ``index`` holds for channel 0, then channel 1, ... the positions on that axis, equally many for each.
    """

    param: str
    axis: int
    role: Role
    index: tuple[int, ...]

    @property
    def layer(self) -> str:
        """Path of the module that owns the parameter."""
        return self.param.rpartition(".")[0]

    @property
    def produces(self) -> bool:
        """Whether the parameter is a weight whose output the channels are."""
        return self.role in PRODUCING

    @cached_property
    def index_tensor(self) -> Tensor:
        """``index`` as a tensor, int64 [positions]."""
        return torch.tensor(self.index)

    def positions(self, channels: Sequence[int], size: int) -> list[int]:
        """The positions that some of the group's ``size`` channels occupy."""
        per_channel = len(self.index) // size
        return [p for c in channels for p in self.index[c * per_channel : (c + 1) * per_channel]]


class Channels:
    """What channel groups and their plans share: ``size`` channels and the ``members`` that these occupy."""

    size: int
    members: tuple[Member, ...]

    @property
    def per_channel(self) -> int:
        """How many of the producing layer's output channels one channel of the group stands for (more than 1 where several
        must go together, as the same position of every part of a grouped convolution)."""
        return next((len(m.index) // self.size for m in self.members if m.produces), 1)


@dataclass(frozen=True)
class ChannelGroup(Channels):
    """``size`` channels that are alike in where they occur; each can be removed, with all that it occupies.

    ``inexact`` says which operator's statistics change when a channel goes (only where the caller allowed such cuts).
    """

    name: str
    size: int
    members: tuple[Member, ...]
    frozen_reason: str | None = None
    inexact: str | None = None

    @property
    def prunable(self) -> bool:
        return self.frozen_reason is None


def unique_name(name: str, taken: Collection[str]) -> str:
    """The name, numbered when it is taken."""
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name}#{number}"
    return found


@dataclass(frozen=True)
class LayerCost:
    """A convolution or linear layer; MACs = elements of its weight * output positions per image."""

    path: str
    weight: str
    shape: tuple[int, ...]
    positions: int

    @property
    def macs(self) -> int:
        return prod(self.shape) * self.positions


@dataclass(frozen=True)
class Cost:
    """What a model costs: ``macs`` for one image, ``params`` without gates (they fold away), a row per call of a layer."""

    macs: int
    params: int
    layers: tuple[LayerCost, ...]

    def __str__(self) -> str:
        width = max([5, *(len(row.path) for row in self.layers)])
        lines = [f"{'layer':<{width}}  {'weight':<20}  {'positions':>9}  {'M MACs':>9}"]
        lines += [f"{r.path:<{width}}  {r.shape!s:<20}  {r.positions:>9}  {r.macs / 1e6:>9.3f}" for r in self.layers]
        return "\n".join([*lines, f"{self.macs / 1e6:.1f} M MACs, {self.params / 1e6:.3f} M parameters"])


@dataclass(frozen=True)
class GateSite:
    """A module behind which a gate can go: for each channel of its output (group index, channel of the group).

    ``axis`` is the channel axis of the output.
    """

    path: str
    axis: int
    channels: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class FreezingOp:
    """An operator without a channel rule, or one that mixes channels; the module that called it, and what it froze."""

    op: str
    path: str
    reason: str
    groups: tuple[str, ...]


@dataclass(frozen=True)
class ChannelGraph:
    """What ``slim.trace`` found. Widths, MACs and parameters are those of the traced model; gates are not counted."""

    groups: tuple[ChannelGroup, ...]
    layers: tuple[LayerCost, ...]
    shapes: dict[str, tuple[int, ...]]
    gate_sites: tuple[GateSite, ...]
    freezing_ops: tuple[FreezingOp, ...]
    example: Example | None
    unused: tuple[str, ...] = ()
    """Layers with parameters that did not run (such as heads that only train): no cut reaches them."""
    norm_sites: tuple[GateSite, ...] = ()
    """Where gates go that come before the activations: behind the norms, and behind layers without one."""
    filters: frozenset[str] = frozenset()
    """Of the names in ``shapes`` those of buffers: layers' weights that do not learn."""
    unfollowed: tuple[LayerCost, ...] = ()
    """Calls of layers whose outputs are in no group, and in ``unfollowed_reasons`` why."""
    unfollowed_reasons: tuple[str, ...] = ()

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of the convolutions and linear layers for one image."""
        return sum(layer.macs for layer in self.layers)

    @cached_property
    def params(self) -> int:
        """Learnable parameters."""
        return sum(prod(shape) for name, shape in self.shapes.items() if name not in self.filters)

    @cached_property
    def by_name(self) -> dict[str, ChannelGroup]:
        return {group.name: group for group in self.groups}

    def group_macs(self, group: ChannelGroup) -> int:
        """MACs of the layers that produce the group's channels, counted for those channels."""
        by_weight: dict[str, int] = {}
        for layer in self.layers:
            by_weight[layer.weight] = by_weight.get(layer.weight, 0) + layer.macs
        return sum(
            by_weight.get(m.param, 0) * len(m.index) // self.shapes[m.param][m.axis]
            for m in group.members
            if m.produces and m.param in by_weight
        )

    def macs_share(self, groups: Iterable[ChannelGroup]) -> float:
        """Share of the network's MACs that produce these groups' channels, 0..1."""
        return sum(self.group_macs(group) for group in groups) / self.macs if self.macs else 0.0

    def shares(self) -> dict[str, float]:
        """Shares of the MACs that make channels that can be cut, channels that cannot, and outputs: they sum to 1."""
        kinds: dict[str, list[ChannelGroup]] = {"prunable": [], "frozen": [], "output": []}
        for group in self.groups:
            kinds["prunable" if group.prunable else "output" if group.frozen_reason == OUTPUT else "frozen"].append(
                group
            )
        shares = {kind: self.macs_share(groups) for kind, groups in kinds.items()}
        shares["frozen"] += sum(call.macs for call in self.unfollowed) / self.macs if self.macs else 0.0
        return shares

    def report(self) -> str:
        """A table: group, channels, share of the MACs that produce it, what it occupies, and what froze it.

        Below it the totals, each operator that froze channels with its module and the share that it froze, and the layers
        whose channels could not be followed at all.
        """
        width = max([5, *(len(g.name) for g in self.groups)])
        lines = [f"{'group':<{width}}  {'size':>9}  {'MACs':>6}  members"]
        for group in self.groups:
            size = f"{group.size} x {group.per_channel}" if group.per_channel > 1 else str(group.size)
            state = f"{len(group.members)}" if group.prunable else f"frozen: {group.frozen_reason}"
            inexact = f"; inexact: {group.inexact}" if group.prunable and group.inexact else ""
            lines.append(f"{group.name:<{width}}  {size:>9}  {self.macs_share([group]):>6.1%}  {state}{inexact}")
        shares = self.shares()
        lines.append(
            f"{len(self.groups)} groups, {sum(g.prunable for g in self.groups)} prunable; {self.macs / 1e6:.1f} M MACs, "
            f"{self.params / 1e6:.3f} M parameters; of the MACs {shares['prunable']:.1%} make channels that can be cut, "
            f"{shares['frozen']:.1%} frozen ones, {shares['output']:.1%} outputs"
        )
        for op in self.freezing_ops:
            groups = [self.by_name[name] for name in op.groups]
            if groups:
                lines.append(f"{op.reason}: froze {self.macs_share(groups):.1%} of the MACs ({', '.join(op.groups)})")
        for reason in dict.fromkeys(self.unfollowed_reasons):
            calls = [c for c, why in zip(self.unfollowed, self.unfollowed_reasons, strict=True) if why == reason]
            share = sum(call.macs for call in calls) / max(1, self.macs)
            lines.append(f"{reason}: froze {share:.1%} of the MACs ({', '.join(dict.fromkeys(c.path for c in calls))})")
        if self.unused:
            lines.append(
                f"did not run in evaluation mode, so keep their widths and do not fit what is cut before them: "
                f"{', '.join(self.unused)}"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.report()
