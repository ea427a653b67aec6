"""One pass over the training data: the order of a step stands here."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slim import SlimError

from .batch import Batch, network_input
from .batch_norm import average_statistics
from .checkpoint import EpochSums, Trainee
from .distributed import World
from .freezing import enter_training
from .interruption import Interruption
from .memory import OUT_OF_MEMORY, batch_that_may_fit
from .settings import TrainConfig
from .sparsity import Sparsity

MAX_SKIPPED_STEPS = 20  # in a row: halving the scale as often takes any start value below 1

LossFunction = Callable[[Any, Tensor, Tensor], tuple[Tensor, Mapping[str, Tensor]]]


class Loader(Protocol):
    """A DataLoader or a list of batches."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


@dataclass
class Epoch:
    """What train_one_epoch needs besides the trainee."""

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


def train_one_epoch(trainee: Trainee, loss_fn: LossFunction, batches: Loader, epoch: Epoch) -> dict[str, float]:
    """One pass over `batches`, or what is left of it; returns the means of the loss parts as "loss/<part>" and the last "lr".

    After an interruption it returns early; `epoch.so_far` says how far it came.
    """
    model, optimizer, scaler, so_far = trainee.model, trainee.optimizer, trainee.scaler, epoch.so_far
    forward, world = trainee.parallel or model, epoch.world
    enter_training(model)
    lr, skipped_in_a_row = so_far.lr, 0
    with tqdm(
        batches, desc=epoch.caption, total=len(batches), leave=False, disable=None if world.is_first else True
    ) as bar:
        for index, batch in enumerate(bar):
            if index < so_far.batches:  # done before an interruption
                continue
            lr = float(optimizer.param_groups[0]["lr"])
            where = f"epoch {epoch.number}, batch {index}"
            with _naming_the_batch_size(batch, where, world):
                images, targets = _to_device(batch, epoch)
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast(epoch.device.type, trainee.dtype, enabled=trainee.dtype != torch.float32):
                    outputs = forward(images)
                    loss, parts = loss_fn(in_float32(outputs), targets, images)
                values = {name: float(part) for name, part in parts.items()}
                if not torch.isfinite(loss):
                    raise SlimError(_not_finite(where, f"loss is {float(loss.detach())}", values, lr))
                # The mean of gradients over ranks, times their number, is the gradient of the sum of losses.
                loss = loss if world.size == 1 else loss * world.size
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            if not epoch.config.sync_bn:
                average_statistics(model, world)
            scaler.unscale_(optimizer)
            norm = clip_gradients(model, epoch.config.optim.clip_norm)
            if not torch.isfinite(norm):
                skipped_in_a_row += 1
                if not scaler.is_enabled() or skipped_in_a_row > MAX_SKIPPED_STEPS:
                    raise SlimError(_not_finite(where, f"gradient norm is {float(norm)}", values, lr))
                scaler.update()  # half precision overflowed: a smaller scale, and nothing else moves
                continue
            skipped_in_a_row = 0
            scaler.step(optimizer)
            trainee.scheduler.step()
            scaler.update()
            if epoch.sparsity is not None:
                epoch.sparsity.step(epoch.number, lr)
            trainee.average.update_parameters(model)

            measured = None
            if epoch.sparsity is not None and index + 1 == len(batches):
                measured = epoch.sparsity.measured(epoch.number)
            values, epoch.stopped = world.agree(values, epoch.interruption.wanted)
            so_far = epoch.so_far = so_far.plus(values, index + 1, lr, measured)
            if not bar.disable:
                bar.set_postfix(so_far.means() | {"lr": f"{lr:.5f}"}, refresh=False)
            if epoch.stopped:
                break
    return {f"loss/{name}": mean for name, mean in so_far.means().items()} | {"lr": lr}


@contextlib.contextmanager
def _naming_the_batch_size(batch: Batch, where: str, world: World) -> Iterator[None]:
    """Out of memory, on a GPU or not, becomes one line that says what to try."""
    try:
        yield
    except OUT_OF_MEMORY as error:
        remedy = batch_that_may_fit(error, len(batch.images), tuple(batch.images.shape[2:]), world.size)
        if remedy is None:
            raise
        raise SlimError(f"{where}: {remedy}; the last finished epoch is in weights/last.pt") from error


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """The norm of all gradients, which are scaled down where it is larger than `max_norm`."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients, foreach=True)
    if norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / float(norm + 1e-6))
    return norm


def _to_device(batch: Batch, epoch: Epoch) -> tuple[Tensor, Tensor]:
    images = network_input(batch.images, epoch.device, channels_last=epoch.config.channels_last)
    return images, batch.targets.to(epoch.device, non_blocking=True)


def in_float32(outputs: Any) -> Any:
    """A network's output, nested or not, for a loss in float32."""
    if isinstance(outputs, Tensor):
        return outputs.float()
    if isinstance(outputs, (list, tuple)):
        return [in_float32(output) for output in outputs]
    return outputs


def _not_finite(where: str, what: str, parts: Mapping[str, float], lr: float) -> str:
    listed = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
    return (
        f"{where}: {what} (parts: {listed}; lr {lr:.3g}), expected a finite number; stopped before the step, the last "
        "finished epoch is in weights/last.pt; lower --lr, train without half precision or check the labels"
    )
