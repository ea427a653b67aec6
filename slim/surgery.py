"""Carries out a plan: the masked model (full size, removed channels never read) and the pruned one (narrow)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from slim.errors import SlimError
from slim.gate import gates_in
from slim.plan import GroupPlan, Plan
from slim.propagate import call_arguments, evaluation_mode

Keep = dict[str, dict[int, Tensor]]
"""For each parameter or buffer that is cut: axis -> positions kept, ascending."""

Model = TypeVar("Model", bound=nn.Module)


def positions_kept(model: nn.Module, plan: Plan) -> Keep:
    """What the plan leaves of every tensor that it touches; SlimError where the plan does not fit the model."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    removed: dict[str, dict[int, set[int]]] = {}
    for group in plan.groups:
        for member in group.members:
            tensor = tensors.get(member.param)
            if tensor is None or member.axis >= tensor.ndim or max(member.index) >= tensor.shape[member.axis]:
                found = "no such tensor" if tensor is None else f"shape {tuple(tensor.shape)}"
                raise SlimError(
                    f"the plan does not fit: group {group.name} needs {member.param} with axis {member.axis} of at least "
                    f"{max(member.index) + 1}, the model has {found}; apply it to a copy of the network that was traced"
                )
            positions = member.positions(group.removed, group.size)
            removed.setdefault(member.param, {}).setdefault(member.axis, set()).update(positions)
    keep: Keep = {}
    for name, axes in removed.items():
        for axis, gone in axes.items():
            if gone:
                size = tensors[name].shape[axis]
                kept = [i for i in range(size) if i not in gone]
                if not kept:
                    raise SlimError(f"the plan removes every channel of {name} (axis {axis}, {size} positions)")
                keep.setdefault(name, {})[axis] = torch.tensor(kept)
    return keep


def mask(model: Model, plan: Plan) -> Model:
    """A full-size copy in which removed channels are held at 0 wherever they are consumed.

    Every consumer reads a channel through a weight; the weights that read a removed channel are 0.
    """
    positions_kept(model, plan)
    masked = copy.deepcopy(model)
    parameters = dict(masked.named_parameters())
    with torch.no_grad():
        for group in plan.groups:
            for member in group.members:
                gone = member.positions(group.removed, group.size)
                if member.role == "in" and gone:
                    weight = parameters[member.param]
                    weight.index_fill_(member.axis, torch.tensor(gone, device=weight.device), 0.0)
    return masked


@overload
def apply_plan(model: Model, plan: Plan) -> Model: ...
@overload
def apply_plan(
    model: Model, plan: Plan, *, optimizer: Optimizer | None = ..., ema: AveragedModel | None = ...
) -> tuple[Model, Optimizer | None, AveragedModel | None]: ...


def apply_plan(model: Any, plan: Plan, **state: Any) -> Any:
    """The pruned model: a new, narrower one; ``model`` is untouched.

    With ``optimizer=`` and / or ``ema=`` returns (model, optimizer, ema), all new and cut alike: per-parameter optimiser
    state (momentum, moments) is sliced with its parameter, param-group options are kept.
    """
    unknown = set(state) - {"optimizer", "ema"}
    if unknown:
        raise TypeError(f"apply_plan got {', '.join(sorted(unknown))}; it takes optimizer= and ema=")
    pruned = cut(model, plan)
    if not state:
        return pruned
    optimizer, ema = state.get("optimizer"), state.get("ema")
    new_ema = copy.deepcopy(ema)
    if new_ema is not None:
        new_ema.module = cut(new_ema.module, plan)
    return pruned, None if optimizer is None else cut_optimizer(optimizer, model, pruned, plan), new_ema


def cut(model: Model, plan: Plan) -> Model:
    """A narrow copy of the model."""
    keep = positions_kept(model, plan)
    pruned = copy.deepcopy(model)
    for name, axes in keep.items():
        replace_tensor(pruned, name, slice_axes(get_tensor(pruned, name), axes))
    cut_gates(pruned, plan.groups)
    refresh_widths(pruned)
    return pruned


def slice_axes(tensor: Tensor, axes: dict[int, Tensor]) -> Tensor:
    """The kept positions along each axis, in memory of their own."""
    channels_last = (
        tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    out = tensor.detach().clone()
    for axis, kept in axes.items():
        out = out.index_select(axis, kept.to(out.device))
    return out.contiguous(memory_format=torch.channels_last) if channels_last else out.contiguous()


def get_tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), attribute)
    return tensor


def replace_tensor(model: nn.Module, name: str, new: Tensor) -> None:
    """Put a new tensor in place of a parameter or buffer, wherever the model holds it."""
    old = get_tensor(model, name)
    value = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for key, tensor in table.items():
                if tensor is old:
                    table[key] = value


def cut_gates(model: nn.Module, groups: Iterable[GroupPlan]) -> None:
    """Keep each gate's entries of the channels that stay; vectors shared between gates stay shared. In place."""
    plans = {group.name: group for group in groups}
    new_vectors: dict[int, nn.Parameter] = {}
    originals: list[nn.Parameter] = []
    for _, gate in gates_in(model):
        kept_entries: list[int] = []
        start = 0
        for number, (name, vector) in enumerate(zip(gate.groups, list(gate.vectors), strict=True)):
            keep = list(plans[name].keep) if name in plans else list(range(vector.numel()))
            kept_entries += [start + k for k in keep]
            start += vector.numel()
            if name in plans and id(vector) not in new_vectors:
                if plans[name].size != vector.numel():
                    raise SlimError(
                        f"the gate of group {name} has {vector.numel()} channels, the plan {plans[name].size}"
                    )
                originals.append(vector)
                kept = torch.tensor(keep, device=vector.device)
                new_vectors[id(vector)] = nn.Parameter(vector.detach()[kept], vector.requires_grad)
            gate.vectors[number] = new_vectors.get(id(vector), vector)
        if gate.index is not None:
            place = {entry: n for n, entry in enumerate(kept_entries)}
            gate.index = torch.tensor([place[i] for i in gate.index.tolist() if i in place], device=gate.index.device)


def refresh_widths(model: nn.Module) -> None:
    """Set the modules' channel counts from their tensors, in place."""
    for module in model.modules():
        refresh = WIDTH_ATTRIBUTES.get(base_kind(module))
        if refresh is not None:
            refresh(module)


def refresh_convolution(module: Any) -> None:
    """A depthwise convolution has as many groups as input channels; other group counts never change."""
    weight, transposed = module.weight, module.transposed
    rows, columns = weight.shape[0], weight.shape[1]
    depthwise = module.groups > 1 and module.groups == module.in_channels
    if transposed:
        module.groups = rows if depthwise else module.groups
        module.in_channels, module.out_channels = rows, columns * module.groups
    else:
        module.groups = rows // (module.out_channels // module.groups) if depthwise else module.groups
        module.in_channels, module.out_channels = columns * module.groups, rows


def refresh_linear(module: Any) -> None:
    module.out_features, module.in_features = module.weight.shape


def refresh_norm(module: Any) -> None:
    vector = module.weight if module.weight is not None else module.running_mean
    module.num_features = module.num_features if vector is None else vector.numel()


WIDTH_ATTRIBUTES: dict[type[nn.Module] | None, Any] = {
    nn.modules.conv._ConvNd: refresh_convolution,
    nn.Linear: refresh_linear,
    nn.modules.batchnorm._NormBase: refresh_norm,
}


def base_kind(module: nn.Module) -> type[nn.Module] | None:
    """The class of ``WIDTH_ATTRIBUTES`` that a module is an instance of."""
    return next((kind for kind in WIDTH_ATTRIBUTES if kind is not None and isinstance(module, kind)), None)


def cut_optimizer(optimizer: Optimizer, model: nn.Module, pruned: nn.Module, plan: Plan) -> Optimizer:
    """A new optimiser over the pruned model's parameters, its state sliced like them."""
    keep = positions_kept(model, plan)
    names = {id(p): name for name, p in model.named_parameters()}
    successors = dict(pruned.named_parameters())
    gate_keep = gate_positions(model, plan)
    new = copy.copy(optimizer)
    new.param_groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    new.state = type(optimizer.state)(dict)  # type: ignore[call-arg]
    for old_group, new_group in zip(optimizer.param_groups, new.param_groups, strict=True):
        new_group["params"] = []
        for old in old_group["params"]:
            if id(old) not in names:
                raise SlimError(
                    "the optimizer holds a parameter that is not the model's; give the one that trains this model"
                )
            name = names[id(old)]
            successor = successors[name]
            new_group["params"].append(successor)
            axes = gate_keep.get(id(old), keep.get(name, {}))
            if old in optimizer.state:
                new.state[successor] = {
                    key: slice_axes(value, axes)
                    if isinstance(value, Tensor) and value.shape == old.shape
                    else copy.deepcopy(value)
                    for key, value in optimizer.state[old].items()
                }
    return new


def gate_positions(model: nn.Module, plan: Plan) -> dict[int, dict[int, Tensor]]:
    """For each gate vector of a planned group: axis 0 -> entries kept."""
    plans = {group.name: group for group in plan.groups}
    return {
        id(vector): {0: torch.tensor(plans[name].keep)}
        for _, gate in gates_in(model)
        for name, vector in zip(gate.groups, gate.vectors, strict=True)
        if name in plans
    }


def max_difference(first: nn.Module, second: nn.Module, inputs: Any) -> float:
    """Largest absolute difference between two models' outputs in evaluation mode, over the first's largest magnitude.

    Every floating tensor among the outputs is compared; the largest ratio is returned.
    """
    args, kwargs = call_arguments(inputs)
    with torch.no_grad(), evaluation_mode(first), evaluation_mode(second):
        outputs = [tensors_of(model(*args, **kwargs)) for model in (first, second)]
    if [t.shape for t in outputs[0]] != [t.shape for t in outputs[1]]:
        raise SlimError(
            f"outputs differ in shape: {[tuple(t.shape) for t in outputs[0]]} and {[tuple(t.shape) for t in outputs[1]]}"
        )
    worst = 0.0
    for a, b in zip(*outputs, strict=True):
        if a.numel():
            ratio = (a.double() - b.double()).abs().max() / a.double().abs().max().clamp_min(1e-30)
            worst = max(worst, float(ratio)) if not bool(torch.isnan(ratio)) else float("nan")
    return worst


def tensors_of(output: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_flatten(output)[0]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
