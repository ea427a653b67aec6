"""Channel rules of the layers that have weights: convolutions, linear layers and norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slim.channels import ChannelPropagation
from slim.propagate import Call


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
    x, weight, bias = call.args[0], call.args[1], call.args[2]
    transposed, groups = bool(call.args[6]), int(call.args[8])
    known = run.weight_of(weight)
    channels = run.channel_labels(x, x.ndim - weight.ndim + 1)
    if known is None or channels is None:
        return run.unknown(call)
    param, axes = known
    out_axis, in_axis = (axes[1], axes[0]) if transposed else (axes[0], axes[1])
    in_channels, out_channels = len(channels), weight.shape[1] * groups if transposed else weight.shape[0]
    if run.is_depthwise(param, groups, in_channels):
        # A transposed weight [in, out / groups, ...] has its channels on axis 0 too.
        out = depthwise(run, param, channels, out_channels // groups, weight.shape[axes.index(0)])
    else:
        parts = channels.reshape(groups, in_channels // groups)
        if groups > 1:
            run.tie(parts)
        run.record(param, in_axis, "in", channels if transposed else parts[0])
        fresh = run.fresh(out_channels // groups)
        out = fresh.repeat(groups)
        run.record(param, out_axis, "out", fresh if transposed else out)
    attach(run, bias, out)
    shape = [1] * call.outputs[0].ndim
    shape[call.outputs[0].ndim - weight.ndim + 1] = -1
    run.put(call.outputs[0], out.reshape(shape) if bool(out.any()) else None)


def depthwise(run: ChannelPropagation, param: str, channels: Tensor, multiplier: int, rows: int) -> Tensor:
    """Output channel o comes from input channel o // multiplier alone, so it goes with it. ``rows``: length of the weight."""
    if bool((channels == 0).any()):
        reason = f"{param} is depthwise over channels that are not ours to cut"
        fresh = run.fresh(len(channels))
        run.freeze(fresh, reason)
        channels = torch.where(channels != 0, channels, fresh)
        run.freeze(channels, reason)
    out = channels.repeat_interleave(multiplier)
    run.record(param, 0, "depthwise", out if rows == len(out) else channels)
    return out


def matmul(run: ChannelPropagation, call: Call) -> None:
    """``x @ W.t() (+ bias)`` with a parameter W [out, in]."""
    addmm = call.name == "addmm"
    x, weight = (call.args[1], call.args[2]) if addmm else (call.args[0], call.args[1])
    bias = call.args[0] if addmm else call.argument("bias")
    known = run.weight_of(weight)
    channels = run.channel_labels(x, x.ndim - 1)
    if known is None or channels is None:
        return run.unknown(call)
    param, axes = known
    in_axis, out_axis = (axes[1], axes[0]) if call.name == "linear" else (axes[0], axes[1])
    out = run.fresh(weight.shape[axes.index(out_axis)])
    run.record(param, in_axis, "in", channels)
    run.record(param, out_axis, "out", out)
    attach(run, bias, out)
    run.put(call.outputs[0], out.reshape((1,) * (call.outputs[0].ndim - 1) + (-1,)))


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
