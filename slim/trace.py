"""Finds a model's channel groups by propagating channel labels through one forward pass.

Method: every convolution or linear layer reads the labels of its input channels, gives its output fresh ones, and records
which axis of its weight belongs to which label; element-wise operators unite the labels that meet (union-find over single
channels); operators that move elements move the labels alike. A class of united labels is exactly what must be removed
together. The dependency-graph idea is that of Fang et al., "DepGraph: Towards Any Structural Pruning" (CVPR 2023), here on
single channels and on operators instead of on layer types.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slim.gate import Gate
from slim.graph import ChannelGraph, Role
from slim.groups import build_graph
from slim.labels import UnionFind, spread, varying_axes
from slim.propagate import Propagation, transparent_gates

ACTIVATIONS = (
    nn.SiLU,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Mish,
    nn.GELU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.Softplus,
)
"""Activations that a gate may follow. Bounded ones (sigmoid, ...) make factors of other channels, not maps."""


@dataclass(frozen=True)
class Record:
    """The positions of one parameter axis, in order, each under a label."""

    param: str
    axis: int
    role: Role
    labels: Tensor


class ChannelPropagation(Propagation):
    """Labels are channels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.classes = UnionFind()
        self.records: list[Record] = []
        self.claims: dict[tuple[str, int], Tensor] = {}
        self.frozen: list[tuple[Tensor, str]] = []
        self.unreadable: dict[str, str] = {}
        self.unknown_ops: list[tuple[str, str, Tensor]] = []
        self.activations: dict[str, list[Tensor]] = {}
        self.affine: set[int] = set()

    # -- bookkeeping --------------------------------------------------------------------------------------------

    def get(self, tensor: Tensor) -> Tensor | None:
        """Labels of a tensor; a parameter along a single axis gets labels of its own on its first use."""
        if id(tensor) not in self.labels and id(tensor) in self.tensors:
            wide = varying_axes(tensor)
            if len(wide) == 1 and tensor.is_floating_point():
                labels = self.classes.fresh(tensor.numel())
                self.record(self.tensors[id(tensor)], wide[0], "scale", labels)
                self.put(tensor, labels.reshape(tensor.shape))
            elif len(wide) > 1:
                self.untouchable(tensor, "is read element by element")
        return self.labels.get(id(tensor))

    def record(self, param: str, axis: int, role: Role, labels: Tensor) -> None:
        """Note that the positions of a parameter's axis, in order, belong to labels (0: to none)."""
        before = self.claims.setdefault((param, axis), labels)
        if before is not labels:
            # A layer that runs twice has one weight: what meets the same position goes together.
            self.classes.unite(before, labels)
            mixed = (before == 0) != (labels == 0)
            self.freeze(
                torch.where(mixed, before + labels, 0), f"{param} is also used on channels that are not ours to cut"
            )
        self.records.append(Record(param, axis, role, labels))

    def freeze(self, labels: Tensor | None, reason: str) -> None:
        if labels is not None and bool(labels.any()):
            self.frozen.append((torch.unique(labels), reason))

    def untouchable(self, tensor: Tensor, reason: str) -> None:
        """A parameter that is read in a way that we do not follow keeps its shape."""
        weight = self.weight_of(tensor)
        if weight:
            self.unreadable.setdefault(weight[0], f"{weight[0]} {reason} in {self.where() or 'the model'}")

    # -- rules --------------------------------------------------------------------------------------------------

    def unknown(
        self, name: str, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        labels = [self.get(t) for t in inputs]
        met = [torch.unique(x) for x in labels if x is not None]
        reason = f"{name} in {self.where() or 'the model'} has no channel rule"
        for tensor, found in zip(inputs, labels, strict=True):
            self.freeze(found, reason)
            self.untouchable(tensor, f"is read by {name}")
        if met:
            self.unknown_ops.append((name, self.where(), torch.cat(met)))
        for tensor in outputs:
            self.put(tensor, None)

    def elementwise(
        self, name: str, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        """Labels that meet are united; a channel that meets a constant of fixed size is frozen."""
        ndim = outputs[0].ndim
        met = [(self.stretched(self.get(t), t, outputs[0]), t) for t in inputs]
        aligned = [
            (x.reshape((1,) * (ndim - x.ndim) + tuple(x.shape)), t) for x, t in met if x is not None and x.ndim <= ndim
        ]
        result: Tensor | None = None
        for own, _ in aligned:
            if result is None:
                result = own
            else:
                self.classes.unite(result, own)
                result = torch.where(result != 0, result, own)
        if result is not None:
            for labels, tensor in met:
                self.freeze_at_constant(name, result, labels, tensor)
        for tensor in outputs:
            self.put(tensor, result if tensor.shape == outputs[0].shape else None)
        self.affine.discard(id(outputs[0]))
        if len(aligned) == 1 and id(aligned[0][1]) in self.affine and name in ("clone", "detach", "alias", "_to_copy"):
            self.affine.add(id(outputs[0]))

    def stretched(self, labels: Tensor | None, tensor: Tensor, out: Tensor) -> Tensor | None:
        """The labels of an operand; a lone channel that is stretched over many (a spatial map of weights) stays alone."""
        if labels is None or labels.numel() != 1 or out.ndim < 2:
            return labels
        axis = 1 - (out.ndim - tensor.ndim)
        if axis >= 0 and tensor.shape[axis] == 1 and out.shape[1] > 1:
            self.freeze(labels, f"it is the only channel of a map that {self.where() or 'the model'} applies to many")
            return None
        return labels

    def freeze_at_constant(self, name: str, result: Tensor, labels: Tensor | None, tensor: Tensor) -> None:
        """Freeze the channels of ``result`` where this operand is unlabelled and yet as long as the channel axis."""
        for axis in varying_axes(result):
            own = axis - (result.ndim - tensor.ndim)
            if own < 0 or tensor.shape[own] == 1:
                continue
            present = spread(labels, tensor)
            missing = present == 0 if labels is not None else None
            shape = torch.broadcast_shapes(result.shape, tensor.shape)
            if missing is None:
                self.freeze(result, f"{name} in {self.where() or 'the model'} meets a tensor of fixed size")
            elif bool(missing.any()):
                self.freeze(
                    result.expand(shape)[missing.expand(shape)],
                    f"{name} in {self.where() or 'the model'} meets a tensor of fixed size",
                )

    def spatial(
        self, name: str, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        """Windows over trailing axes: labels stay when they are constant over those axes."""
        labels = self.get(inputs[0])
        width = spatial_axes(name)
        if labels is not None and any(axis >= labels.ndim - width for axis in varying_axes(labels)):
            return self.unknown(name, func, args, kwargs, inputs, outputs)
        for tensor in outputs:
            self.put(tensor, labels)

    def reduce(self, name: str, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Means over other axes than the channels'."""
        labels = self.get(inputs[0])
        if labels is None:
            return self.unknown(name, func, args, kwargs, inputs, outputs)
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        keep = bool(args[2]) if len(args) > 2 else bool(kwargs.get("keepdim", False))
        ndim = inputs[0].ndim
        axes = sorted({d % ndim for d in ([dims] if isinstance(dims, int) else dims or range(ndim))})
        if any(labels.shape[axis] > 1 for axis in axes):
            return self.unknown(name, func, args, kwargs, inputs, outputs)
        shape = [size for axis, size in enumerate(labels.shape) if keep or axis not in axes]
        self.put(outputs[0], labels.reshape(shape))

    def batch_norm(
        self, name: str, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        """Records its parameters and statistics under the channels that meet them."""
        channels = self.channel_labels(inputs[0], 1)
        if channels is None or any(self.weight_of(t) is None for t in inputs[1:] if t.ndim == 1):
            return self.unknown(name, func, args, kwargs, inputs, outputs)
        for tensor in inputs[1:]:
            param, _ = self.weight_of(tensor) or ("", ())
            if param:
                self.record(param, 0, "scale", channels)
        self.put(outputs[0], self.get(inputs[0]))
        self.affine.add(id(outputs[0]))
        for tensor in outputs[1:]:
            self.put(tensor, None)

    def convolution(
        self, name: str, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        """Reads labels along the weight's input axis, gives fresh ones along its output axis.

        Groups are cut alike: the same position of every group is one channel, so that groups stay equally wide.
        """
        x, weight, bias = args[0], args[1], args[2]
        transposed, groups = bool(args[6]), int(args[8])
        known = self.weight_of(weight)
        channels = self.channel_labels(x, x.ndim - weight.ndim + 1)
        if known is None or channels is None or (bias is not None and self.weight_of(bias) is None):
            return self.unknown(name, func, args, kwargs, inputs, outputs)
        param = known[0]
        out_axis, in_axis = (1, 0) if transposed else (0, 1)
        in_channels, out_channels = len(channels), weight.shape[out_axis] * (groups if transposed else 1)
        if groups > 1 and groups == in_channels:
            out = self.depthwise(param, channels, out_channels // groups)
        else:
            per_group = in_channels // groups
            parts = channels.reshape(groups, per_group)
            if groups > 1:
                self.tie(parts)
            in_labels = channels if transposed else parts[0]
            self.record(param, in_axis, "in", in_labels)
            fresh = self.classes.fresh(out_channels // groups)
            out = fresh.repeat(groups)
            self.record(param, out_axis, "out", fresh if transposed else out)
        if bias is not None:
            self.record(self.weight_of(bias)[0], 0, "scale", out)  # type: ignore[index]
        shape = [1] * outputs[0].ndim
        shape[outputs[0].ndim - weight.ndim + 1] = -1
        self.put(outputs[0], out.reshape(shape) if bool(out.any()) else None)
        self.affine.add(id(outputs[0]))

    def depthwise(self, param: str, channels: Tensor, multiplier: int) -> Tensor:
        """Output channel o comes from input channel o // multiplier alone, so it goes with it."""
        if bool((channels == 0).any()):
            fresh = self.classes.fresh(len(channels))
            self.freeze(fresh, f"{param} is depthwise over channels that are not ours to cut")
            channels = torch.where(channels != 0, channels, fresh)
            self.freeze(channels, f"{param} is depthwise over channels that are not ours to cut")
        out = channels.repeat_interleave(multiplier)
        # A transposed weight [in, out / groups, ...] has its channels on axis 0 too.
        rows = self.tensor_shape(param)[0]
        self.record(param, 0, "depthwise", out if rows == len(out) else channels)
        return out

    def tensor_shape(self, param: str) -> tuple[int, ...]:
        return tuple(self.model.get_parameter(param).shape)

    def tie(self, parts: Tensor) -> None:
        """[parts, size]: the same position of every part is one channel."""
        for part in parts[1:]:
            self.classes.unite(parts[0], part)
        absent = (parts == 0).any(0)
        if bool(absent.any()):
            self.freeze(parts[:, absent], f"{self.where()} ties them to channels that are not ours to cut")

    def matmul(self, name: str, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """``x @ W.t() (+ bias)`` with a parameter W [out, in]."""
        bias, x, weight = (args[0], args[1], args[2]) if name == "addmm" else (None, args[0], args[1])
        if name == "linear":
            bias = args[2] if len(args) > 2 else None
        known = self.weight_of(weight)
        channels = self.channel_labels(x, x.ndim - 1)
        if known is None or channels is None or (bias is not None and self.weight_of(bias) is None):
            return self.unknown(name, func, args, kwargs, inputs, outputs)
        param, axes = known
        in_axis, out_axis = (axes[1], axes[0]) if name == "linear" else (axes[0], axes[1])
        shape = self.tensor_shape(param)
        out = self.classes.fresh(shape[out_axis])
        self.record(param, in_axis, "in", channels)
        self.record(param, out_axis, "out", out)
        if bias is not None:
            self.record(self.weight_of(bias)[0], 0, "scale", out)  # type: ignore[index]
        self.put(outputs[0], out.reshape((1,) * (outputs[0].ndim - 1) + (-1,)))
        self.affine.add(id(outputs[0]))

    def tie_parts(self, name: str, args: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Code that splits the channel axis into parts (chunk, view) computes the parts' size from its length."""
        if name in ("view", "_unsafe_view", "reshape", "_reshape_alias"):
            parts = self.split_of_labelled_axis(inputs[0], outputs[0])
            labels = self.get(outputs[0])
            if parts and labels is not None:
                first = parts[0]
                full = labels.expand([outputs[0].shape[a] if a in parts else s for a, s in enumerate(labels.shape)])
                self.tie(full.movedim(first, 0).flatten(1))
        elif name == "split":
            found = [self.get(t) for t in outputs]
            if all(x is not None and x.shape == found[0].shape for x in found) and len(found) > 1:  # type: ignore[union-attr]
                axis = (args[2] if len(args) > 2 else 0) % inputs[0].ndim
                if self.get(inputs[0]).shape[axis] > 1:  # type: ignore[union-attr]
                    self.tie(torch.stack([x.flatten() for x in found]))  # type: ignore[union-attr]

    # -- activations --------------------------------------------------------------------------------------------

    def after_module(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor) or isinstance(module, Gate):
            return
        # An Identity in an activation's place (straight behind a convolution or its norm) is an activation too.
        linear = isinstance(module, nn.Identity) and id(output) in self.affine
        if isinstance(module, ACTIVATIONS) or linear:
            self.activations.setdefault(path, []).append(output)


def spatial_axes(name: str) -> int:
    """How many trailing axes an operator such as ``max_pool2d_with_indices`` works over."""
    return next(d for d in (1, 2, 3) if f"{d}d" in name)


def trace(model: nn.Module, example_inputs: Any) -> ChannelGraph:
    """Find the channel groups of a model.

    ``example_inputs`` is a tensor, a tuple of positional or a dictionary of keyword arguments; a small batch of one is
    enough. The model runs once in evaluation mode without gradients and is left exactly as it was; gates that it already
    has are looked through.
    """
    run = ChannelPropagation(model)
    with transparent_gates(model):
        outputs = run.run(example_inputs)
    met, run.frozen = run.frozen, []
    for tensor in outputs:
        run.freeze(run.get(tensor), "a model output")
    run.frozen += met
    return build_graph(run, example_inputs)
