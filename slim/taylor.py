"""Gradient * weight of a loss, batch by batch, on a model that is left as it was: what the Taylor criterion adds up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slim.errors import SlimError
from slim.propagate import evaluation_mode

Loss = Callable[[nn.Module, Any], Tensor]
"""From the model and a batch to a scalar that depends on the model's weights."""
Place = tuple[str, int]
"""An axis of a parameter: (name, axis)."""


@contextmanager
def differentiable(model: nn.Module, tensors: Mapping[Place, Tensor]) -> Iterator[None]:
    """Evaluation mode, with gradients for ``tensors``; flags, buffers and random state are put back as they were."""
    flags = [(tensor, tensor.requires_grad) for tensor in tensors.values()]
    tables = [module._buffers for module in model.modules()]
    buffers = [(table, key, b, b.clone()) for table in tables for key, b in table.items() if b is not None]
    devices = sorted({tensor.device.index for tensor in tensors.values() if tensor.is_cuda})
    try:
        with evaluation_mode(model), torch.random.fork_rng(devices=devices):
            for tensor in tensors.values():
                tensor.requires_grad_(True)
            yield
    finally:
        for tensor, flag in flags:
            tensor.requires_grad_(flag)
        with torch.no_grad():
            for table, key, buffer, value in buffers:
                table[key] = buffer.copy_(value)


def position_sums(
    model: nn.Module, tensors: Mapping[Place, Tensor], batch: Any, number: int, loss: Loss
) -> dict[Place, Tensor]:
    """Sum of gradient * weight over all that lies at each position of an axis, [positions], float64 on the CPU.

    0 for parameters that the loss does not reach. To be called within ``differentiable``.
    """
    with torch.enable_grad():
        value = loss(model, batch)
    check_loss(value, number)
    gradients = torch.autograd.grad(value, list(tensors.values()), allow_unused=True)
    sums = {}
    for ((name, axis), tensor), gradient in zip(tensors.items(), gradients, strict=True):
        if gradient is None:
            sums[name, axis] = torch.zeros(tensor.shape[axis], dtype=torch.float64)
        else:
            product = gradient.double() * tensor.detach().double()
            sums[name, axis] = product.movedim(axis, 0).reshape(tensor.shape[axis], -1).sum(1).cpu()
    return sums


def check_loss(value: Any, number: int) -> None:
    """SlimError unless a loss can be differentiated."""
    start = f"the loss of batch {number} (counted from 1)"
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"has shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"is a {type(value).__name__}"
        raise SlimError(f"{start} {found}; loss must return a scalar tensor: a mean or a sum, without .item()")
    if not bool(torch.isfinite(value)):
        raise SlimError(f"{start} is {value.item()}; use a model whose training is finite, and clean data")
    if not value.requires_grad:
        raise SlimError(
            f"{start} has no gradient; compute it from model(...), without no_grad, inference_mode or detach"
        )
