"""Scores: how much each channel of each group matters. Larger is kept.

A criterion judges one group at a time; ``score`` makes what it returns comparable between layers and groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from slim.errors import SlimError
from slim.gate import gates_in
from slim.graph import ChannelGraph, ChannelGroup, Member
from slim.taylor import Loss, differentiable, position_sums

Scores = dict[str, Tensor]
Criterion = Callable[[ChannelGroup], Tensor | Sequence[Tensor] | None]
"""From a group to one score per channel, [size], or to one such vector per layer; None leaves the group whole."""
Reduction = Literal["mean", "max", "sum"]
Normalise = Literal["mean", "max", "none"]

BATCH_NORMS = (nn.modules.batchnorm._NormBase,)
NORMS = (*BATCH_NORMS, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


class Habit(NamedTuple):
    """What a criterion does unless told otherwise. A layer's mean or maximum below ``floor`` counts as ``floor``: weights so
    small are dead, while squared gradients may well be."""

    reduction: Reduction = "mean"
    normalise: Normalise = "mean"
    floor: float = 0.0


HABITS = {"gate": Habit("max", "none"), **dict.fromkeys(("bn", "l1", "l2", "fpgm"), Habit(floor=1e-12))}

NOTHING_TO_JUDGE = {
    "gate": ": it has no gates; train it with gates (train_sparse.py, slim.add_gates) or use --criterion l1",
    "bn": ": it has no batch norms; use l1",
}


def score(
    model: nn.Module,
    graph: ChannelGraph,
    criterion: str | Criterion = "gate",
    *,
    seed: int = 0,
    reduction: Reduction | None = None,
    normalise: Normalise | None = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> Scores:
    """{group name: scores [size], float64 on the CPU} for every prunable group that the criterion can judge.

    ``criterion`` is a function from a group to its scores (see ``Criterion``), or a name: ``gate``; ``bn`` (Liu et al.,
    ICCV 2017); ``l1``, ``l2`` (Li et al., ICLR 2017); ``fpgm`` (He et al., CVPR 2019); ``taylor`` (Molchanov et al., CVPR
    2019; it alone reads ``batches``, an iterable, and ``loss(model, batch)``); ``random``, by ``seed``.

    The vectors of a group's layers are each divided by their mean or maximum (``normalise``), so that layers and groups
    compare, and then reduced to one (``reduction``). As the layers that share a channel go together, so do their
    scores: Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023. None is the criterion's own habit: for
    gates the largest, not normalised, for others the mean, normalised by the mean; a vector that comes alone (as
    ``random``'s) is normalised only on demand.

    SlimError for an unknown choice, a graph of another model, a criterion that finds nothing or returns what is no score.
    """
    for option, given, choices in (("reduction", reduction, Reduction), ("normalise", normalise, Normalise)):
        if given is not None and given not in get_args(choices):
            raise SlimError(f"{option} is {given!r}; expected one of {', '.join(get_args(choices))}")
    groups = [group for group in graph.groups if group.prunable]
    if not groups:
        raise SlimError("no group of this graph can be pruned; graph.report() says why")
    built_in: dict[str, Callable[[], Criterion]] = {
        "gate": lambda: gate_criterion(model),
        "bn": lambda: batch_norm_criterion(model),
        "l1": lambda: norm_criterion(model, 1),
        "l2": lambda: norm_criterion(model, 2),
        "fpgm": lambda: geometric_median_criterion(model),
        "taylor": lambda: taylor_criterion(model, graph, batches, loss),
        "random": lambda: random_criterion(seed),
    }
    if isinstance(criterion, str) and criterion in built_in:
        name, judge, habit = criterion, built_in[criterion](), HABITS.get(criterion, Habit())
    elif callable(criterion):
        name, judge, habit = getattr(criterion, "__qualname__", "custom"), criterion, Habit()
    else:
        raise SlimError(f"criterion is {criterion!r}; expected one of {', '.join(built_in)} or a function of a group")
    found = {group.name: combined(judge(group), group, name, habit, reduction, normalise) for group in groups}
    scores = {group: s for group, s in found.items() if s is not None}
    if not scores:
        advice = NOTHING_TO_JUDGE.get(name, "") if isinstance(criterion, str) else ": it returned None for every group"
        raise SlimError(f"criterion {name!r} finds nothing to judge in this model{advice}")
    return scores


def combined(
    found: Any,
    group: ChannelGroup,
    name: str,
    habit: Habit,
    reduction: Reduction | None,
    normalise: Normalise | None,
) -> Tensor | None:
    """One vector, [size], float64 on the CPU, from what a criterion returned; SlimError when that is no score."""
    alone = isinstance(found, Tensor)
    vectors = [found] if alone else [] if found is None else found
    start = f"criterion {name!r} on group {group.name} returned"
    if not isinstance(vectors, Sequence) or not all(isinstance(v, Tensor) and not v.is_complex() for v in vectors):
        raise SlimError(
            f"{start} {type(found).__name__}; expected a real tensor, a list of them (one per layer) or None"
        )
    for vector in vectors:
        if tuple(vector.shape) != (group.size,):
            raise SlimError(f"{start} shape {tuple(vector.shape)}; expected ({group.size},), a score per channel")
        if not bool(torch.isfinite(vector).all()):
            raise SlimError(f"{start} NaN or infinity; are weights, gates and gradients finite?")
    if not vectors:
        return None
    how = normalise or ("none" if alone else habit.normalise)
    layers = [normalised(vector.detach().double().cpu(), how, habit.floor, group) for vector in vectors]
    return reduced(torch.stack(layers), reduction or habit.reduction)


def normalised(layer: Tensor, how: Normalise, floor: float, group: ChannelGroup) -> Tensor:
    """A layer's scores divided by their mean or maximum; scores that are all 0 stay 0."""
    if how == "none" or not bool(layer.any()):
        return layer
    scale = layer.mean() if how == "mean" else layer.max()
    if scale <= 0:
        raise SlimError(
            f"group {group.name}: the {how} of its scores is {scale:g}, and dividing by it would not keep their order; "
            "make the scores positive or use normalise='none'"
        )
    return layer / scale.clamp_min(floor)


def reduced(layers: Tensor, how: Reduction) -> Tensor:
    """[layers, size] to [size]."""
    if how == "max":
        return layers.amax(0)
    return layers.mean(0) if how == "mean" else layers.sum(0)


def gate_criterion(model: nn.Module) -> Criterion:
    """The gate vectors of a group: one when tied, one per activation when free."""
    by_group: dict[str, dict[int, Tensor]] = {}
    for _, gate in gates_in(model):
        for group, vector in zip(gate.groups, gate.vectors, strict=True):
            by_group.setdefault(group, {})[id(vector)] = vector.detach().abs()

    def judge(group: ChannelGroup) -> list[Tensor]:
        vectors = list(by_group.get(group.name, {}).values())
        for vector in vectors:
            if vector.numel() != group.size:
                raise SlimError(
                    f"the gate of group {group.name} has {vector.numel()} channels, the graph {group.size}; trace the model again"
                )
        return vectors

    return judge


def batch_norm_criterion(model: nn.Module) -> Criterion:
    """|weight| of the batch norms that scale a channel (network slimming).

    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017.
    """
    paths = norm_paths(model, BATCH_NORMS)
    return lambda group: [channel_norms(model, m, group.size, 1) for m in norm_weights(group, paths)]


def norm_criterion(model: nn.Module, order: int) -> Criterion:
    """Norm of the filters that make a channel: order 1 or 2.

    Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017.
    """
    return lambda group: [channel_norms(model, m, group.size, order) for m in producers(group)]


def geometric_median_criterion(model: nn.Module) -> Criterion:
    """Sum of Euclidean distances from a channel's filters to all others of their layer: what lies near the geometric median
    of the layer can be replaced by the rest.

    He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration", CVPR 2019.
    """

    def distances(member: Member, size: int) -> Tensor:
        rows = filters(model, member)
        return channel_rows(torch.cdist(rows, rows).sum(1), member, size).sum(1)

    return lambda group: [distances(m, group.size) for m in producers(group)]


def random_criterion(seed: int) -> Criterion:
    """Uniform in 0..1, one stream over the groups in order."""
    generator = torch.Generator().manual_seed(seed)
    return lambda group: torch.rand(group.size, generator=generator, dtype=torch.float64)


def taylor_criterion(
    model: nn.Module, graph: ChannelGraph, batches: Iterable[Any] | None, loss: Loss | None
) -> Criterion:
    """Squared change of the loss, to first order, when a layer no longer makes the channel: (sum of gradient * weight)^2
    over its weight and bias there, averaged over ``batches``. Norm layers that scale the channel are layers too.

    Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019.

    The model runs in evaluation mode: under a batch norm that uses its batch's statistics the loss does not depend on a
    filter's scale, so the sum of gradient * weight would be 0. ``loss`` may switch a head back to training mode for the
    sake of its output. Flags, ``.grad``, buffers and random state are as before afterwards. Memory: one batch's gradients.
    """
    if batches is None or loss is None:
        raise SlimError(
            "criterion 'taylor' needs batches= (an iterable) and loss= (a function of the model and a batch that returns "
            "a scalar tensor); without data use l1"
        )
    norms = norm_paths(model, NORMS)
    layers = {group: taylor_layers(group, norms) for group in graph.groups if group.prunable}
    tensors = {(m.param, m.axis): tensor_of(model, m) for found in layers.values() for layer in found for m in layer}
    totals = {g.name: [torch.zeros(g.size, dtype=torch.float64) for _ in found] for g, found in layers.items()}
    count = 0
    with differentiable(model, tensors):
        for batch in batches:
            count += 1
            sums = position_sums(model, tensors, batch, count, loss)
            for group, found in layers.items():
                for total, layer in zip(totals[group.name], found, strict=True):
                    parts = [channel_rows(sums[m.param, m.axis], m, group.size).sum(1) for m in layer]
                    total += torch.stack(parts).sum(0).square()
    if not count:
        raise SlimError("criterion 'taylor' got no batch: batches is empty, or an iterator that was used up before")
    return lambda group: [total / count for total in totals[group.name]]


def taylor_layers(group: ChannelGroup, norms: set[str]) -> list[list[Member]]:
    """The layers that make or scale a group's channels: the member of each one's weight and of its bias, if any."""
    scales = {m.param: m for m in group.members if m.role == "scale"}
    layers = []
    for weight in [*producers(group), *norm_weights(group, norms)]:
        bias = scales.get(weight.param.removesuffix("weight") + "bias")
        layers.append([weight] if bias is None else [weight, bias])
    return layers


def producers(group: ChannelGroup) -> list[Member]:
    """The weights that make a group's channels."""
    return [m for role in ("out", "depthwise") for m in group.members if m.role == role]


def norm_paths(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, kinds)}


def norm_weights(group: ChannelGroup, paths: set[str]) -> list[Member]:
    """The weights of norms that scale a group's channels."""
    return [m for m in group.members if m.role == "scale" and m.layer in paths and m.param.endswith("weight")]


def tensor_of(model: nn.Module, member: Member) -> Tensor:
    """The parameter or buffer that a member names."""
    try:
        tensor = getattr(model.get_submodule(member.layer), member.param.rpartition(".")[2])
    except AttributeError:
        tensor = None
    if not isinstance(tensor, Tensor) or member.axis >= tensor.ndim:
        raise SlimError(f"the graph's {member.param} is not in this model; trace the model again")
    return tensor


def filters(model: nn.Module, member: Member) -> Tensor:
    """What belongs to each position of a member's axis, [positions, elements], float64 on the CPU."""
    rows = tensor_of(model, member).detach().double().cpu().movedim(member.axis, 0)
    return rows.reshape(len(rows), -1)


def channel_rows(rows: Tensor, member: Member, size: int) -> Tensor:
    """From what belongs to each position, [positions, ...], to what belongs to each channel of the group, [size, elements]."""
    if max(member.index) >= len(rows):
        raise SlimError(f"{member.param} has {len(rows)} channels, the graph expects more; trace the model again")
    return rows.index_select(0, member.places).reshape(size, -1)


def channel_norms(model: nn.Module, member: Member, size: int, order: int) -> Tensor:
    """Norm over everything that belongs to one channel, [size]."""
    rows = filters(model, member)
    if len(member.index) == size:
        # One filter a channel: the norms are gathered instead of the filters.
        norms = torch.linalg.vector_norm(rows, order, dim=1)
        return channel_rows(norms, member, size).flatten()
    joined: Tensor = torch.linalg.vector_norm(channel_rows(rows, member, size), order, dim=1)
    return joined
