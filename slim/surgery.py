"""Carries out a plan: the masked model (full size, removed channels never read) and the pruned one (narrow)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from slim.errors import SlimError
from slim.gate import gates_in
from slim.graph import Example
from slim.optimizer_state import cut_optimizer
from slim.plan import GroupPlan, Plan
from slim.propagate import Propagation, call_arguments, evaluation_mode, tensors_in, untouched
from slim.slicing import Keep, positions_kept, slice_axes, view_axes
from slim.widths import check_layers, refresh_widths, set_count

Model = TypeVar("Model", bound=nn.Module)


def mask(model: Model, plan: Plan) -> Model:
    """A full-size copy in which removed channels are held at 0 wherever they are consumed.

    Every consumer reads a channel through a weight; the weights that read a removed channel are 0.
    """
    positions_kept(model, plan)
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


def apply_plan(model: Any, plan: Plan, **state: Any) -> Any:
    """The pruned model: a new, narrower one; ``model`` is untouched.

    With ``optimizer=`` and / or ``ema=`` returns (model, optimizer, ema), all new and cut alike: per-parameter optimiser
    state (momentum, moments) is sliced with its parameter, param-group options are kept. All or nothing: on any error what
    was given is as it was. SlimError names the layer that the plan does not fit or would break.
    """
    unknown = set(state) - {"optimizer", "ema"}
    if unknown:
        raise TypeError(f"apply_plan got {', '.join(sorted(unknown))}; it takes optimizer= and ema=")
    keep = positions_kept(model, plan)
    pruned = cut(model, plan, keep)
    if plan.example is not None and not plan.sealed:
        check_shapes(pruned, model, plan.example)
    if not state:
        return pruned
    optimizer, ema = state.get("optimizer"), state.get("ema")
    new_ema = None if ema is None else cut(ema, averaged(plan), positions_kept(ema, averaged(plan)))
    return pruned, None if optimizer is None else cut_optimizer(optimizer, model, pruned, plan, keep), new_ema


def averaged(plan: Plan) -> Plan:
    """The plan for an AveragedModel, which holds the network as its ``module``."""

    def moved(group: GroupPlan) -> GroupPlan:
        return replace(group, members=tuple(replace(m, param=f"module.{m.param}") for m in group.members))

    shapes = {f"module.{name}": shape for name, shape in plan.shapes.items()}
    return replace(plan, groups=tuple(moved(g) for g in plan.groups), shapes=shapes)


def cut(model: Model, plan: Plan, keep: Keep) -> Model:
    """A narrow copy of the model."""
    narrow = narrow_tensors(model, keep)
    pruned = copied(model, narrow)
    set_counts(pruned, keep, set(named_tensors(model)))
    cut_gates(pruned, plan.groups)
    refresh_widths(pruned)
    check_layers(pruned)
    return pruned


@contextmanager
def narrowed(model: nn.Module, keep: Keep) -> Iterator[None]:
    """The model itself is narrow for the duration, but for its gates: no copy of what is not cut, nor, where runs of channels
    stay, of what is; and nothing left behind."""
    with untouched(model):
        names = set(named_tensors(model))
        narrow = narrow_tensors(model, keep, view_axes)
        for module in model.modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                table.update({key: narrow[id(tensor)] for key, tensor in table.items() if id(tensor) in narrow})
        set_counts(model, keep, names)
        refresh_widths(model)
        yield


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def narrow_tensors(
    model: nn.Module, keep: Keep, taken: Callable[[Tensor, dict[int, Tensor]], Tensor] = slice_axes
) -> dict[int, Any]:
    """By the identity of each tensor that is cut, what takes its place."""
    tensors = named_tensors(model)
    narrow: dict[int, Any] = {}
    for name, axes in keep.items():
        if name in tensors:
            old, new = tensors[name], taken(tensors[name], axes)
            narrow[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    return narrow


def set_counts(model: nn.Module, keep: Keep, tensors: set[str]) -> None:
    """The attributes among what is kept that count channels, in place."""
    for name, axes in keep.items():
        if name not in tensors:
            for axis, kept in axes.items():
                set_count(model, name, axis, len(kept))


def copied(model: Model, instead: dict[int, Any] | None = None) -> Model:
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
    tensors = [*model.parameters(), *model.buffers()]
    hollow: dict[int, Any] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device="meta")
        hollow[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    inputs = tuple(torch.empty(shape, dtype=getattr(torch, kind), device="meta") for shape, kind in example)
    Propagation(copied(model, hollow), muted=True).run(inputs)


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


def max_difference(first: nn.Module, second: nn.Module, inputs: Any) -> float:
    """Largest absolute difference between two models' outputs in evaluation mode, over the first's largest magnitude.

    Every floating tensor among the outputs is compared; the largest ratio is returned.
    """
    args, kwargs = call_arguments(inputs)
    with torch.no_grad(), evaluation_mode(first), evaluation_mode(second):
        outputs = [
            [t for t in tensors_in(model(*args, **kwargs)) if t.is_floating_point()] for model in (first, second)
        ]
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
