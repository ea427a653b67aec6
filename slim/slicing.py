"""Which positions of which tensor a plan keeps, and the slicing itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slim.errors import SlimError
from slim.graph import Member
from slim.plan import Plan

Keep = dict[str, dict[int, Tensor]]
"""For each parameter or buffer that is cut (or attribute that counts channels): axis -> positions kept, ascending."""


def positions_kept(model: nn.Module, plan: Plan) -> Keep:
    """What the plan leaves of everything that it touches; SlimError where the plan does not fit the model."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, planned in plan.shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != planned:
            raise misfit(f"{name} has shape {planned} in the plan", f"shape {found}" if found else "no such tensor")
    gone: dict[str, dict[int, Tensor]] = {}
    for group in plan.groups:
        removed = torch.zeros(group.size, dtype=torch.bool)
        removed[list(group.removed)] = True
        for member in group.members:
            size, index = extent(model, tensors, member), member.places
            if size is None or int(index.max()) >= size:
                wanted = f"group {group.name} needs {member.param} with axis {member.axis} of at least {max(member.index) + 1}"
                raise misfit(wanted, "no such tensor" if size is None else f"{size} positions")
            axes = gone.setdefault(member.param, {})
            here = axes.setdefault(member.axis, torch.zeros(size, dtype=torch.bool))
            here[index.reshape(group.size, -1)[removed].flatten()] = True
    keep: Keep = {}
    for name, axes in gone.items():
        for axis, here in axes.items():
            if bool(here.all()):
                raise SlimError(f"the plan removes every channel of {name} (axis {axis}, {len(here)} positions)")
            if bool(here.any()):
                keep.setdefault(name, {})[axis] = (~here).nonzero().flatten()
    return keep


def misfit(wanted: str, found: str) -> SlimError:
    return SlimError(
        f"the plan does not fit: {wanted}, the model has {found}; apply it to a copy of the network that was traced"
    )


def extent(model: nn.Module, tensors: dict[str, Tensor], member: Member) -> int | None:
    """Length of the axis that a member names; None when the model has no such thing."""
    if member.role != "width":
        tensor = tensors.get(member.param)
        return None if tensor is None or member.axis >= tensor.ndim else tensor.shape[member.axis]
    try:
        count = getattr(model.get_submodule(member.layer), member.param.rpartition(".")[2])
    except AttributeError:
        return None
    return int(count[member.axis] if isinstance(count, tuple) else count)


def slice_axes(tensor: Tensor, axes: dict[int, Tensor]) -> Tensor:
    """The kept positions along each axis, in memory of their own."""
    channels_last = (
        tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    out = tensor.detach() if axes else tensor.detach().clone()
    for axis, kept in axes.items():
        out = out.index_select(axis, kept.to(out.device))
    return out.contiguous(memory_format=torch.channels_last) if channels_last else out.contiguous()


def view_axes(tensor: Tensor, axes: dict[int, Tensor]) -> Tensor:
    """The kept positions along each axis; in the tensor's own memory where they are one run, which is then read only."""
    out = tensor.detach()
    for axis, kept in axes.items():
        first, count = int(kept[0]), len(kept)
        run = int(kept[-1]) - first + 1 == count
        out = out.narrow(axis, first, count) if run else out.index_select(axis, kept.to(out.device))
    return out
