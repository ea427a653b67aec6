"""What a plan is held against before it is carried out: a trace of the model, and the cut network on shapes alone."""

from __future__ import annotations

from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from slim.channels import WITHOUT_ARITHMETIC, ChannelPropagation
from slim.errors import SlimError
from slim.forward import copied, like
from slim.gate import vectors_in
from slim.graph import ChannelGroup, Example, inputs_like
from slim.groups import find_groups
from slim.ops import KINDS
from slim.plan import GroupPlan, Plan
from slim.rules import RULES

Place = tuple[str, int, str, int]
"""A parameter's (or buffer's, or attribute's) name, one of its axes, the role of that, and a position there."""
SAME_WORK = {"addmm": ("mm", "add"), "bmm": ("mul",)}
"""What torch takes one for the other by the width alone: a Linear adds its bias within the product where its inputs are
contiguous, and einsum multiplies a lone channel without a sum."""


def check_members(model: nn.Module, plan: Plan) -> None:
    """SlimError where a plan that is not known from a trace removes other than whole channels of what a trace finds.

    Where a plan has no example of tensor inputs there is no trace; ``slim.prove`` tells then.
    """
    if plan.traced or plan.example is None:
        return
    graph, _, _ = find_groups(model, inputs_like(plan.example, model), allow_inexact=True)
    owners = {place: (g, c) for g in graph.groups for c in range(g.size) for place in places_of(g, c)}
    gated = {name for _, _, name, _ in vectors_in(model)}
    remedy = "make the plan with slim.make_plan on a graph of this very network"
    gone: set[Place] = set()
    touched: set[tuple[str, int]] = set()
    for planned in plan.groups:
        for number in planned.removed:
            for place in places_of(planned, number):
                if place[2] == "width" and place not in owners:
                    continue  # an attribute that a dry run found
                group, channel = owners.get(place, (None, 0))
                if group is None or group.frozen_reason or (planned.name in gated and channel != number):
                    why = "of no channel" if group is None else group.frozen_reason or f"of channel {channel}"
                    raise SlimError(
                        f"the plan does not fit: channel {number} of group {planned.name} takes position {place[3]} of "
                        f"{place[0]} (axis {place[1]}), which a trace finds to be {why}; {remedy}"
                    )
                gone.add(place)
                touched.add((group.name, channel))
    for name, channel in sorted(touched):
        for place in places_of(graph.by_name[name], channel):
            if place not in gone:
                raise SlimError(
                    f"the plan does not fit: it removes channel {channel} of what a trace finds as group {name}, but keeps "
                    f"position {place[3]} of {place[0]} (axis {place[1]}), where that channel is, too; {remedy}"
                )
    plan.known_from_trace()


def places_of(group: ChannelGroup | GroupPlan, channel: int) -> list[Place]:
    """All that one of a group's channels occupies."""
    return [
        (m.param, m.axis, m.role, position) for m in group.members for position in m.positions([channel], group.size)
    ]


def check_shapes(pruned: nn.Module, model: nn.Module, example: Example) -> None:
    """Run both networks on shapes alone; SlimError where the cut one fails, or does something else than the whole one.

    Nothing is said of networks that cannot run on shapes alone even before the cut (whose code reads values).
    """
    whole, narrow = calls_on_shapes(model, example), calls_on_shapes(pruned, example)
    if isinstance(whole, str):
        return
    if isinstance(narrow, str):
        raise SlimError(
            f"the plan would break {narrow}; make the plan with slim.make_plan on a graph of this very network"
        )
    for (name, where, numbers), (other, there, others) in zip_longest(whole, narrow, fillvalue=("nothing", "", ())):
        if (name, numbers) != (other, others):
            raise SlimError(
                f"the plan would change what the network does: {other} in {there or 'the model'} in place of {name} in "
                f"{where or 'the model'}; code there depends on the number of channels: keep more of them (min_channels=, "
                "overrides=, ignore=)"
            )


def keep_shape(norm: Any, x: Tensor) -> Tensor:
    """What a batch norm does to shapes; ValueError where it is for another number of channels."""
    vectors = [t for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var) if t is not None]
    if any(len(vector) != x.shape[1] for vector in vectors):
        raise ValueError(f"a batch norm of {len(vectors[0])} channels gets {x.shape[1]}")
    return x


def calls_on_shapes(model: nn.Module, example: Example) -> list[tuple[str, str, tuple[float, ...]]] | str:
    """The operators of a forward pass on the meta device, which computes shapes and no values, with their modules and
    numbers; or where and why it fails. What only rearranges or copies elements is left out, and ``SAME_WORK`` counts alike:
    that one channel can make a copy needless and einsum takes its factors in an order that depends on their sizes changes no
    result."""
    hollow = {id(t): like(t, torch.empty_like(t, device="meta")) for t in [*model.parameters(), *model.buffers()]}
    inputs = tuple(torch.empty(shape, dtype=getattr(torch, kind), device="meta") for shape, kind in example)
    shell = copied(model, hollow)
    for module in shell.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            module.forward = partial(keep_shape, module)  # torch's own takes a millisecond on shapes
    names = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
    run = ChannelPropagation(shell, RULES, muted=True, copy_of=names)
    try:
        run.run(inputs)
    except SlimError as error:
        if error.__cause__ is None:
            raise
        return f"{run.failed_in()}: {str(error.__cause__).strip().splitlines()[0]}"
    rearranging = {*WITHOUT_ARITHMETIC, "copy", "as_strided"}
    calls = [call for call in run.called if KINDS.get(call[0]) != "move" and call[0] not in rearranging]
    return [(name, where, numbers) for called, where, numbers in calls for name in SAME_WORK.get(called, (called,))]
