"""Batch norms under several ranks: normalised over all of them, or each by itself with averaged running statistics."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .distributed import World

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


@contextlib.contextmanager
def synchronised_norms(model: nn.Module, world: World) -> Iterator[None]:
    """While entered, batch norms in training mode normalise over the batches of all ranks.

    They stay the modules that they are, so that whatever looks at the model (a checkpoint, a trace, a moving average)
    finds batch norms: only what they do with a batch is put before their class's forward. On GPUs that is torch's own
    SyncBatchNorm, which refuses tensors of the CPU. Do not move the model to another device meanwhile.
    """
    norms = _batch_norms(model, world)
    for norm in norms:
        fused = nn.SyncBatchNorm.convert_sync_batchnorm(norm)  # the same parameters and buffers
        norm.forward = functools.partial(_forward, norm, fused, world)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def average_statistics(model: nn.Module, world: World) -> None:
    """Make the running statistics of all ranks their mean, in place."""
    statistics = [
        statistic for norm in _batch_norms(model, world) for statistic in (norm.running_mean, norm.running_var)
    ]
    world.average(statistic for statistic in statistics if statistic is not None)


def _batch_norms(model: nn.Module, world: World) -> list[BatchNorm]:
    return [module for module in model.modules() if world.size > 1 and isinstance(module, BatchNorm)]


def _forward(norm: BatchNorm, fused: nn.Module, world: World, x: Tensor) -> Tensor:
    """The forward pass of one norm over the batches of all ranks."""
    if not norm.training:
        return type(norm).forward(norm, x)
    if x.is_cuda:
        joined: Tensor = fused.train()(x)
        return joined
    y, mean, variance = normalise(x, norm.weight, norm.bias, norm.eps, world)
    if norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
            norm.running_var.lerp_(variance.to(norm.running_var.dtype), share)
    return y


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, world: World
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation over all ranks (Ioffe and Szegedy 2015, arXiv:1502.03167), in float32.

    [B, C, ...] -> the same, with the mean [C] and the unbiased variance [C] of the whole batch. The gradient is that of
    the sum of all ranks' losses; those of weight and bias hold this rank's part.
    """
    values, dims, shape = x.float(), [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
    count = world.sum(torch.tensor(float(x.numel() // x.shape[1]), dtype=torch.float64)).item()
    mean = _SumOverRanks.apply(values.sum(dims), world) / count
    centred = values - mean.view(shape)
    variance = _SumOverRanks.apply(centred.square().sum(dims), world) / count
    scale = (variance + eps).rsqrt()
    y = centred * (scale if weight is None else scale * weight).view(shape)
    y = y if bias is None else y + bias.view(shape)
    return y.to(x.dtype), mean.detach(), variance.detach() * (count / max(count - 1, 1))


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks; its gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, world: World) -> Tensor:
        ctx.world = world
        return world.sum(tensor.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.world.sum(gradient.clone()), None
