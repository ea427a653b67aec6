"""Channel rules of the layers that have weights: convolutions, linear layers and norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from slim.channels import ChannelPropagation
from slim.graph import Role
from slim.propagate import NO_AXIS, Call, varying_axes

REMOVE = "call torch.nn.utils.parametrize.remove_parametrizations first"


def attach(run: ChannelPropagation, vector: Tensor | None, channels: Tensor) -> None:
    """A vector with one entry per channel: a parameter, a buffer, or something made of one."""
    if vector is None:
        return
    weight = run.weight_of(vector)
    if weight is not None:
        return run.record(weight[0], 0, "scale", channels)
    own = run.get(vector)
    if own is None or own.numel() != channels.numel():
        run.freeze(channels, f"{run.here()} applies a tensor of fixed size to it")
    else:
        run.unite(channels, own.reshape(-1))


def convolution(run: ChannelPropagation, call: Call) -> None:
    """Reads labels along the weight's input axis, gives fresh ones along its output axis.

    Groups are cut alike: the same position of every group is one channel, so that groups stay equally wide.
    """
    convolve(run, call, call.args[0], call.args[1], call.args[2], bool(call.args[6]), int(call.args[8]))


def deformable(run: ChannelPropagation, call: Call) -> None:
    """A convolution at places that other maps say, which may not change; groups of offsets stay equally wide."""
    x, weight, offset, mask, bias = call.args[:5]
    for steering in (offset, mask):
        run.freeze(run.get(steering), f"{call.name} in {run.here()} is steered by it")
    groups, parts = int(call.argument("groups")), int(call.argument("offset_groups"))
    channels = run.channel_labels(x, 1)
    if parts > 1 and channels is not None:
        run.tie(channels.reshape(parts, -1))
    convolve(run, call, x, weight, bias, False, groups)


def convolve(
    run: ChannelPropagation, call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, groups: int
) -> None:
    axis = x.ndim - weight.ndim + 1
    found = reader(run, call, x, axis, weight, (1, 0) if transposed else (0, 1))
    if found is None:
        return
    channels, in_channels = found.channels, len(found.channels)
    out_channels = found.out_size * groups if transposed else found.out_size
    if run.is_depthwise(found.param, groups, in_channels):
        channels = all_ours(run, found.param, channels)
        # Output channel o comes from input channel o // multiplier alone, so it goes with it. A transposed weight
        # [in, out / groups, ...] has its channels on axis 0 too.
        out = channels.repeat_interleave(out_channels // groups)
        occupy(run, call, found, 0, "depthwise", channels if transposed else out)
    else:
        parts = channels.reshape(groups, in_channels // groups)
        if groups > 1:
            run.tie(parts)
        fresh = run.fresh(out_channels // groups)
        out = fresh.repeat(groups)
        occupy(run, call, found, found.in_axis, "in", channels if transposed else parts[0])
        occupy(run, call, found, found.out_axis, "out", fresh if transposed else out)
    attach(run, bias, out)
    run.put(call.outputs[0], along(call.outputs[0], axis, out) if bool(out.any()) else None)


@dataclass(frozen=True)
class Reader:
    """A weight that is a parameter's: its axes of output and of input, how many outputs, the labels of what it reads."""

    param: str
    out_axis: int
    in_axis: int
    out_size: int
    channels: Tensor
    weight: Tensor


def reader(
    run: ChannelPropagation, call: Call, x: Tensor, axis: int, weight: Tensor, places: tuple[int, int]
) -> Reader | None:
    """A weight that reads the channels of x along an axis; ``places``: the weight's axes of output and of input.

    Channels that lie on other axes, too, stay, and what the layer makes are channels of its own all the same. None where
    the weight is no parameter's, and nothing is left to do.
    """
    known = run.weight_of(weight)
    if known is None or NO_AXIS in (known[1][places[0]], known[1][places[1]]):
        if is_parametrized(run.module()):
            run.give_up(call, f"a parametrisation computes the weight of {run.here()}; {REMOVE}")
        else:
            run.give_up(call, f"the weight of {run.here()} is computed as the network runs")
        return None
    channels = run.channel_labels(x, axis)
    if channels is None:
        run.freeze_at(call, run.get(x), f"{call.name} in {run.here()} reads channels that lie along several axes")
        channels = torch.zeros(x.shape[axis], dtype=torch.int64)
    param, axes = known
    return Reader(param, axes[places[0]], axes[places[1]], weight.shape[places[0]], channels, weight)


def occupy(run: ChannelPropagation, call: Call, found: Reader, axis: int, role: Role, labels: Tensor) -> None:
    """Record the labels on an axis of a weight, and on its magnitude where that is a parameter beside it (weight norm)."""
    run.record(found.param, axis, role, labels)
    magnitude, own_axis = run.weight_norms.get(id(found.weight), ("", axis))
    if magnitude and axis == own_axis:
        run.record(magnitude, axis, "scale", labels)
    elif magnitude:
        run.freeze_at(call, labels, f"weight norm in {run.here()} mixes them; {REMOVE}")


def weight_norm(run: ChannelPropagation, call: Call) -> None:
    """A weight as direction v times magnitude g / |v|: exact for channels of the axis that g lies along."""
    direction, magnitude = (run.weight_of(tensor) for tensor in call.args[:2])
    if direction is None or magnitude is None:
        return run.unknown(call)
    run.views[id(call.outputs[0])] = direction
    run.weight_norms[id(call.outputs[0])] = (magnitude[0], int(call.argument("dim", 0)))


def all_ours(run: ChannelPropagation, param: str, channels: Tensor) -> Tensor:
    """The channels that a depthwise weight lies along, all with a label; where some have none, none goes."""
    if bool((channels == 0).any()):
        reason = f"{param} is depthwise over channels that are not ours to cut"
        fresh = run.fresh(len(channels))
        run.freeze(fresh, reason)
        channels = torch.where(channels != 0, channels, fresh)
        run.freeze(channels, reason)
    return channels


def along(tensor: Tensor, axis: int, labels: Tensor) -> Tensor:
    """Labels [size] in as many axes as the tensor has."""
    shape = [1] * tensor.ndim
    shape[axis] = -1
    return labels.reshape(shape)


def matmul(run: ChannelPropagation, call: Call) -> None:
    """``x @ W.t() (+ bias)`` with a parameter W [out, in]; without one, a product of activations."""
    addmm = call.name == "addmm"
    x, weight = (call.args[1], call.args[2]) if addmm else (call.args[0], call.args[1])
    if call.name == "mm" and run.weight_of(weight) is None:
        return product(run, call)
    found = reader(run, call, x, x.ndim - 1, weight, (0, 1) if call.name == "linear" else (1, 0))
    if found is not None:
        linear(run, call, found, call.outputs[0].ndim - 1, call.args[0] if addmm else call.argument("bias"))


def linear(run: ChannelPropagation, call: Call, found: Reader, axis: int, bias: Tensor | None = None) -> None:
    """Every output channel, along ``axis``, reads every input channel."""
    out = run.fresh(found.out_size)
    occupy(run, call, found, found.in_axis, "in", found.channels)
    occupy(run, call, found, found.out_axis, "out", out)
    attach(run, bias, out)
    run.put(call.outputs[0], along(call.outputs[0], axis, out))


def product(run: ChannelPropagation, call: Call) -> None:
    """A matrix product [..., n, k] @ [..., k, m]: of activations and a parameter a linear layer; of activations exact for
    channels along n or m, while a sum over channels (attention) mixes them."""
    a, b = call.args[:2]
    rows, columns = a.ndim - 2, a.ndim - 1
    for weight, x, axis, places, out in (
        (b, a, columns, (columns, rows), columns),
        (a, b, rows, (rows, columns), rows),
    ):
        known = run.weight_of(weight)
        if known is not None and all(own == NO_AXIS for own in known[1][:rows]):
            found = reader(run, call, x, axis, weight, places)
            return None if found is None else linear(run, call, found, out)
    left, right = run.settle(a), run.settle(b)
    wide = [set() if x is None else set(varying_axes(x)) for x in (left, right)]
    if not (wide[0] <= {rows} and wide[1] <= {columns}) or all(wide):
        return run.give_up(call, f"{call.name} in {run.here()} multiplies activations with each other (attention)")
    for labels in (left, right):
        if labels is not None and labels.numel() == 1:
            run.freeze(labels, f"it is the only channel of a map that {run.here()} applies to others")
    run.put(call.outputs[0], left if wide[0] else right if wide[1] else None)


def batch_norm(run: ChannelPropagation, call: Call) -> None:
    """Acts on each channel alone; also what an instance norm calls, on [1, batch * channels, ...]."""
    x = call.inputs[0]
    channels = run.channel_labels(x, 1)
    if channels is None:
        return run.unknown(call)
    for tensor in call.inputs[1:]:
        attach(run, tensor, channels)
    module = run.module()
    if isinstance(module, nn.modules.batchnorm._NormBase) and len(call.inputs) == 1:
        run.record(f"{run.where()}.num_features", 0, "width", channels[: module.num_features])
    run.put_outputs(call, run.get(x))


def layer_norm(run: ChannelPropagation, call: Call) -> None:
    """Normalises over the trailing axes; exact for channels that lie on another axis, else it mixes them."""
    x, shape = call.inputs[0], call.argument("normalized_shape")
    labels, first = run.get(x), x.ndim - len(shape)
    within = [] if labels is None else [axis for axis in range(first, x.ndim) if labels.shape[axis] > 1]
    vectors = [call.argument("weight"), call.argument("bias")]
    if len(within) > 1:
        return run.unknown(call)
    for axis in within:
        channels = run.channel_labels(x, axis)
        if labels is None or channels is None:
            return run.unknown(call)
        run.mix(call, labels)
        for tensor in vectors:
            weight = run.weight_of(tensor)
            if weight is not None:
                run.record(weight[0], axis - first, "scale", channels)
            elif tensor is not None:
                run.freeze(channels, f"{run.here()} applies a tensor of fixed size to it")
        if isinstance(run.module(), nn.LayerNorm):
            run.record(f"{run.where()}.normalized_shape", axis - first, "width", channels)
    run.put_outputs(call, labels)


def group_norm(run: ChannelPropagation, call: Call) -> None:
    """Its groups are normalised apart: whole groups can go exactly, single channels of one cannot."""
    x, groups = call.inputs[0], int(call.argument("group"))
    channels = run.channel_labels(x, 1)
    if channels is None:
        return run.unknown(call)
    blocks = channels.reshape(groups, -1)
    if groups == 1 and run.allow_inexact:
        run.mix(call, channels)
    else:
        run.tie(blocks.t())
    attach(run, call.argument("weight"), channels)
    attach(run, call.argument("bias"), channels)
    if isinstance(run.module(), nn.GroupNorm):
        run.record(f"{run.where()}.num_channels", 0, "width", channels)
        if groups > 1 or not run.allow_inexact:
            run.record(f"{run.where()}.num_groups", 0, "width", blocks[:, 0])
    run.put_outputs(call, run.get(x))
