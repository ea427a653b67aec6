"""Runs a model once under a dispatch mode and carries a label tensor beside every tensor.

``Propagation`` knows the operators that only move elements; what a label means, and what arithmetic does to it, is its
subclasses' business (channels in ``slim.trace``, gate factors in ``slim.fold``).
"""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from slim.errors import SlimError
from slim.gate import gates_in
from slim.graph import LayerCost
from slim.labels import along, collapse, split_axes, spread
from slim.ops import KINDS, LIKE_PARAMETER, VIEW, operator_name


@dataclass(frozen=True)
class Call:
    """One operator as the model called it; ``inputs`` and ``outputs`` are the tensors among arguments and results."""

    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Tensor]
    outputs: list[Tensor]
    in_place: bool = False
    contiguous: bool = True
    """Whether the first input lay row by row in memory before the call."""

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operator's schema."""
        given = dict(zip((a.name for a in self.func._schema.arguments), self.args, strict=False))
        return {**given, **self.kwargs}.get(name, default)

    def axes(self, tensor: Tensor) -> list[int]:
        """The axes that ``dim`` names, ascending and not negative; all of them when it is left out."""
        dims = self.argument("dim")
        given = [dims] if isinstance(dims, int) else dims or range(tensor.ndim)
        return sorted({d % tensor.ndim for d in given})


class Propagation(TorchDispatchMode):
    """Base of the label propagations; use through ``run``."""

    def __init__(self, model: nn.Module, *, muted: bool = False) -> None:
        super().__init__()
        self.model = model
        self.muted = muted
        self.tensors: dict[int, str] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self.tensors.setdefault(id(tensor), name)
        self.met: set[int] = set()
        self.views: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.labels: dict[int, Tensor | None] = {}
        # Labels are held by identity: every tensor must live as long as the table does.
        self.alive: list[Any] = []
        # Tensors whose values come from the example inputs: indices among them choose other elements on other inputs.
        self.computed: set[int] = set()
        self.path: list[str] = []
        self.in_rule = ""
        self.failed_at: tuple[str, list[Tensor]] | None = None
        self.layers: list[LayerCost] = []
        self.batch_size = 1

    # -- running ------------------------------------------------------------------------------------------------

    def run(self, example_inputs: Any) -> list[Tensor]:
        """Forward once in evaluation mode without gradients; returns the tensors among the outputs."""
        args, kwargs = call_arguments(example_inputs)
        given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        self.computed = {id(tensor) for tensor in given}
        self.batch_size = next((t.shape[0] for t in given if t.ndim), 1)
        with untouched(self.model), self.watched_modules(), evaluation_mode(self.model), torch.no_grad():
            try:
                with self:
                    outputs = self.model(*args, **kwargs)
            except SlimError:
                raise
            except Exception as error:
                where, _ = self.failed_at or (self.where(), [])
                own = "the model's own forward"
                text = (str(error).strip() or repr(error)).splitlines()[0]
                if self.in_rule:
                    raise SlimError(
                        f"the channel rule of {self.in_rule} failed in {where or own}: {type(error).__name__}: {text}; "
                        "mend the rule where it was registered with slim.register_rule, or report it"
                    ) from error
                raise SlimError(
                    f"the model does not run on the example inputs: {type(error).__name__} in {where or own}: "
                    f"{text}; give inputs as model(*example_inputs) would take them"
                ) from error
        return tensors_in(outputs)

    @contextmanager
    def watched_modules(self) -> Iterator[None]:
        """Keep ``path`` on the module whose forward is running."""
        handles = []
        for path, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(self.entering(path), with_kwargs=True))
            handles.append(module.register_forward_hook(self.leaving(path), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def entering(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.path.append(path)
            self.before_module(path, module, args)

        return hook

    def leaving(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # The hooks of a failing module run too, before its error reaches run().
            if self.failed_at is None and sys.exc_info()[1] is not None:
                self.failed_at = (self.where(), [])
            self.path.pop()
            self.after_module(path, module, args, output)

        return hook

    def before_module(self, path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Called as a module's forward begins."""

    def after_module(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Called as a module's forward ends."""

    # -- labels -------------------------------------------------------------------------------------------------

    def get(self, tensor: Tensor) -> Tensor | None:
        """The labels of a tensor."""
        return self.labels.get(id(tensor))

    def put(self, tensor: Tensor, labels: Tensor | None) -> None:
        """Remember the labels of a tensor."""
        self.alive.append(tensor)
        self.labels[id(tensor)] = labels

    def weight_of(self, tensor: Tensor | None) -> tuple[str, tuple[int, ...]] | None:
        """(parameter name, its axes in this tensor's order) of a parameter or of a transposed or cast view of one."""
        if tensor is not None and id(tensor) in self.tensors:
            return self.tensors[id(tensor)], tuple(range(tensor.ndim))
        return self.views.get(id(tensor))

    def where(self) -> str:
        """Path of the innermost module that is running."""
        return self.path[-1] if self.path else ""

    # -- dispatch -----------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        contiguous = bool(inputs) and inputs[0].is_contiguous()
        try:
            out = func(*args, **kwargs)
        except Exception:
            self.failed_at = (self.where(), inputs)
            raise
        self.alive.append((args, kwargs, out))
        outputs = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor)]
        if not outputs:
            return out
        self.met.update(id(tensor) for tensor in inputs if id(tensor) in self.tensors)
        if not self.computed.isdisjoint(map(id, inputs)):
            self.computed.update(map(id, outputs))
        name, in_place = operator_name(func)
        if name in LIKE_PARAMETER and inputs and self.weight_of(inputs[0]) and inputs[0].ndim > 1:
            self.view_of_weight(name, inputs[0], outputs[0], args)
            return out
        call = Call(name, func, args, kwargs, inputs, outputs, in_place, contiguous)
        self.count(call)
        self.note(call)
        if self.muted:
            return out
        if any(self.labels.get(id(t)) is not None or self.weight_of(t) for t in inputs):
            self.in_rule = name
            self.apply(call)
            self.in_rule = ""
        elif not in_place:
            for tensor in outputs:
                self.put(tensor, None)
        return out

    def note(self, call: Call) -> None:
        """Called for every operator, labelled or not."""

    def apply(self, call: Call) -> None:
        """Find the operator's rule among the methods and follow it."""
        rule: Callable[[Call], None] = getattr(self, KINDS.get(call.name, "unknown"), self.unknown)
        rule(call)

    def count(self, call: Call) -> None:
        """Note the cost of a convolution or linear layer."""
        args, out = call.args, call.outputs[0]
        if KINDS.get(call.name) == "convolution":
            weight, transposed = args[1], bool(args[6])
            applied = args[0] if transposed else out
            positions = applied.shape[0] * prod(applied.shape[2:])
        elif KINDS.get(call.name) == "matmul":
            weight = args[2] if call.name == "addmm" else args[1]
            positions = out.numel() // out.shape[-1]
        else:
            return
        param, axes = self.weight_of(weight) or ("", tuple(range(weight.ndim)))
        shape = tuple(weight.shape[axes.index(axis)] for axis in range(weight.ndim))
        self.layers.append(LayerCost(self.where(), param, shape, positions // self.batch_size))

    def view_of_weight(self, name: str, tensor: Tensor, out: Tensor, args: Any) -> None:
        """A transposed or cast parameter is still that parameter."""
        param, axes = self.weight_of(tensor) or ("", ())
        if name == "t":
            axes = axes[::-1]
        elif name == "transpose":
            order = list(axes)
            order[args[1]], order[args[2]] = axes[args[2]], axes[args[1]]
            axes = tuple(order)
        elif name == "permute":
            axes = tuple(axes[d] for d in args[1])
        if out is not tensor:
            self.views[id(out)] = (param, axes)

    def move(self, call: Call) -> None:
        """Operators that rearrange elements: apply the very same operator to the labels."""
        # Where an operator takes indices, they are no elements that it moves.
        moving = call.inputs[:1] if call.name.startswith("index") else call.inputs
        labelled = {id(t): spread(self.get(t), t) for t in moving}

        def swap(leaf: Any) -> Any:
            return labelled.get(id(leaf), leaf.cpu()) if isinstance(leaf, Tensor) else leaf

        if call.name in VIEW:
            moved = [labelled[id(call.inputs[0])].reshape(call.outputs[0].shape)]
        else:
            # The padding of a map carries no label, whatever its value.
            padding = call.name == "constant_pad_nd"
            result = call.func(
                *tree_map(swap, call.args[:2] if padding else call.args),
                **tree_map(swap, {} if padding else call.kwargs),
            )
            moved = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        for tensor, labels in zip(call.outputs, moved, strict=True):
            self.put(tensor, collapse(labels))

    def unknown(self, call: Call) -> None:
        """Called for an operator without a rule, and by rules that do not understand their call."""
        raise NotImplementedError

    def split_of_labelled_axis(self, tensor: Tensor, out: Tensor) -> list[int] | None:
        """Output axes into which a view splits the labelled axis of ``tensor``; None when it does not."""
        labels = self.get(tensor)
        if labels is None:
            return None
        for axis, parts in split_axes(tuple(tensor.shape), tuple(out.shape)):
            if labels.shape[axis] > 1:
                return parts
        return None

    def channel_labels(self, tensor: Tensor, axis: int) -> Tensor | None:
        """Labels along one axis, [size] (0: none); None when the labels vary along another axis."""
        return along(self.get(tensor), axis, tensor)


def call_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor, a tuple or list of positional arguments, or a dictionary of keyword arguments."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, dict):
        return (), example_inputs
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise SlimError(
        f"example_inputs is {type(example_inputs).__name__}; expected a tensor, a tuple, a list or a dictionary"
    )


def tensors_in(output: Any) -> list[Tensor]:
    """Every tensor of a model's output: in tuples, lists, dictionaries, and in the attributes of other objects."""
    found: list[Tensor] = []
    for leaf in tree_flatten(output)[0]:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (type, nn.Module)):
            found += tensors_in(dict(vars(leaf)))
    return found


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the duration; every module's flag is put back as it was."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """What a forward pass writes is undone: buffers, attributes that modules set on themselves, random number generators."""
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    containers = [
        (value, value.copy())
        for _, values in attributes
        for value in values.values()
        if type(value) in (dict, OrderedDict, list, set)
    ]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {t.device.index for t in [*model.parameters(), *model.buffers()] if t.device.type == "cuda"}
    python_state = random.getstate()
    try:
        with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
            yield
    finally:
        random.setstate(python_state)
        for module, values in attributes:
            vars(module).clear()
            vars(module).update(values)
        for container, values in containers:
            container.clear()
            container.extend(values) if isinstance(container, list) else container.update(values)
        with torch.no_grad():
            for buffer, value in buffers:
                if not buffer.is_meta and not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def transparent_gates(model: nn.Module) -> Iterator[None]:
    """Gates pass their input on unchanged for the duration."""
    gates = [gate for _, gate in gates_in(model)]
    for gate in gates:
        gate.transparent = True
    try:
        yield
    finally:
        for gate in gates:
            gate.transparent = False
