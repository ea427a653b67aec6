"""Everything that the steps of a training change, set up by its configuration."""

from __future__ import annotations

import torch
from torch import nn

from .checkpoint import Trainee
from .distributed import World
from .optimiser import WeightAverage, build_optimizer, build_scheduler
from .precision import compute_dtype
from .settings import TrainConfig
from .sparsity import Sparsity


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
