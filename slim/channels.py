"""The state of a channel propagation: which channel each element of each tensor belongs to, and what is known of channels.

Method: every convolution or linear layer reads the labels of its input channels, gives its output fresh ones, and records
which axis of its weight belongs to which label; element-wise operators unite the labels that meet (union-find over single
channels); operators that move elements move the labels alike. A class of united labels is exactly what must be removed
together. The dependency-graph idea is that of Fang et al., "DepGraph: Towards Any Structural Pruning" (CVPR 2023), here on
single channels and on operators instead of on layer types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from slim.gate import Gate
from slim.graph import Role
from slim.ops import ACTIVATIONS, KINDS, LAYERS, NONZERO_AT_ZERO, READERS, is_scalable
from slim.propagate import Call, Propagation, collapse, memory_of, varying_axes

WITHOUT_ARITHMETIC = {"alias", "clone", "contiguous", "detach", "empty_like", "lift_fresh"}
"""Operators that compute nothing with the numbers of their argument, which may not be filled yet."""
SAME_NUMBERS = ("elementwise", "spatial", "reduce", "along_axis", "convolution", "batch_norm", "im2col", "windows")
"""Kinds whose numbers (factors, kernel sizes, strides, axes), but for a convolution's groups, are none of channels."""
MOST_NUMBERS = 64
"""Of a tensor that is a constant of the code: so many are compared between a whole network and a cut one."""


class UnionFind:
    """Disjoint sets of labels; label 0 is reserved."""

    def __init__(self) -> None:
        self.parent = [0]

    def fresh(self, count: int) -> Tensor:
        """``count`` new labels, [count]."""
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return torch.arange(start, start + count, dtype=torch.int64)

    def find(self, label: int) -> int:
        """The representative of a label's set: its smallest member."""
        parent = self.parent
        root = label
        while parent[root] != root:
            root = parent[root]
        while parent[label] != root:
            parent[label], label = root, parent[label]
        return root

    def roots(self) -> Tensor:
        """The representative of every label, [labels]."""
        roots = torch.tensor(self.parent)
        while True:
            further = roots[roots]
            if torch.equal(further, roots):
                return roots
            roots = further

    def distinct(self, labels: Tensor) -> Tensor:
        """Each of these labels once, ascending, [n]."""
        occurring = torch.zeros(len(self.parent), dtype=torch.bool)
        occurring[labels.flatten()] = True  # maps of an image's size have millions: sorting them would take seconds
        return occurring.nonzero().flatten()

    def unite(self, first: Tensor, second: Tensor) -> None:
        """Unite element by element where both labels are not 0; the shapes broadcast."""
        first, second = torch.broadcast_tensors(first, second)
        pairs = torch.stack([first.reshape(-1), second.reshape(-1)])
        pairs = pairs[:, (pairs[0] != pairs[1]) & (pairs != 0).all(0)]
        if pairs.numel() == 0:
            return
        for a, b in torch.unique(pairs, dim=1).t().tolist():
            root_a, root_b = self.find(a), self.find(b)
            if root_a != root_b:
                self.parent[max(root_a, root_b)] = min(root_a, root_b)


@dataclass(frozen=True)
class Record:
    """The positions of one parameter axis (or of an attribute that counts channels), in order, each under a label."""

    param: str
    axis: int
    role: Role
    labels: Tensor


@dataclass(frozen=True)
class Step:
    """What one operator did to labels: those of its outputs and inputs, and the numbers that element-wise arithmetic used.

    ``path`` is that of the module whose code called it, ``where`` the same in words; ``number`` counts all operators.
    """

    op: str
    where: str
    numbers: tuple[float, ...]
    labels: tuple[Tensor | None, ...]
    inputs: tuple[Tensor | None, ...]
    path: str
    number: int


@dataclass(frozen=True)
class RuleTable:
    """What operators do to channels: the rule of each name, and whether a call takes channels by position or number."""

    rule_for: Callable[[str], Callable[[ChannelPropagation, Call], None]]
    is_position_sensitive: Callable[[ChannelPropagation, Call], bool]


class ChannelPropagation(Propagation):
    """Labels are channels. What rules may use: get, put, fresh, unite, tie, record, freeze, mix, give_up, here."""

    def __init__(
        self,
        model: nn.Module,
        rules: RuleTable,
        *,
        allow_inexact: bool = False,
        original: ChannelPropagation | None = None,
        muted: bool = False,
        copy_of: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__(model, muted=muted, copy_of=copy_of)
        self.rules = rules
        self.allow_inexact = allow_inexact
        # A cut can leave a grouped convolution one channel a group, or unequal parts equally wide: to the dry run they are what
        # they were in the run through the whole model.
        self.original = original
        self.depthwise: set[str] = set()
        self.equal_parts: list[bool] = []
        self.classes = UnionFind()
        self.fresh, self.unite = self.classes.fresh, self.classes.unite
        self.records: list[Record] = []
        # Attributes of modules that count channels, see slim.counts.
        self.counts: list[Record] = []
        self.claims: dict[tuple[str, int], Tensor] = {}
        self.frozen: list[tuple[Tensor, str]] = []
        self.inexact: list[tuple[Tensor, str]] = []
        self.unreadable: dict[str, str] = {}
        self.freezing_ops: list[tuple[str, str, str, Tensor]] = []
        # What happened to which tensor, in order: (kind, operator's name or module's path, ids of inputs, ids of outputs).
        self.flow: list[tuple[str, str, tuple[int, ...], tuple[int, ...]]] = []
        self.module_outputs: dict[str, list[Tensor]] = {}
        self.steps: list[Step] = []
        self.called: list[tuple[str, str, tuple[float, ...]]] = []
        # The memory of what is computed from inputs, parameters and buffers; other tensors are constants of the code.
        self.computed: set[int] = set()
        self.shapes: list[torch.Size] = []
        # Channels that an operator took by position or counted: where code could hold a number of channels.
        self.position_sensitive: list[Tensor] = []
        # Weights that are made of a direction and a magnitude: by identity the magnitude's name, and the axis that it lies along.
        self.weight_norms: dict[int, tuple[str, int]] = {}
        self.follows_layer: list[bool] = []
        self.layer_outputs: set[int] = set()
        self.parameter_labels: set[int] = set()

    def again(self, model: nn.Module, *, muted: bool) -> ChannelPropagation:
        """A new propagation over a copy of the model that has fewer channels."""
        return ChannelPropagation(
            model, self.rules, allow_inexact=self.allow_inexact, original=self, muted=muted, copy_of=self.tensors
        )

    # -- labels of tensors --------------------------------------------------------------------------------------

    def get(self, tensor: Tensor) -> Tensor | None:
        """Labels of a tensor; a parameter along a single axis gets labels of its own on its first use."""
        if id(tensor) not in self.labels and id(tensor) in self.tensors:
            wide = varying_axes(tensor)
            if len(wide) == 1 and tensor.is_floating_point():
                self.own_labels(tensor, wide[0])
            elif len(wide) > 1:
                self.untouchable(tensor, "is read element by element")
        return super().get(tensor)

    def channel_labels(self, tensor: Tensor, axis: int) -> Tensor | None:
        found = super().channel_labels(tensor, axis)
        if found is None and self.get(tensor) is not None:
            self.settle(tensor)
            found = super().channel_labels(tensor, axis)
        return found

    def settle(self, tensor: Tensor) -> Tensor | None:
        """Write every label as its class, so that axes along which only united labels alternate collapse."""
        labels = self.get(tensor)
        if labels is None:
            return None
        unique, inverse = torch.unique(labels, return_inverse=True)
        classes = torch.tensor([self.classes.find(label) for label in unique.tolist()])
        settled = collapse(classes[inverse])
        self.put(tensor, settled)
        return settled

    def own_labels(self, tensor: Tensor, axis: int) -> Tensor:
        """A parameter or buffer gets channels of its own along one axis."""
        labels = self.fresh(tensor.shape[axis])
        self.parameter_labels.update(labels.tolist())
        self.record(self.tensors[id(tensor)], axis, "scale", labels)
        shaped = labels.reshape([size if a == axis else 1 for a, size in enumerate(tensor.shape)])
        self.put(tensor, shaped)
        return shaped

    def is_map(self, tensor: Tensor) -> bool:
        """Whether it is a parameter that varies along several axes (a positional embedding, a map of offsets)."""
        return id(tensor) in self.tensors and id(tensor) not in self.labels and len(varying_axes(tensor)) > 1

    def map_labels(self, tensor: Tensor, axes: set[int], out: Tensor) -> Tensor | None:
        """Labels of such a parameter where it meets channels along a single axis of the output."""
        own = [axis - (out.ndim - tensor.ndim) for axis in axes]
        if len(own) != 1 or own[0] < 0 or tensor.shape[own[0]] == 1 or not tensor.is_floating_point():
            self.untouchable(tensor, "is read element by element")
            return None
        labels = self.own_labels(tensor, own[0])
        return labels.reshape((1,) * (out.ndim - tensor.ndim) + tuple(labels.shape))

    def made_by_layer(self, labels: Tensor) -> bool:
        """Whether some of these channels come from a layer and not from a bare parameter."""
        return any(label and label not in self.parameter_labels for label in labels.flatten().tolist())

    # -- what rules say -----------------------------------------------------------------------------------------

    def tie(self, parts: Tensor) -> None:
        """[parts, size]: the same position of every part is one channel."""
        self.unite(parts[:1], parts[1:])
        absent = (parts == 0).any(0)
        if bool(absent.any()):
            self.freeze(parts[:, absent], f"{self.here()} ties them to channels that are not ours to cut")

    def record(self, param: str, axis: int, role: Role, labels: Tensor) -> None:
        """Note that the positions of a parameter's axis, in order, belong to labels (0: to none)."""
        before = self.claims.setdefault((param, axis), labels)
        if before is not labels:
            # A layer that runs twice has one weight: what meets the same position goes together.
            self.unite(before, labels)
            mixed = (before == 0) != (labels == 0)
            self.freeze(
                torch.where(mixed, before + labels, 0), f"{param} is also used on channels that are not ours to cut"
            )
        self.records.append(Record(param, axis, role, labels))

    def freeze(self, labels: Tensor | None, reason: str) -> None:
        """These channels stay."""
        if labels is not None and bool(labels.any()):
            self.frozen.append((self.classes.distinct(labels), reason))

    def freeze_at(self, call: Call, labels: Tensor | None, reason: str) -> None:
        """These channels stay, and the report names the operator that is why."""
        if labels is not None and bool(labels.any()):
            stay = self.classes.distinct(labels)
            self.freeze(stay, reason)
            self.freezing_ops.append((call.name, self.where(), reason, stay))

    def mix(self, call: Call, labels: Tensor) -> None:
        """The operator mixes these channels without weights: its result changes when one goes."""
        reason = f"{call.name} in {self.here()} mixes channels"
        if self.allow_inexact:
            self.inexact.append((self.classes.distinct(labels), reason))
        else:
            self.freeze_at(call, labels, f"{reason}, so no cut is exact")

    def give_up(self, call: Call, reason: str) -> None:
        """Freeze all channels that enter; the outputs have none that could be followed."""
        entering: list[Tensor] = []
        for tensor, labels in [(t, self.get(t)) for t in call.inputs]:
            if labels is not None:
                entering.append(self.classes.distinct(labels))
                self.freeze(entering[-1], reason)
            self.untouchable(tensor, f"is read by {call.name}")
        if entering:
            self.freezing_ops.append((call.name, self.where(), reason, torch.cat(entering)))
        self.put_outputs(call, None)

    def unknown(self, call: Call) -> None:
        """No rule: freeze everything that enters; what comes out has no channels that we could follow."""
        self.give_up(call, f"{call.name} in {self.here()} has no channel rule")

    def untouchable(self, tensor: Tensor, reason: str) -> None:
        """A parameter that is read in a way that we do not follow keeps its shape."""
        weight = self.weight_of(tensor)
        if weight:
            self.unreadable.setdefault(weight[0], f"{weight[0]} {reason} in {self.here()}")

    def is_depthwise(self, param: str, groups: int, in_channels: int) -> bool:
        """Whether a convolution has one input channel for each of its groups."""
        if self.original is not None:
            return param in self.original.depthwise
        if groups > 1 and groups == in_channels:
            self.depthwise.add(param)
        return param in self.depthwise

    def are_parts(self, equal: bool) -> bool:
        """Whether the parts of this split or slice, which are equally wide or not, are parts of one number of channels."""
        before = self.original.equal_parts if self.original is not None else [equal] * (len(self.equal_parts) + 1)
        self.equal_parts.append(equal and before[len(self.equal_parts) : len(self.equal_parts) + 1] == [True])
        return self.equal_parts[-1]

    def here(self) -> str:
        """The running module, in words."""
        return self.where() or "the model"

    def module(self) -> nn.Module:
        """The running module."""
        return self.model.get_submodule(self.where())

    # -- hooks of the base --------------------------------------------------------------------------------------

    def pads_alike(self, value: float) -> bool:
        """Whatever the value: a channel takes its border along."""
        return True

    def wrapped_anew(self, tensor: Tensor, wrapper: Tensor) -> None:
        super().wrapped_anew(tensor, wrapper)
        self.flow.append(("move", "alias", (id(tensor),), (id(wrapper),)))

    def apply(self, call: Call) -> None:
        target = call.inputs[0]
        before = self.get(target) if call.in_place else None
        self.rules.rule_for(call.name)(self, call)
        if KINDS.get(call.name) in LAYERS:
            self.layer_outputs.add(id(call.outputs[0]))
        labels = tuple(self.get(t) for t in call.outputs)
        inputs = tuple(self.labels.get(id(t)) for t in call.inputs)
        self.steps.append(Step(*self.called[-1], labels, inputs, self.where(), len(self.called) - 1))
        if self.rules.is_position_sensitive(self, call):
            self.position_sensitive += [x for x in (*labels, *map(self.get, call.inputs)) if x is not None]
        reads, offset = KINDS.get(call.name) in READERS, call.name in ("add", "sub") and len(call.inputs) == 1
        kind = "read" if reads else "end" if offset or call.name in NONZERO_AT_ZERO else "move"
        self.flow.append((kind, call.name, tuple(map(id, call.inputs)), tuple(map(id, call.outputs))))
        if call.in_place and before is None and not self.told_of(target):
            self.freeze(self.get(target), f"{self.here()} writes it in place into a part of another tensor")

    def told_of(self, part: Tensor) -> bool:
        """Give all that is known of a part's memory the channels that were written into it; whether that could be done.

        It can where the rest of the memory goes on along other axes than the channels', as around a map that is copied into
        the middle of a larger one.
        """
        labels, others = self.get(part), list(self.storages.get(memory_of(part), {}).values())
        if labels is None:
            return True
        wide = varying_axes(labels)
        for other in others:
            if other.ndim != part.ndim or other.stride() != part.stride():
                return False
            if any(other.shape[axis] != part.shape[axis] for axis in wide):
                return False
        for other in others:
            known = self.get(other)
            if known is None:
                self.put(other, labels)
            else:
                self.unite(labels, known)
        return True

    def note(self, call: Call) -> None:
        kind, numbers = KINDS.get(call.name), list[float]()
        if kind in SAME_NUMBERS and call.name not in WITHOUT_ARITHMETIC:
            named = zip((a.name for a in call.func._schema.arguments), call.args, strict=False)
            given = [value for name, value in (*named, *call.kwargs.items()) if name != "groups"]
        else:
            given = [call.argument(name) for name in ("value", "fill_value")]
        numbers = [number for number in tree_flatten(given)[0] if isinstance(number, (int, float))]
        if kind == "elementwise" and call.name not in WITHOUT_ARITHMETIC:
            # Numbers that come as tensors: lone ones but not from the inputs, and some more that come from no parameter either.
            for tensor in call.inputs:
                few = tensor.numel() <= MOST_NUMBERS and memory_of(tensor) not in self.computed
                if not tensor.is_meta and (few or (tensor.ndim == 0 and id(tensor) not in self.data_dependent)):
                    numbers += tensor.flatten().tolist()
        if kind != "fresh" and not self.computed.isdisjoint(map(memory_of, call.inputs)):
            self.computed.update(map(memory_of, call.outputs))
        self.called.append((call.name, self.here(), tuple(numbers)))
        self.shapes.append(call.outputs[0].shape)

    def begin(self, given: list[Tensor]) -> None:
        self.computed = {memory_of(t) for t in [*given, *self.model.parameters(), *self.model.buffers()]}

    def before_module(self, path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        # An activation in place overwrites what it was given, so this must be seen before it runs.
        self.follows_layer.append(bool(args) and id(args[0]) in self.layer_outputs)

    def after_module(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        direct = self.follows_layer.pop()
        if not isinstance(output, Tensor) or isinstance(module, Gate):
            return
        # Behind a sum a gate would scale some terms twice; an Identity straight behind a layer is an activation too.
        activates = isinstance(module, (*ACTIVATIONS, nn.Identity))
        if activates or (is_scalable(module) and module.weight is not None):
            self.module_outputs.setdefault(path, []).append(output)
            if direct or not activates:
                self.flow.append(("activation" if activates else "layer", path, (), (id(output),)))
