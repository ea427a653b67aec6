"""Runs a model once and carries a label tensor beside every tensor: what each of its elements belongs to.

A label tensor has as many axes as the tensor that it describes; an axis along which the label is constant has size 1
(so an activation [1, C, H, W] carries labels [1, C, 1, 1]). Label 0 means "nothing". ``None`` stands for all 0.

``Propagation`` knows the operators that only move elements; what a label means, and what arithmetic does to it, is its
subclasses' business (channels in ``slim.channels``, gate factors in ``slim.fold``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from slim.errors import SlimError
from slim.forward import call_arguments, evaluation_mode, tensors_in, transparent_gates, untouched
from slim.gate import count_params
from slim.graph import Cost, LayerCost
from slim.ops import KINDS, LIKE_PARAMETER, VIEW, operator_name
from slim.wrapped import check_open, without_ddp


def collapse(labels: Tensor) -> Tensor | None:
    """Shrink every axis along which the labels do not change to size 1; None when nothing is labelled."""
    for axis in range(labels.ndim):
        if labels.shape[axis] <= 1:
            continue
        first = labels.narrow(axis, 0, 1)
        # Axes that came from expand() have stride 0: constant by construction, no need to compare.
        if labels.stride(axis) == 0 or bool((labels == first).all()):
            labels = first
    return labels.clone() if bool(labels.any()) else None


def spread(labels: Tensor | None, tensor: Tensor) -> Tensor:
    """Labels in the full shape of the tensor that they describe (a view where possible)."""
    if labels is None:
        return torch.zeros((1,) * tensor.ndim, dtype=torch.int64).expand(tensor.shape)
    return labels.expand(tensor.shape)


NO_AXIS = -1
"""In the place of a parameter's axis: one of size 1 that a view has added."""


def memory_of(tensor: Tensor) -> int:
    """What tensors that share memory have in common."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


@contextmanager
def usual_arithmetic() -> Iterator[None]:
    """Outside of inference mode and of autocast for the duration: both change which operators run."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def batches_in(value: Any) -> list[int]:
    """How many images an input may hold: as many as its first axis is long, or as a list has of unbatched ones, [C, H, W]."""
    tensors = [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor) and leaf.ndim]
    listed = isinstance(value, (list, tuple)) and all(tensor.ndim == 3 for tensor in tensors)
    return [*([len(value)] if listed else []), *(tensor.shape[0] for tensor in tensors)]


def varying_axes(labels: Tensor) -> list[int]:
    """Axes along which the labels change."""
    return [axis for axis, size in enumerate(labels.shape) if size > 1]


def split_axes(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[int, list[int]]]:
    """For a view from one shape to another: the input axes that it splits, each with the output axes (size > 1) they become.

    A run of input axes that merges and splits at once is reported for each of its axes.
    """
    ins, outs = list(accumulate(before, mul)), list(accumulate(after, mul))
    # Axes belong together up to where the products of the sizes so far are equal again.
    common = [end for end in ins if end in outs]

    def run_of(end: int) -> int | None:
        return next((mark for mark in common if mark >= end), None)

    result: list[tuple[int, list[int]]] = []
    for axis, end in enumerate(ins):
        wide = [k for k, other in enumerate(outs) if after[k] > 1 and run_of(other) == run_of(end)]
        if before[axis] > 1 and len(wide) > 1:
            result.append((axis, wide))
    return result


@dataclass(frozen=True)
class Call:
    """One operator as the model called it, as a channel rule gets it.

    ``inputs`` and ``outputs`` are the tensors among arguments and results; ``contiguous`` says whether the first input lay
    row by row in memory before the call, ``shape`` what shape it had, which an operator in place may change.
    """

    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Tensor]
    outputs: list[Tensor]
    in_place: bool = False
    contiguous: bool = True
    shape: tuple[int, ...] = ()

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
    """Base of the label propagations; use through ``run``. ``muted``: follow no labels, count costs alone.

    ``copy_of``: the names of tensors, by identity, of the model of which this one is a copy: what runs them is no copy.
    """

    def __init__(self, model: nn.Module, *, muted: bool = False, copy_of: Mapping[int, str] | None = None) -> None:
        super().__init__()
        model = without_ddp(model)
        check_open(model)
        self.model = model
        self.muted = muted
        self.tensors: dict[int, str] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self.tensors.setdefault(id(tensor), name)
        self.foreign = {key: name for key, name in (copy_of or {}).items() if key not in self.tensors}
        self.memories = {memory_of(tensor) for tensor in model.parameters() if not is_lazy(tensor)}
        # Parameters and buffers that an operator has seen, by identity.
        self.seen: set[int] = set()
        self.views: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.labels: dict[int, Tensor | None] = {}
        # Labels are held by identity: every tensor must live as long as the table does.
        self.alive: list[Any] = []
        # The labelled tensors by their memory, then by identity.
        self.storages: dict[int, dict[int, Tensor]] = {}
        # Results that no operator has read yet: under their own identity, or what was written in place under its memory's.
        self.unread: dict[tuple[str, int], Tensor] = {}
        # Tensors whose values come from the example inputs: indices among them choose other elements on other inputs.
        self.data_dependent: set[int] = set()
        self.path: list[str] = []
        self.current_rule = ""
        self.failed_at: tuple[str, list[Tensor]] | None = None
        self.layers: list[LayerCost] = []
        self.outputs: list[Tensor] = []
        self.batches: list[int] = []
        self.batch_size = 0  # until the first layer runs

    # -- running ------------------------------------------------------------------------------------------------

    def run(self, example_inputs: Any) -> None:
        """Forward once in evaluation mode without gradients; ``outputs`` holds the tensors among the outputs."""
        with (
            usual_arithmetic(), untouched(self.model), self.watched_modules(), evaluation_mode(self.model), torch.no_grad()
        ):  # fmt: skip
            args, kwargs = call_arguments(example_inputs)
            given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
            self.data_dependent = {id(tensor) for tensor in given}
            self.begin(given)
            self.batches = [n for value in (*args, *kwargs.values()) for n in batches_in(value)]
            try:
                with self:
                    self.outputs = tensors_in(self.model(*args, **kwargs))
            except SlimError:
                raise
            except Exception as error:
                where = self.failed_in()
                text = (str(error).strip() or repr(error)).splitlines()[0]
                if self.current_rule:
                    raise SlimError(
                        f"the channel rule of {self.current_rule} failed in {where}: {type(error).__name__}: {text}; "
                        "mend the rule where it was registered with slim.register_rule, or report it"
                    ) from error
                raise SlimError(
                    f"the model does not run on the example inputs: {type(error).__name__} in {where}: "
                    f"{text}; give inputs as model(*example_inputs) would take them"
                ) from error

    def begin(self, given: list[Tensor]) -> None:
        """Called with the tensors among the inputs before the model runs on them."""

    def failed_in(self) -> str:
        """The module whose operator or own code failed, in words."""
        return (self.failed_at or (self.where(), []))[0] or "the model's own forward"

    @contextmanager
    def watched_modules(self) -> Iterator[None]:
        """Keep ``path`` on the module whose forward is running."""
        handles = []
        for path, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(partial(self.enter, path)))
            handles.append(module.register_forward_hook(partial(self.leave, path), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def enter(self, path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.path.append(path)
        self.before_module(path, module, args)

    def leave(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # The hooks of a failing module run too, before its error reaches run().
        if self.failed_at is None and sys.exc_info()[1] is not None:
            self.failed_at = (self.where(), [])
        self.path.pop()
        self.after_module(path, module, args, output)

    def before_module(self, path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Called as a module's forward begins."""

    def after_module(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Called as a module's forward ends."""

    # -- labels -------------------------------------------------------------------------------------------------

    def get(self, tensor: Tensor) -> Tensor | None:
        """The labels of a tensor; one that was wrapped anew, behind the operators' back, is still what it was."""
        key = id(tensor)
        if key not in self.labels and key not in self.tensors and key not in self.views:
            place = (tensor.shape, tensor.stride(), tensor.storage_offset()) if tensor.layout is torch.strided else None
            for other in self.storages.get(memory_of(tensor), {}).values():
                if (other.shape, other.stride(), other.storage_offset()) == place:
                    self.wrapped_anew(other, tensor)
                    break
        return self.labels.get(key)

    def put(self, tensor: Tensor, labels: Tensor | None) -> None:
        """Give a tensor its labels: as many axes as the tensor, size 1 where they do not change; None for none."""
        self.alive.append(tensor)
        self.labels[id(tensor)] = labels
        self.storages.setdefault(memory_of(tensor), {})[id(tensor)] = tensor

    def wrapped_anew(self, tensor: Tensor, wrapper: Tensor) -> None:
        """Called when a tensor is met under a new identity."""
        self.put(wrapper, self.labels[id(tensor)])
        self.unread.pop(("tensor", id(tensor)), None)

    def put_outputs(self, call: Call, labels: Tensor | None) -> None:
        """Give an operator's outputs these labels; those of another shape than the first (statistics) have none."""
        for tensor in call.outputs:
            self.put(tensor, labels if tensor.shape == call.outputs[0].shape else None)

    def channel_labels(self, tensor: Tensor, axis: int) -> Tensor | None:
        """Labels along one axis, [size] (0: none); None when the labels vary along another axis."""
        labels, axis = self.get(tensor), axis % tensor.ndim
        if labels is None:
            return torch.zeros(tensor.shape[axis], dtype=torch.int64)
        if any(other != axis for other in varying_axes(labels)):
            return None
        return labels.reshape(-1).expand(tensor.shape[axis])

    def weight_of(self, tensor: Tensor | None) -> tuple[str, tuple[int, ...]] | None:
        """(parameter name, its axes in this tensor's order) of a parameter or of a view of it that ``view_of_weight`` knows."""
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
        if foreign := next((self.foreign[id(t)] for t in inputs if id(t) in self.foreign), None):
            raise SlimError(
                f"a copy of the model runs {foreign} of the model itself in {self.where() or 'its own forward'}: copies keep a "
                "function (a forward that was replaced, a lambda) as it is, and with it what it holds; make it a method"
            )
        contiguous, shape = bool(inputs) and inputs[0].is_contiguous(), tuple(inputs[0].shape) if inputs else ()
        try:
            out = func(*args, **kwargs)
        except Exception:
            self.failed_at = (self.where(), inputs)
            raise
        self.alive.append((args, kwargs, out))
        outputs = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor)]
        name, in_place = operator_name(func)
        if not self.muted:
            self.note_reads(inputs, outputs, in_place)
        if not outputs:
            return out
        self.seen.update(id(tensor) for tensor in inputs if id(tensor) in self.tensors)
        if not self.data_dependent.isdisjoint(map(id, inputs)):
            self.data_dependent.update(map(id, outputs))
        if name in LIKE_PARAMETER and inputs and inputs[0].ndim > 1 and self.view_of_weight(name, args, outputs[0]):
            return out
        call = Call(name, func, args, kwargs, inputs, outputs, in_place, contiguous, shape)
        self.count(call)
        self.note(call)
        if self.muted:
            return out
        if any(Propagation.get(self, t) is not None or self.weight_of(t) for t in inputs):
            self.current_rule = name
            self.apply(call)
            self.current_rule = ""
        elif not in_place:
            for tensor in outputs:
                self.put(tensor, None)
        return out

    def note_reads(self, inputs: list[Tensor], outputs: list[Tensor], in_place: bool) -> None:
        """Keep ``unread`` on the results that nothing has read."""
        for tensor in inputs:
            self.unread.pop(("tensor", id(tensor)), None)
            self.unread.pop(("memory", memory_of(tensor)), None)
        for tensor in outputs:
            self.unread[("memory", memory_of(tensor)) if in_place else ("tensor", id(tensor))] = tensor

    def note(self, call: Call) -> None:
        """Called for every operator, labelled or not."""

    def apply(self, call: Call) -> None:
        """Find the operator's rule among the methods and follow it."""
        rule: Callable[[Call], None] = getattr(self, KINDS.get(call.name, "unknown"), self.unknown)
        rule(call)

    def unknown(self, call: Call) -> None:
        """Called for an operator without a rule, and by rules that do not understand their call."""
        raise NotImplementedError

    def count(self, call: Call) -> None:
        """Note the cost of a convolution or linear layer."""
        args, out, repeated = call.args, call.outputs[0], list[int]()
        is_convolution = KINDS.get(call.name) == "convolution"
        if is_convolution:
            weight, transposed = args[1], bool(args[6])
            applied = args[0] if transposed else out
            positions = applied.shape[0] * prod(applied.shape[2:])
        elif KINDS.get(call.name) == "matmul":
            weight = args[2] if call.name == "addmm" else args[1]
            positions = out.numel() // out.shape[-1]
        elif KINDS.get(call.name) == "product" and any(map(self.is_of_parameter, args[:2])):
            weight, across = (args[1], -1) if self.is_of_parameter(args[1]) else (args[0], -2)
            positions = out.numel() // out.shape[across]
            repeated = [axis for axis in range(weight.ndim) if not weight.stride(axis)]
        else:
            return
        if not self.batch_size:
            rows = applied.shape[0] if is_convolution else positions
            self.batch_size = next((n for n in self.batches if n and rows % n == 0), rows if is_convolution else 1)
        param, axes = self.weight_of(weight) or ("", tuple(n for n in range(weight.ndim) if n not in repeated))
        shape = tuple(weight.shape[axes.index(axis)] for axis in sorted(set(axes) - {NO_AXIS}))
        self.layers.append(LayerCost(self.where(), param, shape, positions // self.batch_size))

    def is_of_parameter(self, tensor: Tensor) -> bool:
        """Whether it is a parameter or a view of one, of a single row or column, too, which no longer tells its axes apart."""
        return self.weight_of(tensor) is not None or memory_of(tensor) in self.memories

    def view_of_weight(self, name: str, args: Any, out: Tensor) -> bool:
        """Note a parameter that is transposed, cast, or has other axes of size 1 as still that parameter; whether it is."""
        tensor, known = args[0], self.weight_of(args[0])
        if known is None:
            return False
        param, axes = known
        if name == "t":
            axes = axes[::-1]
        elif name == "transpose":
            order = list(axes)
            order[args[1]], order[args[2]] = axes[args[2]], axes[args[1]]
            axes = tuple(order)
        elif name == "permute":
            axes = tuple(axes[d] for d in args[1])
        elif tensor.shape != out.shape:
            wide = [axis for axis, size in zip(axes, tensor.shape, strict=True) if size > 1]
            # An expanded axis has stride 0: no element is on it.
            places = [n for n, size in enumerate(out.shape) if size > 1 and (name != "expand" or out.stride(n))]
            if len(wide) < 2 or [out.shape[n] for n in places] != [size for size in tensor.shape if size > 1]:
                return False
            axes = tuple(wide[places.index(n)] if n in places else NO_AXIS for n in range(out.ndim))
        if out is not tensor:
            self.views[id(out)] = (param, axes)
        return True

    def pads_alike(self, value: float) -> bool:
        """Whether a border of this value around a map belongs to the map: 0 times a factor is 0."""
        return value == 0

    def padded(self, call: Call) -> Tensor:
        """The labels of what a border is put around: if it is the map's, it has the label of the elements beside it."""
        tensor, labels, widths = call.inputs[0], self.get(call.inputs[0]), list(call.argument("pad"))
        if labels is None or not self.pads_alike(float(call.argument("value") or 0)):
            return nn.functional.pad(spread(labels, tensor), widths)
        alike = [axis for axis, size in enumerate(labels.shape) if size == 1]
        widths = [0 if tensor.ndim - 1 - n // 2 in alike else width for n, width in enumerate(widths)]
        return nn.functional.pad(labels, widths)

    def move(self, call: Call) -> None:
        """Operators that rearrange elements: apply the very same operator to the labels."""
        # Where an operator takes indices, they are no elements that it moves.
        moving = call.inputs[:1] if call.name.startswith("index") else call.inputs
        labelled = {id(t): spread(self.get(t), t) for t in moving if not call.in_place}
        if call.in_place:  # only the first argument is, and has its new shape already
            own, nothing = self.get(call.inputs[0]), torch.zeros((), dtype=torch.int64)
            labelled = {id(call.inputs[0]): (nothing if own is None else own).expand(call.shape).clone()}

        def swap(leaf: Any) -> Any:
            return labelled.get(id(leaf), leaf.cpu()) if isinstance(leaf, Tensor) else leaf

        if call.name == "constant_pad_nd":
            moved = [self.padded(call)]
        elif call.name in VIEW:
            moved = [labelled[id(call.inputs[0])].reshape(call.outputs[0].shape)]
        else:
            result = call.func(*tree_map(swap, call.args), **tree_map(swap, call.kwargs))
            moved = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        for tensor, labels in zip(call.outputs, moved, strict=True):
            self.put(tensor, collapse(labels))


def cost(model: nn.Module, example_inputs: Any) -> Cost:
    """Count the multiply-accumulates and parameters of a model, with a row for each call of a layer.

    Convolutions and linear layers are counted; element-wise work (activations, norms, pooling) is not.

    Args:
        model: any model; it runs once in evaluation mode and is left as it was
        example_inputs: a tensor, a tuple of positional or a dictionary of keyword arguments; MACs are for one image of them:
            what the first layer gets is divided by the first of their batch sizes that divides it

    Raises:
        SlimError: when the model does not run on the inputs.

    Examples:
        >>> import slim, torch
        >>> from torch import nn
        >>> found = slim.cost(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.zeros(2, 3, 8, 8))
        >>> found.macs == 3 * 3 * 3 * 4 * 6 * 6, found.params == 3 * 3 * 3 * 4 + 4
        (True, True)
    """
    counter = Propagation(model, muted=True)
    with transparent_gates(model):
        counter.run(example_inputs)
    return Cost(sum(row.macs for row in counter.layers), count_params(model), tuple(counter.layers))
