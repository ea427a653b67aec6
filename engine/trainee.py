"""What a training is set up with: its configuration, and everything that its steps change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

import torch
from torch import nn

from slim import SlimError

from .checkpoint import Trainee
from .distributed import World
from .optimiser import OptimConfig, WeightAverage, build_optimizer, build_scheduler
from .precision import Precision, compute_dtype
from .sparsity import Sparsity


@dataclass(frozen=True)
class TrainConfig:
    """How long and how to train.

    Args:
        epochs: of the whole run, resumed epochs included
        optim: optimiser, schedule and moving average
        precision: of the forward pass and its gradients; weights, loss, statistics and gates are float32 throughout.
            "auto" is float16 on a GPU, bfloat16 on a CPU that multiplies it natively, else float32
        channels_last: memory format of images and convolutions
        eval_every: epochs between evaluations; the last epoch is always evaluated
        patience: epochs without a better AP after which training stops; 0 never stops early
        sync_bn: with several ranks, batch norms see the whole batch; otherwise each its rank's share, and their running
            statistics are averaged
        seed: of all random generators at the start of the run
    """

    epochs: int = 30
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: Precision = "auto"
    channels_last: bool = True
    eval_every: int = 1
    patience: int = 0
    sync_bn: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("eval_every", 1), ("patience", 0)):
            if getattr(self, name) < least:
                raise SlimError(f"{name}={getattr(self, name)}: expected at least {least}")
        if self.precision not in get_args(Precision):
            raise SlimError(f"precision={self.precision!r}: expected one of {', '.join(get_args(Precision))}")


def build_trainee(
    model: nn.Module,
    config: TrainConfig,
    steps_per_epoch: int,
    device: torch.device,
    sparsity: Sparsity | None,
    world: World | None = None,
) -> Trainee:
    """The model on its device in its memory format, with optimiser, schedule and moving average."""
    dtype = compute_dtype(config.precision, device)
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    parallel = world.parallel(model) if world is not None and world.size > 1 else None
    optimizer = build_optimizer(model, config.optim)
    return Trainee(
        model=model,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, config.optim, steps_per_epoch, config.epochs),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        average=WeightAverage(model, config.optim),
        dtype=dtype,
        mover=None if sparsity is None else sparsity.mover,
        parallel=parallel,
    )
