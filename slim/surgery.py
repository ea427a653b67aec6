"""Carries out a plan: the masked model (full size, removed channels never read) and the pruned one (narrow)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from slim.errors import SlimError
from slim.forward import copied, like
from slim.gate import gates_in, vectors_in
from slim.graph import Member
from slim.plan import Plan
from slim.plan_checks import check_members, check_shapes
from slim.widths import check_layers, note_buffers, refresh_widths, set_count
from slim.wrapped import Model, without_ddp

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

    Examples:
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
    model = without_ddp(model)
    kept_with_gates(model, plan)
    check_members(model, plan)
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
        model: the model for which the plan was made, or a copy of it; of one in ``DistributedDataParallel`` the module
            within it is cut, and what comes back is to be wrapped anew
        plan: what to keep
        optimizer: the optimiser that trains ``model``: per-parameter state (momentum, moments) is sliced with its
            parameter, param-group options are kept
        ema: a ``torch.optim.swa_utils.AveragedModel`` of ``model``

    Returns:
        The pruned model; with ``optimizer=`` and / or ``ema=`` (model, optimizer, ema), all new and cut alike.

    Raises:
        SlimError: naming the layer that the plan does not fit or would break.

    Examples:
        >>> import slim, torch
        >>> from torch import nn
        >>> model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.zeros(1, 3, 8, 8)
        >>> graph = slim.trace(model, x)
        >>> plan = slim.make_plan(graph, slim.score(model, graph, "l1"), channels=0.5, round_to=1, min_channels=1)
        >>> slim.apply_plan(model, plan)[2]
        Conv2d(2, 2, kernel_size=(1, 1), stride=(1, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruned, optimizer, _ = slim.apply_plan(model, plan, optimizer=optimizer)
        >>> optimizer.param_groups[0].get("params")[0] is pruned[0].weight
        True
    """
    model = without_ddp(model)
    keep = kept_with_gates(model, plan)
    pruned = cut(model, keep)
    if plan.example is not None:
        check_shapes(pruned, model, plan.example)
    check_members(model, plan)
    if optimizer is OMITTED and ema is OMITTED:
        return pruned
    new_ema = new_optimizer = None
    if ema not in (None, OMITTED):
        averaged = without_ddp(ema.module)
        new_ema = copied(ema, {id(ema.module): cut(averaged, kept_with_gates(averaged, plan))})
    if optimizer not in (None, OMITTED):
        new_optimizer = cut_optimizer(optimizer, model, pruned, keep)
    return pruned, new_optimizer, new_ema


def kept_indices(model: nn.Module, plan: Plan) -> KeptIndices:
    """What the plan leaves of everything that it touches but gates; SlimError where the plan does not fit the model."""
    tensors = named_tensors(model)
    for name, planned in plan.shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != planned:
            raise plan_mismatch(
                f"{name} has shape {planned} in the plan", f"shape {found}" if found else "no such tensor"
            )
    gone: dict[str, dict[int, Tensor]] = {}
    for group in plan.groups:
        removed = torch.tensor(group.removed, dtype=torch.int64)
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


def kept_with_gates(model: nn.Module, plan: Plan) -> KeptIndices:
    """What the plan leaves of everything that it touches, gates included."""
    keep = kept_indices(model, plan)
    plans = {group.name: group for group in plan.groups}
    for path, number, name, vector in vectors_in(model):
        if name in plans and plans[name].size != vector.numel():
            raise SlimError(f"the gate of group {name} has {vector.numel()} channels, the plan {plans[name].size}")
        if name in plans:
            keep[f"{path}.vectors.{number}"] = {0: torch.tensor(plans[name].keep)}
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
    return int(count[member.axis] if isinstance(count, (tuple, list)) else count)


def cut(model: Model, keep: KeptIndices) -> Model:
    """A narrow copy of the model."""
    pruned = copied(model, narrow_tensors(model, keep))
    finish_cut(pruned, model, keep)
    check_layers(pruned)
    return pruned


def narrow_twin(model: Model, keep: KeptIndices) -> Model:
    """A narrow copy that shares the tensors that are not cut; no check of its layers."""
    shared = {id(tensor): tensor for tensor in named_tensors(model).values()}
    twin = copied(model, shared | narrow_tensors(model, keep))
    finish_cut(twin, model, keep)
    return twin


def finish_cut(pruned: nn.Module, model: nn.Module, keep: KeptIndices) -> None:
    """Set what counts or numbers channels in a copy whose tensors are narrow already, in place."""
    tensors = named_tensors(model)
    for name, axes in keep.items():
        for axis, kept in axes.items() if name not in tensors else ():
            set_count(pruned, name, axis, len(kept))
    note_buffers(pruned, keep.keys() & dict(model.named_buffers()).keys() - model.state_dict(keep_vars=True).keys())
    cut_gates(pruned, model, keep)
    refresh_widths(pruned)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, shared ones under each of their names."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def narrow_tensors(model: nn.Module, keep: KeptIndices) -> dict[int, Tensor]:
    """By the identity of each tensor that is cut, what takes its place."""
    tensors = named_tensors(model)
    cuts = {id(tensors[name]): (tensors[name], keep[name]) for name in keep if name in tensors}
    return {key: like(tensor, sliced(tensor, axes)) for key, (tensor, axes) in cuts.items()}


def sliced(tensor: Tensor, axes: dict[int, Tensor]) -> Tensor:
    """The kept positions along each axis, in memory of their own."""
    channels_last = (
        tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    out = tensor.detach() if axes else tensor.detach().clone()
    for axis, kept in axes.items():
        out = out.index_select(axis, kept.to(out.device))
    return out.contiguous(memory_format=torch.channels_last) if channels_last else out.contiguous()


def swap_tensors(model: nn.Module, instead: Mapping[int, Tensor]) -> None:
    """Put other tensors, by identity, in place of parameters and buffers, wherever the model holds them; in place."""
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            table.update({key: instead[id(tensor)] for key, tensor in table.items() if id(tensor) in instead})


def cut_gates(pruned: nn.Module, model: nn.Module, keep: KeptIndices) -> None:
    """Number the kept channels of each gate anew, whose vectors are narrow already. In place."""
    for (path, gate), (_, new) in zip(gates_in(model), gates_in(pruned), strict=True):
        if gate.index is not None:
            stays = [torch.zeros(vector.numel(), dtype=torch.bool) for vector in gate.vectors]
            for number, entries in enumerate(stays):
                entries[keep.get(f"{path}.vectors.{number}", {0: slice(None)})[0]] = True
            joined, index = torch.cat(stays), gate.index.cpu()
            new.index = (joined.cumsum(0) - 1)[index[joined[index]]].to(gate.index.device)


def cut_optimizer(optimizer: Optimizer, model: nn.Module, pruned: nn.Module, keep: KeptIndices) -> Optimizer:
    """A new optimiser over the pruned model's parameters, its state (momentum, moments) sliced like them."""
    names = {id(p): name for name, p in model.named_parameters()}
    successors = dict(pruned.named_parameters())
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
            for key, value in optimizer.state.get(old, {}).items():
                if isinstance(value, Tensor) and value.ndim and value.shape != old.shape and keep:
                    raise SlimError(
                        f"{type(optimizer).__name__} keeps {key} of {name} in another shape, {tuple(value.shape)}, which cannot "
                        "be cut along; leave optimizer= out and make a new one for the pruned model"
                    )
            if old in optimizer.state:
                new.state[successors[name]] = {
                    key: sliced(value, keep.get(name, {}))
                    if isinstance(value, Tensor) and value.shape == old.shape
                    else copy.deepcopy(value)
                    for key, value in optimizer.state[old].items()
                }
    return new
