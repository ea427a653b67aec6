"""The proof that two networks compute the same: a masked one and a pruned one, one with gates and one without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from slim.errors import SlimError
from slim.forward import call_arguments, evaluation_mode, tensors_in

EXACT_TOLERANCE = 1e-6
"""What two networks may differ by in float64: a network can hold parts that compute in float32 all the same."""


def max_difference(first: nn.Module, second: nn.Module, inputs: Any) -> float:
    """Largest absolute difference between two models' outputs, over the largest magnitude of the first's.

    Both run in evaluation mode. Every floating tensor among the outputs is compared, and the largest ratio is returned;
    NaN where an output is NaN.

    Args:
        first: a model
        second: another model that takes the same inputs
        inputs: a tensor, a tuple of positional or a dictionary of keyword arguments

    Raises:
        SlimError: when the outputs differ in shape, and when there is nothing to compare among them.

    Examples:
        >>> import slim, torch
        >>> from torch import nn
        >>> one, two = nn.Identity(), nn.Threshold(0.5, 0.0)
        >>> slim.max_difference(one, two, torch.tensor([0.25, 1.0]))
        0.25
    """
    outputs = []
    with torch.no_grad(), evaluation_mode(first), evaluation_mode(second):
        for model in (first, second):
            args, kwargs = call_arguments(inputs)
            outputs.append([t for t in tensors_in(model(*args, **kwargs)) if t.is_floating_point() and t.numel()])
    shapes = [[tuple(t.shape) for t in found] for found in outputs]
    if shapes[0] != shapes[1]:
        raise SlimError(f"outputs differ in shape: {shapes[0]} and {shapes[1]}")
    if not outputs[0]:
        raise SlimError("the outputs hold no floating tensor with elements, so nothing could be compared")
    ratios = [
        (a.double() - b.double()).abs().max() / a.double().abs().max().clamp_min(1e-30)
        for a, b in zip(*outputs, strict=True)
    ]
    return float(torch.stack([ratio.cpu() for ratio in ratios]).max())


@dataclass(frozen=True)
class Proof:
    """How much two networks differ, relative to the largest output; ``in_float64`` where float32 alone did not tell."""

    difference: float
    in_float64: float | None = None

    def __str__(self) -> str:
        said = f"equal to {self.difference:.1e} of the largest output"
        return said if self.in_float64 is None else f"{said}, which is rounding: in float64 to {self.in_float64:.1e}"


def prove(
    first: nn.Module,
    second: nn.Module,
    inputs: Any,
    *,
    tolerance: float = 1e-4,
    remade: Callable[[nn.Module], nn.Module] | None = None,
) -> Proof:
    """Prove that two networks compute the same on some inputs.

    Where they differ by more than the tolerance, float64 tells rounding from a wrong cut, which differs as much in any
    precision: some networks magnify rounding, and a choice of the best (top-k, NMS) turns on the last digit of near-ties.

    Args:
        first: a network, such as ``slim.mask(model, plan)``
        second: the one that must equal it, such as ``slim.apply_plan(model, plan)``
        inputs: a tensor, a tuple of positional or a dictionary of keyword arguments; random numbers or real data, since zeros
            prove little
        tolerance: the largest difference that is accepted, relative to the largest output
        remade: makes ``second`` of ``first`` anew, in float64, where making it rounds weights

    Raises:
        SlimError: when they differ, and when there is nothing to compare among their outputs.

    Examples:
        >>> import slim, torch
        >>> from torch import nn
        >>> model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.rand(1, 3, 8, 8)
        >>> graph = slim.trace(model, x)
        >>> plan = slim.make_plan(graph, slim.score(model, graph, "l1"), macs=0.5, round_to=1, min_channels=1)
        >>> slim.prove(slim.mask(model, plan), slim.apply_plan(model, plan), x).difference < 1e-4
        True
    """
    difference = max_difference(first, second, inputs)
    if difference <= tolerance:
        return Proof(difference)
    wide = copy.deepcopy(first).double()
    again = copy.deepcopy(second).double() if remade is None else remade(wide)
    precise = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    told = f"the networks differ by {difference:.1e} of the largest output, expected at most {tolerance:g}"
    try:
        exact = max_difference(wide, again, precise)
    except RuntimeError as error:
        raise SlimError(f"{told}; they do not run in float64, which could tell rounding ({error})") from error
    if not exact <= EXACT_TOLERANCE:
        raise SlimError(f"{told} (in float64 {exact:.1e})")
    return Proof(difference, exact)
