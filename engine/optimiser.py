"""Optimiser, learning-rate schedule and moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, update_bn

from slim import NORMS, SlimError, gate_parameters

from .settings import OptimConfig

MAX_WARMUP_SHARE = 0.1  # of all steps: a short run on a small data set must not spend itself warming up

_Tensors = tuple[Tensor, ...] | list[Tensor]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Two parameter groups, "decayed" and "plain" (norms, biases, gates); frozen parameters are in neither."""
    never_decayed = {id(parameter) for parameter in gate_parameters(model)}
    for module in model.modules():
        if isinstance(module, NORMS):
            never_decayed.update(id(parameter) for parameter in module.parameters(recurse=False))
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_weight = parameter.ndim > 1 and id(parameter) not in never_decayed
            (decayed if is_weight else plain).append(parameter)
    if not decayed and not plain:
        raise SlimError("the model has no parameter that requires a gradient: nothing can be trained")
    groups = [
        {"name": "decayed", "params": decayed, "weight_decay": config.weight_decay},
        {"name": "plain", "params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), weight_decay=0.0, fused=True)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)


def learning_rate_factor(config: OptimConfig, steps_per_epoch: int, epochs: int) -> Callable[[int], float]:
    """The factor on `config.lr` at each optimiser step, counted from 0: warm-up times decay."""
    total = max(1, steps_per_epoch * epochs)
    warmup = round(min(config.warmup_epochs * steps_per_epoch, MAX_WARMUP_SHARE * total))

    def factor(step: int) -> float:
        progress = min(step / max(1, total - 1), 1.0)
        remaining = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        decay = config.final_lr_ratio + (1 - config.final_lr_ratio) * remaining
        return decay * min(1.0, (step + 1) / (warmup + 1))

    return factor


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: OptimConfig, steps_per_epoch: int, epochs: int
) -> LambdaLR:
    """To be stepped once after every optimiser step."""
    return LambdaLR(optimizer, learning_rate_factor(config, steps_per_epoch, epochs))


def learning_rate_sum(config: OptimConfig, steps_per_epoch: int, epochs: int, from_epoch: int = 0) -> float:
    """Sum of the learning rates of all steps from `from_epoch` on: what `slim.strength_for` wants."""
    factor = learning_rate_factor(config, steps_per_epoch, epochs)
    return sum(config.lr * factor(step) for step in range(from_epoch * steps_per_epoch, epochs * steps_per_epoch))


class WeightAverage(AveragedModel):
    """Exponential moving average of weights and statistics in `.module`; gates are copied, not averaged.

    An averaged gate would approach 0 without reaching it, and the network that is saved and cut would be
    another than the one whose gates were closed.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        super().__init__(model, use_buffers=True)
        self._average = _ramped_average(config)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move towards `model`; call once after every optimiser step."""
        gates = {id(gate) for gate in gate_parameters(self.module)}
        moved: tuple[list[Tensor], list[Tensor]] = [], []
        copied: tuple[list[Tensor], list[Tensor]] = [], []
        for old, new in zip(tensors_of(self.module), tensors_of(model), strict=True):
            averaged, current = moved if old.is_floating_point() and id(old) not in gates else copied
            averaged.append(old)
            current.append(new)
        if self.n_averaged == 0:
            torch._foreach_copy_(moved[0], moved[1])
        else:
            self._average(*moved, int(self.n_averaged))
        torch._foreach_copy_(*copied)
        self.n_averaged += 1


def recalibrate(model: nn.Module, images: Iterable[Tensor], device: torch.device | str) -> None:
    """Re-estimate the statistics of all batch norms as the mean over batches of `images`; in place, moves to `device`.

    images: float [B, 3, H, W] in 0..1. What a cut of open channels leaves has other statistics than the network before.
    """
    update_bn(images, model.to(device), torch.device(device))


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, then buffers."""
    yield from model.parameters()
    yield from model.buffers()


def _ramped_average(config: OptimConfig) -> Callable[[_Tensors, _Tensors, int], None]:
    def average(averaged: _Tensors, current: _Tensors, num_averaged: int) -> None:
        decay = config.ema_decay * (1 - math.exp(-(num_averaged + 1) / config.ema_warmup_steps))
        torch._foreach_lerp_(averaged, current, 1 - decay)

    return average
