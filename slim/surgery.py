"""Carries out a plan: the masked model (full size, removed channels never read) and the pruned one (narrow)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from slim.errors import SlimError
from slim.forward import untouched
from slim.gate import gates_in
from slim.graph import Example, Member
from slim.plan import GroupPlan, Plan
from slim.propagate import Propagation
from slim.widths import check_layers, refresh_widths, set_count

Model = TypeVar("Model", bound=nn.Module)
KeptIndices = dict[str, dict[int, Tensor]]
"""For each parameter or buffer that is cut (or attribute that counts channels): axis -> positions kept, ascending."""
OMITTED: Any = object()


def mask(model: Model, plan: Plan) -> Model:
    """A full-size copy in which removed channels are held at 0 wherever they are consumed.

    Every consumer reads a channel through a weight; the weights that read a removed channel are 0.

    Args:
        model: the model for which the plan was made, or a copy of it; it is not changed
        plan: what to keep

    Raises:
        SlimError: naming the parameter that the plan does not fit.

    Example:
        >>> import slim, torch
        >>> from torch import nn
        >>> model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.rand(1, 3, 8, 8)
        >>> graph = slim.trace(model, x)
        >>> plan = slim.make_plan(graph, slim.score(model, graph, "l1"), macs=0.5, round_to=1, min_channels=1)
        >>> masked = slim.mask(model, plan)
        >>> masked[2].weight.shape == model[2].weight.shape
        True
        >>> slim.max_difference(masked, slim.apply_plan(model, plan), x) < 1e-4
        True
    """
    kept_indices(model, plan)
    masked = copied(model)
    tensors = named_tensors(masked)
    with torch.no_grad():
        for group in plan.groups:
            for member in group.members:
                gone = member.positions(group.removed, group.size)
                if member.role == "in" and gone:
                    weight = tensors[member.param]
                    weight.index_fill_(member.axis, torch.tensor(gone, device=weight.device), 0.0)
    return masked


@overload
def apply_plan(model: Model, plan: Plan) -> Model: ...
@overload
def apply_plan(
    model: Model, plan: Plan, *, optimizer: Optimizer | None = ..., ema: AveragedModel | None = ...
) -> tuple[Model, Optimizer | None, AveragedModel | None]: ...


def apply_plan(model: Any, plan: Plan, *, optimizer: Any = OMITTED, ema: Any = OMITTED) -> Any:
    """The pruned model: a new, narrower one; ``model`` is untouched.

    All or nothing: on any error what was given is as it was.

    Args:
        model: the model for which the plan was made, or a copy of it
        plan: what to keep
        optimizer: the optimiser that trains ``model``: per-parameter state (momentum, moments) is sliced with its
            parameter, param-group options are kept
        ema: a ``torch.optim.swa_utils.AveragedModel`` of ``model``

    Returns:
        The pruned model; with ``optimizer=`` and / or ``ema=`` (model, optimizer, ema), all new and cut alike.

    Raises:
        SlimError: naming the layer that the plan does not fit or would break.

    Example:
        >>> import slim, torch
        >>> from torch import nn
        >>> model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.zeros(1, 3, 8, 8)
        >>> graph = slim.trace(model, x)
        >>> plan = slim.make_plan(graph, slim.score(model, graph, "l1"), channels=0.5, round_to=1, min_channels=1)
        >>> slim.apply_plan(model, plan)[2]
        Conv2d(2, 2, kernel_size=(1, 1), stride=(1, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruned, optimizer, _ = slim.apply_plan(model, plan, optimizer=optimizer)
        >>> optimizer.param_groups[0]["params"][0] is pruned[0].weight
        True
    """
    keep = kept_indices(model, plan)
    pruned = cut(model, plan, keep)
    if plan.example is not None and not plan.is_verified:
        check_shapes(pruned, model, plan.example)
    if optimizer is OMITTED and ema is OMITTED:
        return pruned
    new_ema = None
    if ema not in (None, OMITTED):
        new_ema = cut(ema, averaged(plan), kept_indices(ema, averaged(plan)))
    new_optimizer = None
    if optimizer not in (None, OMITTED):
        new_optimizer = cut_optimizer(optimizer, model, pruned, plan, keep)
    return pruned, new_optimizer, new_ema


def kept_indices(model: nn.Module, plan: Plan) -> KeptIndices:
    """What the plan leaves of everything that it touches; SlimError where the plan does not fit the model."""
    tensors = named_tensors(model)
    for name, planned in plan.shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != planned:
            raise plan_mismatch(
                f"{name} has shape {planned} in the plan", f"shape {found}" if found else "no such tensor"
            )
    gone: dict[str, dict[int, Tensor]] = {}
    for group in plan.groups:
        removed = torch.zeros(group.size, dtype=torch.bool)
        removed[list(group.removed)] = True
        for member in group.members:
            length, index = axis_length(model, tensors, member), member.index_tensor
            if length is None or int(index.max()) >= length:
                wanted = f"group {group.name} needs {member.param} with axis {member.axis} of at least {max(member.index) + 1}"
                raise plan_mismatch(wanted, "no such tensor" if length is None else f"{length} positions")
            axes = gone.setdefault(member.param, {})
            here = axes.setdefault(member.axis, torch.zeros(length, dtype=torch.bool))
            here[index.reshape(group.size, -1)[removed].flatten()] = True
    keep: KeptIndices = {}
    for name, axes in gone.items():
        for axis, here in axes.items():
            if bool(here.all()):
                raise SlimError(f"the plan removes every channel of {name} (axis {axis}, {len(here)} positions)")
            if bool(here.any()):
                keep.setdefault(name, {})[axis] = (~here).nonzero().flatten()
    return keep


def plan_mismatch(wanted: str, found: str) -> SlimError:
    return SlimError(
        f"the plan does not fit: {wanted}, the model has {found}; apply it to a copy of the network that was traced"
    )


def axis_length(model: nn.Module, tensors: Mapping[str, Tensor], member: Member) -> int | None:
    """Length of the axis that a member names; None when the model has no such thing."""
    if member.role != "width":
        tensor = tensors.get(member.param)
        return None if tensor is None or member.axis >= tensor.ndim else tensor.shape[member.axis]
    try:
        count = getattr(model.get_submodule(member.layer), member.param.rpartition(".")[2])
    except AttributeError:
        return None
    return int(count[member.axis] if isinstance(count, tuple) else count)


def averaged(plan: Plan) -> Plan:
    """The plan for an AveragedModel, which holds the network as its ``module``."""
    groups = [replace(g, members=tuple(replace(m, param=f"module.{m.param}") for m in g.members)) for g in plan.groups]
    shapes = {f"module.{name}": shape for name, shape in plan.shapes.items()}
    return replace(plan, groups=tuple(groups), shapes=shapes)


def cut(model: Model, plan: Plan, keep: KeptIndices) -> Model:
    """A narrow copy of the model."""
    pruned = copied(model, narrow_tensors(model, keep, sliced))
    set_counts(pruned, keep, set(named_tensors(model)))
    cut_gates(pruned, plan.groups)
    refresh_widths(pruned)
    check_layers(pruned)
    return pruned


@contextmanager
def narrowed(model: nn.Module, keep: KeptIndices) -> Iterator[None]:
    """The model itself is narrow for the duration, but for its gates: no copy of what is not cut, nor, where runs of channels
    stay, of what is; and nothing left behind."""
    with untouched(model):
        names = set(named_tensors(model))
        swap_tensors(model, narrow_tensors(model, keep, viewed))
        set_counts(model, keep, names)
        refresh_widths(model)
        yield


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def narrow_tensors(
    model: nn.Module, keep: KeptIndices, take: Callable[[Tensor, dict[int, Tensor]], Tensor]
) -> dict[int, Tensor]:
    """By the identity of each tensor that is cut, what takes its place."""
    tensors = named_tensors(model)
    return {id(tensors[name]): like(tensors[name], take(tensors[name], keep[name])) for name in keep if name in tensors}


def like(old: Tensor, new: Tensor) -> Tensor:
    """A parameter in place of a parameter, a plain tensor in place of a plain one."""
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def sliced(tensor: Tensor, axes: dict[int, Tensor]) -> Tensor:
    """The kept positions along each axis, in memory of their own."""
    channels_last = (
        tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    out = tensor.detach() if axes else tensor.detach().clone()
    for axis, kept in axes.items():
        out = out.index_select(axis, kept.to(out.device))
    return out.contiguous(memory_format=torch.channels_last) if channels_last else out.contiguous()


def viewed(tensor: Tensor, axes: dict[int, Tensor]) -> Tensor:
    """The kept positions along each axis; in the tensor's own memory where they are one run, which is then read only."""
    out = tensor.detach()
    for axis, kept in axes.items():
        first, count = int(kept[0]), len(kept)
        run = int(kept[-1]) - first + 1 == count
        out = out.narrow(axis, first, count) if run else out.index_select(axis, kept.to(out.device))
    return out


def swap_tensors(model: nn.Module, instead: Mapping[int, Tensor]) -> None:
    """Put other tensors, by identity, in place of parameters and buffers, wherever the model holds them; in place."""
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            table.update({key: instead[id(tensor)] for key, tensor in table.items() if id(tensor) in instead})


def set_counts(model: nn.Module, keep: KeptIndices, tensors: set[str]) -> None:
    """The attributes among what is kept that count channels, in place."""
    for name, axes in keep.items():
        if name not in tensors:
            for axis, kept in axes.items():
                set_count(model, name, axis, len(kept))


def copied(model: Model, instead: Mapping[int, Tensor] | None = None) -> Model:
    """A deep copy; ``instead`` has, by identity, what takes the place of some of the model's tensors."""
    try:
        return copy.deepcopy(model, dict(instead or {}))
    except (RuntimeError, TypeError) as error:
        raise SlimError(
            f"the model cannot be copied ({str(error).splitlines()[0]}); a module holds what "
            "copy.deepcopy cannot copy, such as a tensor with a gradient history: set it to None first"
        ) from error


def check_shapes(pruned: nn.Module, model: nn.Module, example: Example) -> None:
    """Run the cut network on shapes alone; SlimError naming the layer where they no longer fit.

    Nothing is said of networks that cannot run on shapes alone even before the cut (whose code reads values).
    """
    try:
        run_on_shapes(pruned, example)
    except SlimError as error:
        try:
            run_on_shapes(model, example)
        except SlimError:
            return
        text = str(error.__cause__).strip().splitlines()[0]
        where = str(error).partition(" in ")[2].partition(":")[0]
        raise SlimError(
            f"the plan would break {where}: {text}; make the plan with slim.make_plan on a graph of this very network"
        ) from error


def run_on_shapes(model: nn.Module, example: Example) -> None:
    """Forward once on the meta device, which computes shapes and no values; the model is not touched."""
    hollow = {id(t): like(t, torch.empty_like(t, device="meta")) for t in [*model.parameters(), *model.buffers()]}
    inputs = tuple(torch.empty(shape, dtype=getattr(torch, kind), device="meta") for shape, kind in example)
    Propagation(copied(model, hollow), muted=True).run(inputs)


def kept_gate_entries(model: nn.Module, groups: Iterable[GroupPlan]) -> dict[int, Tensor]:
    """For each gate vector of a planned group, by identity, the entries kept."""
    plans = {group.name: group for group in groups}
    kept = {}
    for _, gate in gates_in(model):
        for name, vector in zip(gate.groups, gate.vectors, strict=True):
            if name in plans and plans[name].size != vector.numel():
                raise SlimError(f"the gate of group {name} has {vector.numel()} channels, the plan {plans[name].size}")
            if name in plans:
                kept[id(vector)] = torch.tensor(plans[name].keep)
    return kept


def cut_gates(model: nn.Module, groups: Iterable[GroupPlan]) -> None:
    """Keep each gate's entries of the channels that stay; vectors shared between gates stay shared. In place."""
    kept = kept_gate_entries(model, groups)
    new_vectors: dict[int, nn.Parameter] = {}
    for _, gate in gates_in(model):
        entries: list[int] = []
        start = 0
        for number, vector in enumerate(list(gate.vectors)):
            keep = kept.get(id(vector))
            entries += range(start, start + vector.numel()) if keep is None else (start + keep).tolist()
            start += vector.numel()
            if keep is not None:
                new = nn.Parameter(vector.detach()[keep.to(vector.device)], vector.requires_grad)
                gate.vectors[number] = new_vectors.setdefault(id(vector), new)
        if gate.index is not None:
            position = {entry: n for n, entry in enumerate(entries)}
            index = [position[i] for i in gate.index.tolist() if i in position]
            gate.index = torch.tensor(index, device=gate.index.device)


def cut_optimizer(
    optimizer: Optimizer, model: nn.Module, pruned: nn.Module, plan: Plan, keep: KeptIndices
) -> Optimizer:
    """A new optimiser over the pruned model's parameters, its state (momentum, moments) sliced like them."""
    names = {id(p): name for name, p in model.named_parameters()}
    successors = dict(pruned.named_parameters())
    gate_entries = kept_gate_entries(model, plan.groups)
    new = copy.copy(optimizer)
    new.param_groups = [{**group, "params": []} for group in optimizer.param_groups]
    new.state = type(optimizer.state)(dict)  # type: ignore[call-arg]
    for old_group, new_group in zip(optimizer.param_groups, new.param_groups, strict=True):
        for old in old_group["params"]:
            if id(old) not in names:
                raise SlimError(
                    "the optimizer holds a parameter that is not the model's; give the one that trains this model"
                )
            name = names[id(old)]
            new_group["params"].append(successors[name])
            axes = {0: gate_entries[id(old)]} if id(old) in gate_entries else keep.get(name, {})
            if old in optimizer.state:
                new.state[successors[name]] = {
                    key: sliced(value, axes)
                    if isinstance(value, Tensor) and value.shape == old.shape
                    else copy.deepcopy(value)
                    for key, value in optimizer.state[old].items()
                }
    return new
