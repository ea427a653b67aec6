"""Running models and copying them, and leaving them as they were."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from types import CellType, FunctionType, MemberDescriptorType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from slim.errors import SlimError
from slim.gate import gates_in
from slim.wrapped import Model


def call_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor, a tuple or list of positional arguments, or a dictionary of keyword arguments.

    Tensors are copied, since a network may write into its inputs. Subclasses of tensors become plain: whatever is computed
    from one is wrapped anew, behind the operators' back.
    """
    example_inputs = tree_map_only(Tensor, lambda t: t.detach().as_subclass(Tensor).clone(), example_inputs)
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
    """Every tensor of a model's output: in containers, iterators, attributes and slots of objects, partials and closures.

    Iterators are run, so that what they compute as they go is seen; the order of a set's tensors of one shape is any.
    """
    found: list[Tensor] = []
    # By identity, and held, so that none of these takes the identity of one that is gone.
    seen: dict[int, Any] = {}

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif not (isinstance(value, OPAQUE) or hasattr(value, "__array_interface__") or id(value) in seen):
            seen[id(value)] = value
            for part in parts_of(value):
                collect(part)

    collect(output)
    return found


OPAQUE = (nn.Module, type, ModuleType, str, bytes, bytearray, memoryview, range, int, float)
"""What holds no tensor of an output."""
MOST_ITEMS = 10_000
"""How much of an iterator is looked at, which may be endless."""


def parts_of(value: Any) -> list[Any]:
    """What an object holds, in a fixed order."""
    if isinstance(value, FunctionType):
        return [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
    slots = {
        n for kind in type(value).__mro__ for n, slot in vars(kind).items() if isinstance(slot, MemberDescriptorType)
    }
    held = [getattr(value, name) for name in sorted(slots - {"__dict__"}) if hasattr(value, name)]
    held += getattr(value, "__dict__", {}).values()
    if isinstance(value, Mapping):
        return [*value.values(), *held]
    if isinstance(value, (set, frozenset)):
        return [*sorted(value, key=lambda part: tuple(getattr(part, "shape", ()))), *held]
    if isinstance(value, (list, tuple, Iterator)) or (not held and isinstance(value, Iterable)):
        return [*islice(value, MOST_ITEMS), *held]
    return held


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


def copied(model: Model, instead: Mapping[int, Tensor] | None = None) -> Model:
    """A deep copy; ``instead`` has, by identity, what takes the place of some of the model's tensors."""
    # Half of the time that copy.deepcopy would take goes into tables of hooks with nothing in them.
    values = [value for module in model.modules() for value in vars(module).values()]
    empty = {id(value): type(value)() for value in values if type(value) in (dict, OrderedDict) and not value}
    try:
        return copy.deepcopy(model, empty | dict(instead or {}))
    except (RuntimeError, TypeError) as error:
        raise SlimError(
            f"the model cannot be copied ({str(error).splitlines()[0]}); a module holds what "
            "copy.deepcopy cannot copy, such as a tensor with a gradient history: set it to None first"
        ) from error


def like(old: Tensor, new: Tensor) -> Tensor:
    """A parameter in place of a parameter, a plain tensor in place of a plain one."""
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
