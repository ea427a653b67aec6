"""Batch norms under several ranks: normalised over all of them, or each by itself with averaged running statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .distributed import World

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


@contextlib.contextmanager
def synchronised_norms(model: nn.Module, world: World) -> Iterator[None]:
    """While entered, batch norms in training mode normalise over the batches of all ranks.

    They stay the modules that they are, so that whatever looks at the model (a checkpoint, a trace, a moving average)
    finds batch norms: only what they do with a batch is put before their class's forward. On GPUs that is torch's own
    SyncBatchNorm, which refuses tensors of the CPU. Do not move the model to another device meanwhile.
    """
    norms = batch_norms(model) if world.size > 1 else []
    for norm in norms:
        norm.forward = _OverAllRanks(norm, world)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def average_statistics(model: nn.Module, world: World) -> None:
    """Make the running statistics of all ranks their mean, in place."""
    norms = batch_norms(model) if world.size > 1 else []
    statistics = [statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)]
    world.average(statistic for statistic in statistics if statistic is not None)


def batch_norms(model: nn.Module) -> list[BatchNorm]:
    return [module for module in model.modules() if isinstance(module, BATCH_NORMS)]


class _OverAllRanks:
    """The forward pass of one norm."""

    def __init__(self, norm: BatchNorm, world: World) -> None:
        self.norm, self.world = norm, world
        self.fused = nn.SyncBatchNorm.convert_sync_batchnorm(norm)  # the same parameters and buffers

    def __call__(self, x: Tensor) -> Tensor:
        norm = self.norm
        if not norm.training:
            return type(norm).forward(norm, x)
        if x.is_cuda:
            joined: Tensor = self.fused.train()(x)
            return joined
        weight = x.new_ones(x.shape[1]) if norm.weight is None else norm.weight
        bias = x.new_zeros(x.shape[1]) if norm.bias is None else norm.bias
        y, mean, variance, count = _Normalise.apply(x, weight, bias, norm.eps, self.world)
        self._remember(mean, variance * count / (count - 1).clamp(min=1))
        result: Tensor = y
        return result

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        norm = self.norm
        if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
            return
        norm.num_batches_tracked.add_(1)
        share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
        norm.running_var.lerp_(variance.to(norm.running_var.dtype), share)


class _Normalise(torch.autograd.Function):
    """Batch normalisation over all ranks (Ioffe and Szegedy 2015, arXiv:1502.03167, with sums over ranks in its gradient).

    [B, C, ...] -> the same, and the batch's mean and biased variance in float64 [C] with the count behind them. The
    gradient is that of the sum of all ranks' losses; those of weight and bias hold this rank's part.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, world: World) -> tuple[Tensor, ...]:
        own = x.float()
        dims = [0, *range(2, x.ndim)]
        count = x.numel() // x.shape[1]
        variance, mean = (t.double() for t in torch.var_mean(own, dims, correction=0))
        # In float64, the mean of squares less the squared mean cancels nothing that float32 had.
        sums = torch.cat((mean * count, (variance + mean.square()) * count, mean.new_tensor([count])))
        mean, squares, total = world.sum(sums).split([x.shape[1], x.shape[1], 1])
        mean, squares = mean / total, squares / total
        variance = (squares - mean.square()).clamp(min=0)
        scale = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale, total)
        ctx.world = world
        ctx.mark_non_differentiable(mean, variance, total)
        y = (own - _across(mean, x)) * _across(scale * weight, x) + _across(bias, x)
        return y.to(x.dtype), mean, variance, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, total = ctx.saved_tensors
        slope, dims = slope.float(), [0, *range(2, x.ndim)]
        normalised = (x.float() - _across(mean, x)) * _across(scale, x)
        of_bias, of_weight = slope.sum(dims), (slope * normalised).sum(dims)
        means = ctx.world.sum(torch.cat((of_bias, of_weight)).double()) / total
        along, across = means.split(x.shape[1])
        of_x = (slope - _across(along, x) - normalised * _across(across, x)) * _across(scale * weight, x)
        return of_x.to(x.dtype), of_weight.to(weight.dtype), of_bias.to(weight.dtype), None, None


def _across(values: Tensor, x: Tensor) -> Tensor:
    """One float32 for each channel of x."""
    return values.float().view(1, -1, *[1] * (x.ndim - 2))
