"""One pass over the training data: the order of a step stands here."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slim import SlimError
from tracking.progress import progress

from .batch import Batch, network_input
from .batch_norm import average_statistics
from .distributed import World
from .interruption import Interruption
from .optimiser import enter_training
from .settings import TrainConfig
from .sparsity import Sparsity
from .state import EpochSums, TrainState

MAX_SKIPPED_STEPS = 20  # in a row: halving the scale as often takes any start value below 1

LossFunction = Callable[[Any, Tensor, Tensor], tuple[Tensor, Mapping[str, Tensor]]]


class Loader(Protocol):
    """A DataLoader or a list of batches."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


@dataclass
class Epoch:
    """What train_one_epoch needs besides the training's state; `so_far` and `stopped` say how far it came."""

    number: int
    config: TrainConfig
    device: torch.device
    caption: str
    interruption: Interruption
    so_far: EpochSums
    sparsity: Sparsity | None = None
    world: World = field(default_factory=World)
    stopped: bool = False
    started: float = field(default_factory=time.perf_counter)


def train_one_epoch(state: TrainState, loss_fn: LossFunction, batches: Loader, epoch: Epoch) -> dict[str, float]:
    """Train on `batches`, or on what is left of them; returns the means of the loss parts as "loss/<part>" and the last "lr".

    After an interruption it returns early. The host waits for the device once a step, to read the loss, its parts and the
    gradient's norm together.
    """
    model, optimizer, scaler, world = state.model, state.optimizer, state.scaler, epoch.world
    forward, half = state.ddp or model, state.dtype != torch.float32
    enter_training(model)
    lr, skipped_in_a_row = epoch.so_far.lr, 0
    silent = not world.is_first
    with progress(batches, desc=epoch.caption, total=len(batches), leave=False, disable=silent) as bar:
        for index, batch in enumerate(bar):
            if index < epoch.so_far.batches:  # done before an interruption
                continue
            lr = float(optimizer.param_groups[0]["lr"])
            where = f"epoch {epoch.number}, batch {index}"
            optimizer.zero_grad(set_to_none=True)
            with _explain_out_of_memory(batch, where, world):
                images = network_input(batch.images, epoch.device, channels_last=epoch.config.channels_last)
                with torch.autocast(epoch.device.type, state.dtype, enabled=half):
                    outputs = forward(images)
                    loss, parts = loss_fn(in_float32(outputs), batch.targets, images)
                # The mean of gradients over ranks, times their number, is the gradient of the sum of losses.
                scaler.scale(loss * world.size).backward()  # type: ignore[no-untyped-call]
            if not epoch.config.sync_bn:
                average_statistics(model, world)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), epoch.config.optim.clip_norm, foreach=True)
            loss_value, norm_value, *values = torch.stack([loss.detach(), norm, *parts.values()]).tolist()
            losses = dict(zip(parts, values, strict=True))
            if not math.isfinite(loss_value):
                raise SlimError(_not_finite(where, f"loss is {loss_value}", losses, lr))
            if not math.isfinite(norm_value):
                skipped_in_a_row += 1
                if not scaler.is_enabled() or skipped_in_a_row > MAX_SKIPPED_STEPS:
                    raise SlimError(_not_finite(where, f"gradient norm is {norm_value}", losses, lr))
                scaler.update()  # half precision overflowed: a smaller scale, and nothing else moves
                continue
            skipped_in_a_row = 0
            if epoch.sparsity is not None:
                epoch.sparsity.before_step(epoch.number)
            scaler.step(optimizer)
            state.scheduler.step()
            scaler.update()
            measured = None
            if epoch.sparsity is not None:
                epoch.sparsity.step(epoch.number, lr)
                if index + 1 == len(batches) and epoch.sparsity.is_active(epoch.number):
                    measured = epoch.sparsity.l1.strength_over_gradient()
            state.average.update_parameters(model)

            losses, epoch.stopped = world.mean_and_any(losses, epoch.interruption.wanted)
            epoch.so_far = epoch.so_far.plus(losses, index + 1, lr, measured)
            if not bar.disable:
                bar.set_postfix(epoch.so_far.means() | {"lr": f"{lr:.5f}"}, refresh=False)
            if epoch.stopped:
                break
    return {f"loss/{name}": mean for name, mean in epoch.so_far.means().items()} | {"lr": lr}


def in_float32(outputs: Any) -> Any:
    """A network's output, nested or not, for a loss in float32."""
    if isinstance(outputs, (list, tuple)):
        return [in_float32(output) for output in outputs]
    return outputs.float() if isinstance(outputs, Tensor) else outputs


@contextlib.contextmanager
def _explain_out_of_memory(batch: Batch, where: str, world: World) -> Iterator[None]:
    """Running out of memory, on a GPU or not, becomes one line that says what to try."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:  # a CPU's allocator raises RuntimeError
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
        if not known:
            raise
        size, (height, width) = len(batch.images), batch.images.shape[2:]
        remedy = "a smaller --img" if size == 1 else f"--batch-size {size // 2 * world.size}"
        raise SlimError(
            f"{where}: out of memory with {size * world.size} images of {width}x{height} pixels a step; try {remedy}; "
            "the last finished epoch is in weights/last.pt"
        ) from error


def _not_finite(where: str, what: str, losses: Mapping[str, float], lr: float) -> str:
    listed = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    return (
        f"{where}: {what} (parts: {listed}; lr {lr:.3g}), expected a finite number; stopped before the step, the last "
        "finished epoch is in weights/last.pt; lower --lr, train without half precision or check the labels"
    )
