"""Runs a model once under a dispatch mode and carries a label tensor beside every tensor.

``Propagation`` knows the operators that only move elements; what a label means, and what arithmetic does to it, is its
subclasses' business (channels in ``slim.trace``, gate factors in ``slim.fold``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from slim.ops import KINDS, operator_name


class Propagation(TorchDispatchMode):
    """Base of the label propagations; use through ``run``."""

    def __init__(self, model: nn.Module, *, muted: bool = False) -> None:
        super().__init__()
        self.model = model
        self.muted = muted
        self.tensors: dict[int, str] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self.tensors.setdefault(id(tensor), name)
        self.views: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.labels: dict[int, Tensor | None] = {}
        # Labels are held by identity: every tensor must live as long as the table does.
        self.alive: list[Any] = []
        self.path: list[str] = []
        self.layers: list[LayerCost] = []
        self.batch_size = 1

    # -- running ------------------------------------------------------------------------------------------------

    def run(self, example_inputs: Any) -> list[Tensor]:
        """Forward once in evaluation mode without gradients; returns the tensors among the outputs."""
        args, kwargs = call_arguments(example_inputs)
        self.batch_size = next(
            (t.shape[0] for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor) and t.ndim), 1
        )
        with (
            self.watched_modules(),
            evaluation_mode(self.model),
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
            self,
        ):
            outputs = self.model(*args, **kwargs)
        return [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor)]

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
            self.before_module(path, module)

        return hook

    def leaving(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.path.pop()
            self.after_module(path, module, args, output)

        return hook

    def before_module(self, path: str, module: nn.Module) -> None:
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

    def weight_of(self, tensor: Tensor) -> tuple[str, tuple[int, ...]] | None:
        """(parameter name, its axes in this tensor's order) of a parameter or of a transposed view of one."""
        if id(tensor) in self.tensors:
            return self.tensors[id(tensor)], tuple(range(tensor.ndim))
        return self.views.get(id(tensor))

    def where(self) -> str:
        """Path of the innermost module that is running."""
        return self.path[-1] if self.path else ""

    # -- dispatch -----------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.alive.append((args, kwargs, out))
        inputs = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor)]
        if not outputs:
            return out
        name, in_place = operator_name(func)
        if (
            name in ("t", "transpose", "permute", "detach", "alias")
            and self.weight_of(inputs[0])
            and inputs[0].ndim > 1
        ):
            self.view_of_weight(name, inputs[0], outputs[0])
            return out
        self.count(name, args, outputs[0])
        if self.muted:
            return out
        if any(self.labels.get(id(t)) is not None or self.weight_of(t) for t in inputs):
            rule: Callable[..., None] = getattr(self, KINDS.get(name, "unknown"))
            rule(name, func, args, kwargs, inputs, outputs)
        elif not in_place:
            for tensor in outputs:
                self.put(tensor, None)
        return out

    def count(self, name: str, args: Any, out: Tensor) -> None:
        """Note the cost of a convolution or linear layer."""
        if KINDS.get(name) == "convolution":
            weight, transposed = args[1], bool(args[6])
            applied = args[0] if transposed else out
            positions = applied.shape[0] * prod(applied.shape[2:])
        elif KINDS.get(name) == "matmul":
            weight = args[2] if name == "addmm" else args[1]
            positions = out.numel() // out.shape[-1]
        else:
            return
        param, axes = self.weight_of(weight) or ("", tuple(range(weight.ndim)))
        shape = tuple(weight.shape[axes.index(axis)] for axis in range(weight.ndim))
        self.layers.append(LayerCost(self.where(), param, shape, positions // self.batch_size))

    def view_of_weight(self, name: str, tensor: Tensor, out: Tensor) -> None:
        """A transposed parameter is still that parameter."""
        param, axes = self.weight_of(tensor) or ("", ())
        if name in ("detach", "alias"):
            self.views[id(out)] = (param, axes)
        elif tensor.ndim == 2:
            self.views[id(out)] = (param, axes[::-1])
        # Other permutations of parameters are not followed: their use is an unknown reading of the parameter.

    def move(self, name: str, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Operators that rearrange elements: apply the very same operator to the labels."""
        labelled = {
            id(t): spread(self.get(t), t) for t in inputs if t.dtype is not torch.int64 or self.get(t) is not None
        }
        swap: Callable[[Any], Any] = lambda leaf: labelled.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf  # noqa: E731
        if name in ("view", "_unsafe_view", "reshape", "_reshape_alias"):
            moved = [labelled[id(inputs[0])].reshape(outputs[0].shape)]
        else:
            # The padding of a map carries no label, whatever its value.
            kept = args[:2] if name == "constant_pad_nd" else args
            result = func(*tree_map(swap, kept), **tree_map(swap, kwargs if kept is args else {}))
            moved = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        for tensor, labels in zip(outputs, moved, strict=True):
            self.put(tensor, collapse(labels))
        self.tie_parts(name, args, inputs, outputs)

    def tie_parts(self, name: str, args: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Hook for propagations in which splitting an axis into equal parts couples the parts."""

    def unknown(
        self, name: str, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
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
