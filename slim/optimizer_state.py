"""Cuts an optimiser along with its model: per-parameter state is sliced like the parameter, options are kept."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slim.errors import SlimError
from slim.gate import gates_in
from slim.plan import Plan
from slim.slicing import Keep, slice_axes


def cut_optimizer(optimizer: Optimizer, model: nn.Module, pruned: nn.Module, plan: Plan, keep: Keep) -> Optimizer:
    """A new optimiser over the pruned model's parameters, its state (momentum, moments) sliced like them."""
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
