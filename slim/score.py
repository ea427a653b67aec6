"""Scores: how much each channel of each group matters. Larger is kept.

A criterion scores one group at a time; ``score`` makes what it returns comparable between layers and groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from slim.errors import SlimError
from slim.forward import evaluation_mode, untouched
from slim.gate import vectors_in
from slim.graph import ChannelGraph, ChannelGroup, Member
from slim.ops import BATCH_NORMS, NORMS
from slim.wrapped import without_ddp

Scores = dict[str, Tensor]
Criterion = Callable[[ChannelGroup], Tensor | Sequence[Tensor] | None]
"""From a group to one score per channel, [size], or to one such vector per layer; None leaves the group whole."""
Loss = Callable[[nn.Module, Any], Tensor]
"""From the model and a batch to a scalar that depends on the model's weights."""
Reduction = Literal["mean", "max", "sum"]
Normalise = Literal["mean", "max", "none"]
Axis = tuple[str, int]
"""A parameter's name and one of its axes."""


NOTHING_FOUND = {
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
    """How much each channel matters, by a criterion; larger is kept.

    The vectors of a group's layers are each divided by their mean or maximum (``normalise``), so that layers and groups
    compare, and then reduced to one (``reduction``). As the layers that share a channel go together, so do their
    scores: Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023. None is the criterion's own default: for
    gates the largest, not normalised, for others the mean, normalised by the mean; a vector that comes alone (as
    ``random``'s) is normalised only on demand.

    Args:
        model: the model that was traced
        graph: what ``slim.trace`` found in it
        criterion: a function from a group to its scores (see ``Criterion``), or a name: ``gate``; ``bn`` (Liu et
            al., ICCV 2017); ``l1``, ``l2`` (Li et al., ICLR 2017); ``fpgm`` (He et al., CVPR 2019); ``taylor`` (Molchanov
            et al., CVPR 2019); ``random``, uniform in 0..1
        seed: of ``random``
        reduction: of the layers' scores to the group's: "mean", "max" or "sum"
        normalise: a layer's scores by their "mean", their "max" or not at all, "none"
        batches: what ``taylor`` reads, an iterable
        loss: for ``taylor``: from the model and a batch to a scalar tensor

    Returns:
        {group name: scores [size], float64 on the CPU} for every prunable group that the criterion can score.

    Raises:
        SlimError: for an unknown choice, a graph of another model, a criterion that finds nothing or returns what is no score.

    Examples:
        >>> import slim, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.ReLU(), nn.Conv2d(3, 2, 1))
        >>> model[0].weight.data = torch.tensor([1.0, -2.0, 3.0]).reshape(3, 1, 1, 1)
        >>> graph = slim.trace(model, torch.zeros(1, 1, 4, 4))
        >>> slim.score(model, graph, "l1")["0"].tolist()
        [0.5, 1.0, 1.5]
    """
    for option, given, choices in (("reduction", reduction, Reduction), ("normalise", normalise, Normalise)):
        if given is not None and given not in get_args(choices):
            raise SlimError(f"{option} is {given!r}; expected one of {', '.join(get_args(choices))}")
    model, groups = without_ddp(model), [group for group in graph.groups if group.prunable]
    if not groups:
        raise SlimError("no group of this graph can be pruned; graph.report() says why")
    generator, batch_norms = torch.Generator().manual_seed(seed), norm_paths(model, BATCH_NORMS)
    built_in: dict[str, Callable[[], Criterion]] = {
        "gate": lambda: gate_criterion(model),
        "bn": lambda: lambda group: [channel_norms(model, m, group.size, 1) for m in norm_weights(group, batch_norms)],
        "l1": lambda: lambda group: [channel_norms(model, m, group.size, 1) for m in producers(group)],
        "l2": lambda: lambda group: [channel_norms(model, m, group.size, 2) for m in producers(group)],
        "fpgm": lambda: lambda group: [channel_distances(model, m, group.size) for m in producers(group)],
        "taylor": lambda: taylor_criterion(model, graph, batches, loss),
        "random": lambda: lambda group: torch.rand(group.size, generator=generator, dtype=torch.float64),
    }
    if isinstance(criterion, str) and criterion in built_in:
        name, score_group = criterion, built_in[criterion]()
    elif callable(criterion):
        name, score_group = getattr(criterion, "__qualname__", "custom"), criterion
    else:
        raise SlimError(f"criterion is {criterion!r}; expected one of {', '.join(built_in)} or a function of a group")
    if criterion == "gate":
        reduction, normalise = reduction or "max", normalise or "none"
    # Weights so small are dead; squared gradients may well be as small.
    floor = 1e-12 if criterion in ("bn", "l1", "l2", "fpgm") else 0.0
    found = {group.name: combined(score_group(group), group, name, reduction, normalise, floor) for group in groups}
    scores = {group: s for group, s in found.items() if s is not None}
    if not scores:
        advice = NOTHING_FOUND.get(name, "") if isinstance(criterion, str) else ": it returned None for every group"
        raise SlimError(f"criterion {name!r} finds nothing to score in this model{advice}")
    return scores


def combined(
    found: Any, group: ChannelGroup, name: str, reduction: Reduction | None, normalise: Normalise | None, floor: float
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
    how = normalise or ("none" if alone else "mean")
    layers = torch.stack([normalised(v.detach().double().cpu(), how, floor, group) for v in vectors])
    return layers.amax(0) if reduction == "max" else layers.sum(0) if reduction == "sum" else layers.mean(0)


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


def gate_criterion(model: nn.Module) -> Criterion:
    """The gate vectors of a group: one when tied, one per activation when free."""
    by_group: dict[str, dict[int, Tensor]] = {}
    for _, _, name, vector in vectors_in(model):
        by_group.setdefault(name, {})[id(vector)] = vector.detach().abs()

    def score_group(group: ChannelGroup) -> list[Tensor]:
        vectors = list(by_group.get(group.name, {}).values())
        for vector in vectors:
            if vector.numel() != group.size:
                raise SlimError(
                    f"the gate of group {group.name} has {vector.numel()} channels, the graph {group.size}; trace the model again"
                )
        return vectors

    return score_group


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


@contextmanager
def differentiable(model: nn.Module, tensors: Mapping[Axis, Tensor]) -> Iterator[None]:
    """Evaluation mode, with gradients for ``tensors``; flags, buffers and random state are put back as they were."""
    flags = [(tensor, tensor.requires_grad) for tensor in tensors.values()]
    try:
        with untouched(model), evaluation_mode(model):
            for tensor in tensors.values():
                tensor.requires_grad_(True)
            yield
    finally:
        for tensor, flag in flags:
            tensor.requires_grad_(flag)


def position_sums(
    model: nn.Module, tensors: Mapping[Axis, Tensor], batch: Any, number: int, loss: Loss
) -> dict[Axis, Tensor]:
    """Sum of gradient * weight over all that lies at each position of an axis, [positions], float64 on the CPU.

    0 for parameters that the loss does not reach. To be called within ``differentiable``.
    """
    with torch.enable_grad():
        value: Any = loss(model, batch)
    start = f"the loss of batch {number} (counted from 1)"
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"has shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"is a {type(value).__name__}"
        raise SlimError(f"{start} {found}; loss must return a scalar tensor: a mean or a sum, without .item()")
    if not bool(torch.isfinite(value)):
        raise SlimError(f"{start} is {value.item()}; use a model whose training is finite, and clean data")
    if not value.requires_grad:
        raise SlimError(
            f"{start} has no gradient; compute it from model(...), without no_grad, inference_mode or detach"
        )
    gradients = torch.autograd.grad(value, list(tensors.values()), allow_unused=True)
    sums = {}
    for ((name, axis), tensor), gradient in zip(tensors.items(), gradients, strict=True):
        if gradient is None:
            sums[name, axis] = torch.zeros(tensor.shape[axis], dtype=torch.float64)
        else:
            product = gradient.double() * tensor.detach().double()
            sums[name, axis] = product.movedim(axis, 0).reshape(tensor.shape[axis], -1).sum(1).cpu()
    return sums


def producers(group: ChannelGroup) -> list[Member]:
    """The weights that make a group's channels."""
    return sorted((m for m in group.members if m.produces), key=lambda m: m.role != "out")


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
    return rows.index_select(0, member.index_tensor).reshape(size, -1)


def channel_norms(model: nn.Module, member: Member, size: int, order: int) -> Tensor:
    """Norm over everything that belongs to one channel, [size]: of the norms of what is at each of its positions."""
    norms = torch.linalg.vector_norm(filters(model, member), order, dim=1)
    whole: Tensor = torch.linalg.vector_norm(channel_rows(norms, member, size), order, dim=1)
    return whole


def channel_distances(model: nn.Module, member: Member, size: int) -> Tensor:
    """Sum of Euclidean distances from a channel's filters to all others of their layer, [size]: what lies near the geometric
    median of the layer can be replaced by the rest."""
    rows = filters(model, member)
    return channel_rows(torch.cdist(rows, rows).sum(1), member, size).sum(1)
