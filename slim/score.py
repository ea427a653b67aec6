"""Scores: how much each channel of each group matters. Larger is kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from slim.errors import SlimError
from slim.gate import gates_in
from slim.graph import ChannelGraph, ChannelGroup, Member, Role

Scores = dict[str, Tensor]
Criterion = Callable[[nn.Module, ChannelGroup], Tensor | None]
"""From a model and a group to one score per channel, [size]; None leaves the group whole."""


def score(model: nn.Module, graph: ChannelGraph, criterion: str = "gate", *, seed: int = 0) -> Scores:
    """{group name: scores [size], float64 on the CPU} for every prunable group that the criterion can judge.

    ``gate``: the gate itself (the largest where a group has several). ``bn``: |batch-norm weight| (Liu et al., "Learning
    Efficient Convolutional Networks through Network Slimming", ICCV 2017). ``l1``: sum of |weight| of the filters that make
    the channel (Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017); ``l2`` likewise. ``random``: uniform, by
    ``seed``. Weight criteria are divided by the group's mean, so that groups compare.
    """
    table: dict[str, Criterion] = {
        "gate": gate_criterion(model),
        "bn": batch_norm_criterion,
        "l1": norm_criterion(1),
        "l2": norm_criterion(2),
        "random": random_criterion(seed),
    }
    if criterion not in table:
        raise SlimError(f"criterion is {criterion!r}; expected one of {', '.join(table)}")
    judge = table[criterion]
    found = {group.name: judge(model, group) for group in graph.groups if group.prunable}
    scores = {name: s.detach().double().cpu() for name, s in found.items() if s is not None}
    if not scores:
        raise SlimError(
            f"criterion {criterion!r} finds nothing to judge in this model" + NOTHING_TO_JUDGE.get(criterion, "")
        )
    return scores


NOTHING_TO_JUDGE = {
    "gate": ": it has no gates; train it with gates (train_sparse.py, slim.add_gates) or use --criterion l1",
    "bn": ": it has no batch norms; use l1",
}


def gate_criterion(model: nn.Module) -> Criterion:
    """The largest gate of each channel."""
    by_group: dict[str, list[Tensor]] = {}
    for _, gate in gates_in(model):
        for group, vector in zip(gate.groups, gate.vectors, strict=True):
            by_group.setdefault(group, []).append(vector.detach().abs())

    def judge(model: nn.Module, group: ChannelGroup) -> Tensor | None:
        vectors = by_group.get(group.name)
        if vectors is None:
            return None
        if any(v.numel() != group.size for v in vectors):
            raise SlimError(
                f"the gate of group {group.name} has {vectors[0].numel()} channels, the graph {group.size}; trace the model again"
            )
        return torch.stack(vectors).amax(0)

    return judge


def batch_norm_criterion(model: nn.Module, group: ChannelGroup) -> Tensor | None:
    """Mean |batch-norm weight| of each channel."""
    norms = {path for path, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._NormBase)}
    found = [
        per_channel(parameter_of(model, m), m, group.size, 1)
        for m in members(group, "scale")
        if m.layer in norms and m.param.endswith(".weight")
    ]
    return normalised(found)


def norm_criterion(order: int) -> Criterion:
    """Norm of the filters that make each channel, averaged over the layers that make it."""

    def judge(model: nn.Module, group: ChannelGroup) -> Tensor | None:
        producers = [*members(group, "out"), *members(group, "depthwise")]
        return normalised([per_channel(parameter_of(model, m), m, group.size, order) for m in producers])

    return judge


def random_criterion(seed: int) -> Criterion:
    """Uniform in 0..1, one stream over the groups in order."""
    generator = torch.Generator().manual_seed(seed)
    return lambda model, group: torch.rand(group.size, generator=generator, dtype=torch.float64)


def members(group: ChannelGroup, role: Role) -> list[Member]:
    return [m for m in group.members if m.role == role]


def parameter_of(model: nn.Module, member: Member) -> Tensor:
    """The tensor that a member names."""
    owner = model.get_submodule(member.layer)
    tensor: Tensor = getattr(owner, member.param.rpartition(".")[2])
    return tensor.detach()


def per_channel(tensor: Tensor, member: Member, size: int, order: int) -> Tensor:
    """Norm over everything that belongs to one channel, [size]."""
    if max(member.index) >= tensor.shape[member.axis]:
        raise SlimError(
            f"{member.param} has {tensor.shape[member.axis]} channels, the graph expects more; trace the model again"
        )
    rows = tensor.double().cpu().movedim(member.axis, 0).index_select(0, torch.tensor(member.index))
    norms: Tensor = torch.linalg.vector_norm(rows.reshape(size, -1), order, dim=1)
    return norms


def normalised(found: list[Tensor]) -> Tensor | None:
    """Mean over layers, each divided by its own mean."""
    return torch.stack([x / x.mean().clamp_min(1e-12) for x in found]).mean(0) if found else None
