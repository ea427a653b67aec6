"""Folds gates into the weights that read what they scale, so that no gate is left in the deployed network.

Which weights read a gate's output is found by propagation: every element carries the gate entry that scales it, linear
readers take it up, and whatever does not commute with a non-negative factor makes that entry unfoldable.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn

from slim.errors import SlimError
from slim.gate import Gate, detach_gate, gate_parameters, gated_path, gates_in, vectors_in
from slim.graph import inputs_like
from slim.ops import is_scalable
from slim.propagate import Call, Propagation, spread
from slim.surgery import named_tensors
from slim.wrapped import Model

logger = logging.getLogger(__name__)
HOMOGENEOUS = {
    "relu", "leaky_relu", "prelu", "_prelu_kernel", "clone", "contiguous", "detach", "alias", "to", "_to_copy", "neg",
    "dropout", "native_dropout", "copy", "abs",
}  # fmt: skip
"""f(g * x) = g * f(x) for g >= 0."""
ADDITIVE = {"add", "sub", "maximum", "minimum"}
SCALING = {"mean", "sum", "amax", "amin", "max", "min", "median", "linalg_vector_norm", "norm"}
"""Summaries that grow with a factor of all that they sum up."""


class GatePropagation(Propagation):
    """Labels are entries of gate vectors; element n of the concatenation of all vectors has label n + 1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.start: dict[int, int] = {}
        count = 1
        for vector in gate_parameters(model):
            self.start[id(vector)] = count
            count += vector.numel()
        self.unfoldable: dict[int, str] = {}
        # For each weight that reads gated channels, the entries by its first two axes.
        self.readers: dict[str, Tensor] = {}

    def mark_unfoldable(self, labels: Tensor | None, name: str) -> None:
        """These entries cannot be folded: an operator met them that does not commute with a factor."""
        if labels is not None:
            for label in torch.unique(labels).tolist():
                if label:
                    self.unfoldable.setdefault(label, f"{name} in {self.where() or 'the model'}")

    def before_module(self, path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.muted = self.muted or isinstance(module, Gate)

    def after_module(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(module, Gate) or output is None:
            return
        self.muted = False
        self.mark_unfoldable(self.get(args[0]), "a second gate")
        entries = torch.cat([torch.arange(v.numel()) + self.start[id(v)] for v in module.vectors])
        entries = entries if module.index is None else entries[module.index.cpu()]
        shape = [1] * output.ndim
        shape[module.axis] = -1
        labels = entries.reshape(shape)
        if self.get(args[0]) is not None:
            self.mark_unfoldable(labels, "a gate before it")
        self.put(output, labels)

    def unknown(self, call: Call) -> None:
        for tensor in call.inputs:
            self.mark_unfoldable(self.get(tensor), call.name)
        self.put_outputs(call, None)

    def elementwise(self, call: Call) -> None:
        """A sum keeps a factor that both sides have; a product keeps the one that one side has."""
        labels = [self.get(t) for t in call.inputs]
        scaled = [x for x in labels if x is not None]
        if not scaled:
            result = None
        elif call.name in ADDITIVE and len(call.inputs) > 1:
            full = [spread(x, t).broadcast_to(call.outputs[0].shape) for x, t in zip(labels, call.inputs, strict=True)]
            differing = (torch.stack(full) != full[0]).any(0)
            for x in full:
                self.mark_unfoldable(x[differing], call.name)
            result = scaled[0] if len(scaled) == len(call.inputs) else None
        elif len(scaled) == 1 and (
            call.name in HOMOGENEOUS or call.name == "mul" or (call.name == "div" and labels[0] is not None)
        ):
            result = scaled[0].reshape((1,) * (call.outputs[0].ndim - scaled[0].ndim) + tuple(scaled[0].shape))
        else:
            return self.unknown(call)
        self.put_outputs(call, result)

    def spatial(self, call: Call) -> None:
        """Max and mean over windows of one map commute with its factor."""
        labels = self.get(call.inputs[0])
        if labels is not None and any(size > 1 for size in labels.shape[2:]):
            return self.unknown(call)
        self.put_outputs(call, labels)

    def reduce(self, call: Call) -> None:
        """Means and maxima over axes along which the factor does not change."""
        labels = self.get(call.inputs[0])
        axes = call.axes(call.inputs[0])
        if labels is None or call.name not in SCALING or any(labels.shape[a] > 1 for a in axes):
            return self.unknown(call)
        keep = call.outputs[0].ndim == call.inputs[0].ndim
        self.put(call.outputs[0], labels.reshape([s for a, s in enumerate(labels.shape) if keep or a not in axes]))

    def convolution(self, call: Call) -> None:
        """Takes the factors of its input channels up into its weight."""
        x, weight, transposed, groups = call.args[0], call.args[1], bool(call.args[6]), int(call.args[8])
        known, entries = self.weight_of(weight), self.channel_labels(x, 1)
        if known is None or entries is None:
            return self.unknown(call)
        # Grouped: input i meets rows of its own group only, so its factor belongs to a block, not to a whole column.
        per_group = len(entries) // groups
        if transposed:
            block = entries.reshape(-1, 1).expand(-1, weight.shape[1])
        else:
            block = entries.reshape(groups, 1, per_group).expand(-1, weight.shape[0] // groups, -1)
            block = block.reshape(weight.shape[0], per_group)
        self.record_reader(known, block)
        self.put(call.outputs[0], None)

    def matmul(self, call: Call) -> None:
        x, weight = (call.args[1], call.args[2]) if call.name == "addmm" else (call.args[0], call.args[1])
        known, entries = self.weight_of(weight), self.channel_labels(x, x.ndim - 1)
        if known is None or entries is None:
            return self.unknown(call)
        inputs = (1, -1) if call.name == "linear" else (-1, 1)
        self.record_reader(known, entries.reshape(inputs).expand(*weight.shape))
        self.put(call.outputs[0], None)

    def record_reader(self, weight: tuple[str, tuple[int, ...]], entries: Tensor) -> None:
        """A weight, as ``weight_of`` knows it, reads these entries' channels, by its first two axes."""
        param, (first, second, *_) = weight
        if {first, second} != {0, 1}:
            return self.mark_unfoldable(entries, f"{param} in another order of its axes")
        entries = entries if first == 0 else entries.t()
        before = self.readers.setdefault(param, entries)
        if before is not entries and not torch.equal(before, entries):
            self.mark_unfoldable(before, f"{param} is used again on other channels")
            self.mark_unfoldable(entries, f"{param} is used again on other channels")


def fold_gates(model: Model, example_inputs: Any = None) -> Model:
    """A new model with the gates multiplied into the weights that read what they scale, or into those that make it; exact.

    No gate is left in any YOLOv5. Where an operator between gate and reader does not commute with a factor, and the gate does
    not follow a layer that could take it up, it stays and a logged warning says which and why.

    Args:
        model: a model with gates; it is not changed
        example_inputs: as for ``slim.trace``; may be left out when the gates were placed with tensor inputs by position

    Raises:
        SlimError: when a gate is negative, and when example inputs are needed.

    Examples:
        >>> import slim, torch
        >>> from torch import nn
        >>> model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.rand(1, 3, 8, 8)
        >>> gates = slim.add_gates(model, slim.trace(model, x))
        >>> _ = torch.nn.init.uniform_(gates["0"])
        >>> folded = slim.fold_gates(model)
        >>> slim.gate_vectors(folded), slim.max_difference(model, folded, x) < 1e-5
        ({}, True)
    """
    folded = copy.deepcopy(model)
    if any(bool((vector < 0).any()) for vector in gate_parameters(folded)):
        raise SlimError("a gate is negative; call L1Step.step(0) (or step) after every optimizer step")
    while gate_parameters(folded):
        run = GatePropagation(folded)
        run.run(example_inputs_of(folded) if example_inputs is None else example_inputs)
        for tensor in run.outputs:
            run.mark_unfoldable(run.get(tensor), "the model's output")
        stuck = stuck_vectors(run, folded)
        fold_into_readers(run, folded, stuck)
        staying = {id(v) for path, gate in gates_in(folded) if not folds_back(folded, path) for v in gate.vectors}
        behind_layers = set(stuck) - staying
        if not behind_layers:
            group_of = {id(vector): group for _, _, group, vector in vectors_in(folded)}
            for key, reason in stuck.items():
                logger.warning("the gate of group %s stays: its factor does not pass through %s", group_of[key], reason)
            break
        # Without these, others may find their way forward.
        fold_into_producers(folded, behind_layers)
    return folded


def stuck_vectors(run: GatePropagation, model: nn.Module) -> dict[int, str]:
    """id of each vector of which some entry cannot be folded forward, and why."""
    stuck = {}
    for vector in gate_parameters(model):
        labels = range(run.start[id(vector)], run.start[id(vector)] + vector.numel())
        reason = next((run.unfoldable[x] for x in labels if x in run.unfoldable), None)
        if reason is not None:
            stuck[id(vector)] = reason
    return stuck


@torch.no_grad()
def fold_into_readers(run: GatePropagation, model: nn.Module, stuck: dict[int, str]) -> None:
    """Multiply the weights that read what is scaled; of stuck vectors nothing is taken up. In place."""
    taken = [torch.ones_like(v) if id(v) in stuck else v for v in gate_parameters(model)]
    factors = torch.cat([torch.ones(1), *[v.detach().float().cpu() for v in taken]])
    tensors = named_tensors(model)
    for param, entries in run.readers.items():
        weight = tensors[param]
        factor = factors[entries].to(weight.device, weight.dtype)
        weight.mul_(factor.reshape(*factor.shape, *(1,) * (weight.ndim - 2)))
    remove_gates(model, {id(v) for v in gate_parameters(model)} - set(stuck))


@torch.no_grad()
def fold_into_producers(model: nn.Module, vectors: set[int]) -> None:
    """Multiply weight and bias of the layers that gates with these vectors follow. In place."""
    for path, gate in gates_in(model):
        layer: Any = model.get_submodule(gated_path(path))
        taken = torch.cat([v if id(v) in vectors else torch.ones_like(v) for v in gate.vectors])
        if any(id(v) in vectors for v in gate.vectors):
            factor = (taken if gate.index is None else taken[gate.index]).to(layer.weight.dtype)
            layer.weight.mul_(factor.reshape(-1, *(1,) * (layer.weight.ndim - 1)))
            if layer.bias is not None:
                layer.bias.mul_(factor)
    remove_gates(model, vectors)


def folds_back(model: nn.Module, gate_path: str) -> bool:
    """Whether the module that a gate follows can take it up: a layer whose weight and bias are parameters that no other module
    shares, and to whose result nothing but the gate is done."""
    layer = model.get_submodule(gated_path(gate_path))
    own = {id(p) for p in layer._parameters.values() if p is not None}
    shared = sum(id(p) in own for m in model.modules() for p in m._parameters.values()) > len(own)
    is_plain = is_scalable(layer) and layer._parameters.get("weight") is not None and len(layer._forward_hooks) == 1
    return is_plain and not shared


def remove_gates(model: nn.Module, folded: set[int]) -> None:
    """Take off the gates whose vectors are all folded; set folded vectors of other gates to 1. In place."""
    for path, gate in list(gates_in(model)):
        for vector in gate.vectors:
            if id(vector) in folded:
                vector.fill_(1.0)
        if all(id(v) in folded for v in gate.vectors):
            detach_gate(model.get_submodule(gated_path(path)))


def example_inputs_of(model: nn.Module) -> tuple[Tensor, ...]:
    """Inputs of the shapes with which the gates were placed."""
    spec = getattr(model, "slim_example", None)
    if spec is None:
        raise SlimError("fold_gates needs example_inputs for this model: its gates were placed without tensor inputs")
    return inputs_like(spec, model)
