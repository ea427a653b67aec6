"""What operators do to channels, one function per kind of operator, and the way to add one's own.

A rule gets the running propagation and the call. It reads labels with ``run.get`` (one per element, 0: no channel; axes
along which they are constant have size 1), gives the outputs theirs with ``run.put``, and unites, freezes or records what
must go together. Layers with weights are in ``slim.layers``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from slim.channels import ChannelPropagation, RuleTable
from slim.errors import SlimError
from slim.layers import along, batch_norm, convolution, deformable, group_norm, layer_norm, matmul, product, weight_norm
from slim.ops import KINDS, VIEW, operator_name
from slim.propagate import Call, collapse, split_axes, spread, varying_axes

Rule = Callable[[ChannelPropagation, Call], None]


def attention(run: ChannelPropagation, call: Call) -> None:
    """Activations multiplied with each other: every output element depends on many channels."""
    run.give_up(call, f"{call.name} in {run.here()} multiplies activations with each other (attention)")


def elementwise(run: ChannelPropagation, call: Call) -> None:
    """Labels that meet are united; a channel that meets a constant of fixed size is frozen."""
    out = call.outputs[0]
    aligned = same_axes(run, operands(run, call.inputs, out))
    if aligned is None:
        return run.give_up(call, f"{call.name} in {run.here()} crosses channels of different axes")
    result: Tensor | None = None
    for own in aligned:
        if own is not None and result is not None:
            run.unite(result, own)
            result = torch.where(result != 0, result, own)
        elif own is not None:
            result = own
    if result is not None:
        for labels, tensor in zip(aligned, call.inputs, strict=True):
            freeze_at_constant(run, call.name, result, labels, tensor)
    linear = call.name in ("clone", "detach", "alias", "_to_copy") and id(call.inputs[0]) in run.layer_outputs
    run.put_outputs(call, result)
    (run.layer_outputs.add if linear else run.layer_outputs.discard)(id(out))


def operands(run: ChannelPropagation, tensors: list[Tensor], out: Tensor) -> list[Tensor | None]:
    """The labels of each operand, with as many axes as the output."""
    found: list[Tensor | None] = []
    for tensor in tensors:
        labels = None if run.is_map(tensor) else run.get(tensor)
        if labels is not None and labels.ndim <= out.ndim:
            labels = labels.reshape((1,) * (out.ndim - labels.ndim) + tuple(labels.shape))
            labels = without_lone_channel(run, labels, tensor, out)
        found.append(labels)
    axes = {axis for labels in found if labels is not None for axis in varying_axes(labels)}
    return [run.map_labels(t, axes, out) if run.is_map(t) else own for t, own in zip(tensors, found, strict=True)]


def without_lone_channel(run: ChannelPropagation, labels: Tensor, tensor: Tensor, out: Tensor) -> Tensor | None:
    """A lone channel that is stretched over many (a spatial map of weights) does not tie those; it stays alone."""
    shape = (1,) * (out.ndim - tensor.ndim) + tuple(tensor.shape)
    if labels.numel() > 1 or all(own == wide for own, wide in zip(shape[1:], out.shape[1:], strict=True)):
        return labels
    run.freeze(labels, f"it is the only channel of a map that {run.here()} applies to many")
    return None


def same_axes(run: ChannelPropagation, found: list[Tensor | None]) -> list[Tensor | None] | None:
    """Drop the labels of parameters that lie along other axes than the activations' channels (they keep their size);
    None when activations themselves disagree."""
    axes = [set(varying_axes(x)) for x in found if x is not None]
    if all(a <= b or b <= a for a in axes for b in axes):
        return found
    made = [x for x in found if x is not None and run.made_by_layer(x)]
    kept: list[Tensor | None] = []
    for labels in found:
        if labels is None or any(labels is x for x in made):
            kept.append(labels)
            continue
        own = set(varying_axes(labels))
        fits = all(own <= set(varying_axes(x)) or set(varying_axes(x)) <= own for x in made)
        if not fits or not made:
            run.freeze(labels, f"{run.here()} applies it along another axis than the channels'")
        kept.append(labels if fits and made else None)
    axes = [set(varying_axes(x)) for x in kept if x is not None]
    return kept if all(a <= b or b <= a for a in axes for b in axes) else None


def freeze_at_constant(
    run: ChannelPropagation, name: str, result: Tensor, labels: Tensor | None, tensor: Tensor
) -> None:
    """Freeze the channels of ``result`` where this operand is unlabelled and yet as long as the channel axis."""
    reason = f"{name} in {run.here()} meets a tensor of fixed size"
    for axis in varying_axes(result):
        own = axis - (result.ndim - tensor.ndim)
        if own < 0 or tensor.shape[own] == 1:
            continue
        if labels is None:
            run.freeze(result, reason)
            continue
        missing = spread(labels.reshape(labels.shape[result.ndim - tensor.ndim :]), tensor) == 0
        if bool(missing.any()):
            shape = torch.broadcast_shapes(result.shape, tensor.shape)
            run.freeze(result.expand(shape)[missing.expand(shape)], reason)


def copy(run: ChannelPropagation, call: Call) -> None:
    """``target.copy_(source)``: the target takes the source's channels, and its own, if any, go together with them."""
    target, source = call.inputs[0], call.inputs[1]
    if run.get(target) is not None:
        return elementwise(run, call)
    labels = run.get(source)
    if labels is None:
        return run.put(target, None)
    run.put(target, labels.reshape((1,) * (target.ndim - labels.ndim) + tuple(labels.shape)))


def fresh(run: ChannelPropagation, call: Call) -> None:
    """A tensor of a given shape, of which the first input lends the type alone; of the same shape it has the same channels."""
    same = call.outputs[0].shape == call.inputs[0].shape
    run.put_outputs(call, run.get(call.inputs[0]) if same else None)


def spatial(run: ChannelPropagation, call: Call) -> None:
    """Windows over trailing axes: labels stay when they are constant over those axes."""
    width = next(d for d in (1, 2, 3) if f"{d}d" in call.name)
    labels, vary = settled_along(run, call.inputs[0], range(-width, 0))
    return run.unknown(call) if vary else keep_first(run, call, labels)


def settled_along(run: ChannelPropagation, tensor: Tensor, axes: Iterable[int]) -> tuple[Tensor | None, bool]:
    """The labels of a tensor, and whether channels that are not united vary along some of these axes."""
    labels = run.get(tensor)
    if labels is not None and any(labels.shape[axis] > 1 for axis in axes):
        labels = run.settle(tensor)
    return labels, labels is not None and any(labels.shape[axis] > 1 for axis in axes)


def windows(run: ChannelPropagation, call: Call) -> None:
    """Regions cut from maps [N, C, H, W] and pooled to [regions, C, h, w]."""
    labels = run.get(call.inputs[0])
    if labels is not None and varying_axes(labels) not in ([], [1]):
        return run.unknown(call)
    keep_first(run, call, labels)


def keep_first(run: ChannelPropagation, call: Call, labels: Tensor | None) -> None:
    """The outputs have the first input's channels; other inputs steer and may not change."""
    for tensor in call.inputs[1:]:
        run.freeze(run.get(tensor), f"{call.name} in {run.here()} is steered by it")
    run.put_outputs(call, labels)


def reduce(run: ChannelPropagation, call: Call) -> None:
    """A summary over other axes than the channels' keeps them; over the channels it mixes them."""
    if run.get(call.inputs[0]) is None or len(call.inputs) > 1:
        return run.unknown(call)
    axes = call.axes(call.inputs[0])
    labels, vary = settled_along(run, call.inputs[0], axes)
    if labels is not None and vary:
        if all(axis in axes for axis in varying_axes(labels)):
            run.mix(call, labels)
            labels = None
        else:
            # Maps that are laid beside each other along a summed axis (as by stack) are summed element by element.
            beside = [axis for axis in axes if labels.shape[axis] > 1]
            run.tie(labels.movedim(beside, list(range(len(beside)))).flatten(0, len(beside) - 1).flatten(1))
            labels = labels.amax(beside, keepdim=True)
    if labels is not None:
        keep = bool(call.argument("keepdim", False))
        labels = labels.reshape([size for axis, size in enumerate(labels.shape) if keep or axis not in axes])
    run.put_outputs(call, labels)


def along_axis(run: ChannelPropagation, call: Call) -> None:
    """Softmax, running sums and the like along one axis."""
    labels, vary = settled_along(run, call.inputs[0], call.axes(call.inputs[0])[:1])
    if labels is not None and vary:
        if "softmax" not in call.name:
            return run.unknown(call)
        run.mix(call, labels)
    run.put_outputs(call, labels)


def move(run: ChannelPropagation, call: Call) -> None:
    """Elements are rearranged, and so are labels; code that splits the channel axis into parts (chunk, view) computes the
    parts' size from its length, so the same position of every part is one channel."""
    if call.name.startswith("index") and any(id(t) in run.data_dependent for t in call.inputs[1:]):
        return run.give_up(call, f"{call.name} in {run.here()} picks elements by indices that depend on the image")
    run.move(call)
    if call.name in VIEW:
        labels, before = run.get(call.outputs[0]), run.get(call.inputs[0])
        split = split_axes(tuple(call.inputs[0].shape), tuple(call.outputs[0].shape))
        parts = next((parts for axis, parts in split if before is not None and before.shape[axis] > 1), [])
        # Where the labels lie along one of the parts alone, blocks of one channel became an axis (flattened maps again).
        if labels is not None and len([part for part in parts if labels.shape[part] > 1]) > 1:
            shape = [call.outputs[0].shape[a] if a in parts else s for a, s in enumerate(labels.shape)]
            run.tie(labels.expand(shape).movedim(parts[0], 0).flatten(1))
    elif call.name in ("split", "unsafe_split") and len(call.outputs) > 1:
        found = [x for t in call.outputs if (x := run.get(t)) is not None]
        axis = call.argument("dim", 0) % call.inputs[0].ndim
        alike = len(found) == len(call.outputs) and len({x.shape for x in found}) == 1
        if labelled_along(run, call.inputs[0], axis) and alike:
            run.tie(torch.stack([x.flatten() for x in found]))
    elif call.name == "slice":
        tensor, start = call.inputs[0], call.argument("start") or 0
        axis = call.argument("dim", 0) % tensor.ndim
        whole = tensor.shape[axis]
        if (call.argument("step") or 1) == 1:
            start = min(start % whole if start < 0 else start, whole)
            tie_parts(run, tensor, axis, start, call.outputs[0].shape[axis])
    elif call.name.endswith("split_with_sizes"):
        axis, sizes = call.argument("dim", 0) % call.inputs[0].ndim, call.argument("split_sizes")
        for start, size in zip(accumulate(sizes, initial=0), sizes, strict=False):
            tie_parts(run, call.inputs[0], axis, start, size)
    elif call.name.endswith("channel_shuffle"):
        channels = run.channel_labels(call.inputs[0], 1)
        if channels is not None:
            run.tie(channels.reshape(call.argument("groups"), -1))


def labelled_along(run: ChannelPropagation, tensor: Tensor, axis: int) -> bool:
    labels = run.get(tensor)
    return labels is not None and labels.shape[axis] > 1


def tie_parts(run: ChannelPropagation, tensor: Tensor, axis: int, start: int, part: int) -> None:
    """A part that is an equal one of the channels (half, a quarter) is taken for computed from their number, as chunk's are."""
    labels, whole = run.get(tensor), tensor.shape[axis]
    size = min(part, whole - part)
    if labels is None or labels.shape[axis] == 1:
        return
    if run.are_parts(size > 1 and whole % size == 0 and start % size == 0):
        run.tie(labels.movedim(axis, 0).reshape(whole // size, -1))


def as_strided(run: ChannelPropagation, call: Call) -> None:
    """Followed where it is but a view of the whole tensor, row by row (as pooling to one position in channels-last is)."""
    tensor, out, labels = call.inputs[0], call.outputs[0], run.get(call.inputs[0])
    if labels is None or not (call.contiguous and out.is_contiguous() and out.untyped_storage().nbytes() == out.nbytes):
        return run.unknown(call)
    shape = out.shape if call.in_place else tensor.shape
    if labels.ndim != len(shape) or any(own not in (1, size) for own, size in zip(labels.shape, shape, strict=True)):
        return run.unknown(call)
    run.put(out, collapse(labels.expand(shape).reshape(out.shape)))


def gated_halves(run: ChannelPropagation, call: Call) -> None:
    """glu: the first half of an axis times the sigmoid of the second."""
    tensor = call.inputs[0]
    labels, axis = run.get(tensor), call.argument("dim", -1) % tensor.ndim
    if labels is not None and labels.shape[axis] > 1:
        first, second = labels.chunk(2, axis)
        run.tie(torch.stack([first.flatten(), second.flatten()]))
        labels = first
    run.put(call.outputs[0], labels)


def pixel_shuffle(run: ChannelPropagation, call: Call) -> None:
    """r * r neighbouring channels become one: they go together."""
    tensor, r = call.inputs[0], call.argument("upscale_factor")
    channels = run.channel_labels(tensor, tensor.ndim - 3)
    if channels is None:
        return run.unknown(call)
    blocks = channels.reshape(-1, r * r)
    run.tie(blocks.t())
    run.put(call.outputs[0], blocks.amax(1).reshape((1,) * (tensor.ndim - 3) + (-1, 1, 1)))


def im2col(run: ChannelPropagation, call: Call) -> None:
    """Windows of maps [N, C, H, W] as columns [N, C * elements of a window, windows]."""
    channels = run.channel_labels(call.inputs[0], call.inputs[0].ndim - 3)
    if channels is None:
        return run.unknown(call)
    out = call.outputs[0]
    run.put(out, along(out, out.ndim - 2, channels.repeat_interleave(out.shape[-2] // len(channels))))


def col2im(run: ChannelPropagation, call: Call) -> None:
    """The inverse: the elements of a channel's windows go together."""
    out, tensor = call.outputs[0], call.inputs[0]
    columns = run.channel_labels(tensor, tensor.ndim - 2)
    if columns is None:
        return run.unknown(call)
    windows = columns.reshape(out.shape[-3], -1)
    run.tie(windows.t())
    run.put(out, along(out, out.ndim - 3, windows.amax(1)))


def unpool(run: ChannelPropagation, call: Call) -> None:
    """Maxima go back to where the indices say, each channel by its own."""
    labels = [run.get(tensor) for tensor in call.inputs]
    known = [x for x in labels if x is not None]
    if len(known) < 2 or any(varying_axes(x) not in ([], [1]) for x in known):
        return run.unknown(call)
    run.unite(*known)
    run.put_outputs(call, known[0])


_RULES = (
    along_axis, as_strided, attention, batch_norm, col2im, convolution, copy, deformable, elementwise, fresh, gated_halves,
    group_norm, im2col, layer_norm, matmul, move, pixel_shuffle, product, reduce, spatial, unpool, weight_norm, windows,
)  # fmt: skip
CHANNEL_RULES: dict[str, Rule] = {"unknown": ChannelPropagation.unknown, **{rule.__name__: rule for rule in _RULES}}
"""The rule of each kind of operator in ``slim.ops.KINDS``."""

REGISTERED: dict[str, Rule] = {}
"""Rules of users by operator name."""


def register_rule(op: Any, rule: str | Rule) -> None:
    """Say what an operator does to channels; replaces the rule that it had.

    Args:
        op: an operator (``torch.ops.mylib.scale``), one of its overloads, or its name (``"mylib::scale"``, ATen's without
            ``aten::``)
        rule: the kind of a known rule ("elementwise", "spatial", "move", ...), or a function of the running
            ``slim.ChannelPropagation`` and the ``slim.Call``. It must give every output its labels with ``run.put``,
            unite labels that must go together (``run.unite``), and freeze what it cannot follow (``run.give_up``).

    Raises:
        SlimError: for a kind that does not exist.

    Examples:
        >>> import slim
        >>> slim.register_rule("mylib::scaled_tanh", "elementwise")  # each element alone: channels keep their place
    """
    name = op.removeprefix("aten::") if isinstance(op, str) else operator_name(op)[0]
    REGISTERED.pop(name, None)
    if callable(rule):
        REGISTERED[name] = rule
    elif rule in CHANNEL_RULES:
        KINDS[name] = rule
    else:
        raise SlimError(f"no kind of rule is named {rule!r}; expected one of {', '.join(CHANNEL_RULES)}, or a function")


def rule_for(name: str) -> Rule:
    """The rule of an operator; ``unknown`` when it has none."""
    return REGISTERED.get(name) or CHANNEL_RULES[KINDS.get(name, "unknown")]


TREATS_ALL_ALIKE = (
    "elementwise", "spatial", "reduce", "along_axis", "batch_norm", "convolution", "matmul", "windows", "attention", "product",
    "deformable", "fresh", "im2col", "unpool", "weight_norm",
)  # fmt: skip
"""Kinds that treat all channels alike, by whatever axis they lie on."""
KEEPS_ORDER = ("cat", "permute", "transpose", "t", "unsqueeze", "stack")
"""Operators that keep the order of channels and take no number of them."""


def is_position_sensitive(run: ChannelPropagation, call: Call) -> bool:
    """Whether an operator takes channels by position or by number, so that a constant in the code could decide which.

    What only sets the whole sequence of channels on another axis, as flattening a pooled map does, has done the same at
    another width if its result is then as wide as that sequence.
    """
    kind = KINDS.get(call.name)
    # A roll all round changes nothing at this width, and does at others.
    if call.name in REGISTERED or call.name == "roll":
        return True
    if kind == "group_norm":
        return not isinstance(run.module(), nn.GroupNorm)
    if kind in TREATS_ALL_ALIKE or call.name in KEEPS_ORDER:
        return False
    before, after = (run.get(tensors[0]) if len(tensors) == 1 else None for tensors in (call.inputs, call.outputs))
    if before is None or after is None or max(len(varying_axes(labels)) for labels in (before, after)) > 1:
        return True
    return not torch.equal(before.flatten(), after.flatten())


RULES = RuleTable(rule_for, is_position_sensitive)
"""What ``slim.trace`` hands to the propagation."""
