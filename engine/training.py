"""The training loop: `fit` owns epochs, `train_one_epoch` owns batches."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slim import SmallestHalfL1, closed_gates_at_zero

from .batch import Batch, network_input
from .batch_norm import average_statistics, synchronised_norms
from .checkpoint import (
    EpochSums,
    Progress,
    Trainee,
    pack_training_state,
    seed_generators,
    unpack_carried_state,
    unpack_training_state,
)
from .distributed import World
from .errors import EngineError
from .evaluation import Evaluation
from .freezing import enter_training
from .interruption import Interruption
from .memory import OUT_OF_MEMORY, batch_that_may_fit
from .optimiser import OptimConfig, WeightAverage, build_optimizer, build_scheduler
from .precision import Precision, compute_dtype
from .run_folder import RunFolder

LOGGER = logging.getLogger(__name__)

MAX_SKIPPED_STEPS = 20  # in a row: halving the scale as often takes any start value below 1
CLOSED_SHARE_TOLERANCE = 0.01

LossFunction = Callable[[Any, Tensor, Tensor], tuple[Tensor, Mapping[str, Tensor]]]
SaveFunction = Callable[[Path, nn.Module, "dict[str, Any] | None"], None]


class Pulling(Protocol):
    """What sparse training does to the gates after a step: `slim.SmallestHalfL1` or `slim.ClosedShareController`."""

    def step(self, lr: float) -> None: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Sparsity:
    """The sparse part of a training.

    Args:
        pull: measures the gates; with `by` absent it also moves them
        by: what takes the step in the pull's place, such as a controller of its strength
        from_epoch: first epoch in which gates are pulled; before it, and with None in all epochs, they are only kept at or
            above 0
    """

    pull: SmallestHalfL1
    by: Pulling | None = None
    from_epoch: int | None = 0

    @property
    def mover(self) -> Pulling:
        return self.by or self.pull

    def pulls_in(self, epoch: int) -> bool:
        return self.from_epoch is not None and epoch >= self.from_epoch


class Loader(Protocol):
    """A DataLoader or a list of batches."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


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
                raise EngineError(f"{name}={getattr(self, name)}: expected at least {least}")
        if self.precision not in get_args(Precision):
            raise EngineError(f"precision={self.precision!r}: expected one of {', '.join(get_args(Precision))}")


@dataclass(frozen=True)
class FitResult:
    """APs (0..1) are None when nothing was evaluated, closed_share without a pull.

    `epochs` are those that were trained, fewer than planned after an early stop; `seconds` are this call's.
    """

    best_ap: float | None
    best_epoch: int | None
    last_ap: float | None
    epochs: int
    closed_share: float | None
    seconds: float


@dataclass
class Epoch:
    """What train_one_epoch needs besides the trainee."""

    number: int
    config: TrainConfig
    device: torch.device
    pull: Callable[[float], None]
    caption: str
    interruption: Interruption
    so_far: EpochSums
    measure: Callable[[], float | None] = lambda: None
    world: World = field(default_factory=World)
    stopped: bool = False
    started: float = field(default_factory=time.perf_counter)


def fit(
    model: nn.Module,
    loss_fn: LossFunction,
    train_loader: Loader,
    *,
    config: TrainConfig,
    run: RunFolder,
    save: SaveFunction,
    device: torch.device | str,
    evaluate: Callable[[nn.Module], Evaluation] | None = None,
    sparsity: Sparsity | None = None,
    resume_state: dict[str, Any] | None = None,
    carried_state: dict[str, Any] | None = None,
    world: World | None = None,
) -> FitResult:
    """Train `model` in place (it is moved to `device`); weights/last.pt is written at the end of each epoch.

    `loss_fn(outputs, targets, images)` gives the scalar to minimise and its detached parts, from FP32 outputs and the
    images as the network saw them, under the autocast of the forward pass. Parameters that require no gradient are
    frozen, and with those of a norm its statistics (see `freeze`). `evaluate` gets the moving average of the weights,
    which is also what `save(path, model, training_state)` writes; best.pt has no training state. With `sparsity` an
    epoch can only be the best while its share of closed gates is about the largest seen: the AP before the gates close
    is of no use to a cut.

    A run that stopped continues bit for bit from `resume_state` (see `read_training_state`). A new run may take
    optimiser state and moving average over from an earlier one with `carried_state` (see `pack_carried_state`).

    In a `world` of several ranks all call this with the same arguments, each with its share of the batches; `loss_fn`
    gives a rank's part of the loss, of which the sum is minimised, and the parts' means are reported. Rank 0 alone
    evaluates, writes and speaks, the others follow what it found: its AP is then that of one process to the last bit.
    Interrupted on any rank, all stop after the same step.

    The first Ctrl-C or SIGTERM finishes the step, saves weights/last.pt there, in the middle of the epoch, and raises
    KeyboardInterrupt; a second one leaves at once. Raises EngineError when a loss or gradient is not finite, before the
    step that it would have spoiled, and when memory runs out; weights/last.pt then holds the last finished epoch.
    """
    started = time.perf_counter()
    device, world = torch.device(device), world or World()
    if len(train_loader) == 0:
        raise EngineError("the training loader has no batch: check the data set's train split and --batch-size")
    seed_generators(config.seed + world.rank)
    trainee = build_trainee(model, config, len(train_loader), device, sparsity, world)
    progress = Progress()
    if resume_state is not None:
        progress = unpack_training_state(resume_state, trainee, world)
    elif carried_state is not None:
        unpack_carried_state(carried_state, trainee)
    if world.is_first:
        run.drop_rows_from(progress.next_epoch)
    pull = None if sparsity is None else sparsity.pull
    norms = synchronised_norms(model, world) if config.sync_bn else contextlib.nullcontext()
    with Interruption() as interruption, norms, contextlib.closing(run):
        while progress.next_epoch < config.epochs and not _out_of_patience(progress, config):
            number = progress.next_epoch
            announce_epoch(train_loader, number)
            caption = _caption(progress, pull)
            mover = _pull_of_epoch(sparsity, number)
            measure = _pull_over_gradient(sparsity, number)
            epoch = Epoch(number, config, device, mover, caption, interruption, progress.so_far, measure, world)
            losses = train_one_epoch(trainee, loss_fn, train_loader, epoch)
            if epoch.stopped:
                _save_state(save, run, trainee, replace(progress, so_far=epoch.so_far), world)
                raise KeyboardInterrupt(
                    f"stopped after batch {epoch.so_far.batches} of epoch {number}; the state is in {run.last}"
                )
            progress = world.from_first(
                functools.partial(_conclude_epoch, trainee, losses, epoch, progress, run, save, evaluate, sparsity)
            )
            # last.pt comes last: it is what declares the epoch finished.
            _save_state(save, run, trainee, progress, world)
    if progress.next_epoch < config.epochs and world.is_first:
        LOGGER.info(
            "stopped after epoch %d: no better AP since epoch %s (patience %d)",
            *(progress.next_epoch - 1, progress.best_epoch, config.patience),
        )
    return FitResult(
        best_ap=progress.best_ap,
        best_epoch=progress.best_epoch,
        last_ap=progress.last_ap,
        epochs=progress.next_epoch,
        closed_share=None if pull is None else pull.closed_share(),
        seconds=time.perf_counter() - started,
    )


def _conclude_epoch(
    trainee: Trainee,
    losses: Mapping[str, float | None],
    epoch: Epoch,
    progress: Progress,
    run: RunFolder,
    save: SaveFunction,
    evaluate: Callable[[nn.Module], Evaluation] | None,
    sparsity: Sparsity | None,
) -> Progress:
    """Evaluate what the epoch left, record it, and keep it where it is the best."""
    model, config, number = trainee.average.module, epoch.config, epoch.number
    pull = None if sparsity is None else sparsity.pull
    evaluation = masked = None
    if evaluate is not None and ((number + 1) % config.eval_every == 0 or number + 1 == config.epochs):
        if sparsity is not None and sparsity.from_epoch is not None:
            masked = _masked_ap(model, evaluate)
        evaluation = evaluate(model)
    progress, is_best = _advance(progress, number, evaluation, pull)
    extra = _sparsity_scalars(sparsity, number, epoch.so_far.measured, evaluation, masked)
    _record(run, number, {**losses, **extra}, evaluation, pull, time.perf_counter() - epoch.started)
    if is_best:
        _save(save, run.best, model, None)
    return progress


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
                    raise EngineError(_not_finite(where, f"loss is {float(loss.detach())}", values, lr))
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
                    raise EngineError(_not_finite(where, f"gradient norm is {float(norm)}", values, lr))
                scaler.update()  # half precision overflowed: a smaller scale, and nothing else moves
                continue
            skipped_in_a_row = 0
            scaler.step(optimizer)
            trainee.scheduler.step()
            scaler.update()
            epoch.pull(lr)
            trainee.average.update_parameters(model)

            measured = epoch.measure() if index + 1 == len(batches) else None
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
        raise EngineError(f"{where}: {remedy}; the last finished epoch is in weights/last.pt") from error


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """The norm of all gradients, which are scaled down where it is larger than `max_norm`."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients, foreach=True)
    if norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / float(norm + 1e-6))
    return norm


def _out_of_patience(progress: Progress, config: TrainConfig) -> bool:
    since = progress.next_epoch - 1 - (progress.best_epoch if progress.best_epoch is not None else config.epochs)
    return 0 < config.patience <= since


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


def announce_epoch(loader: Loader, number: int) -> None:
    """Augmentation and order depend on (seed, epoch) alone, so that a resumed run sees the same batches."""
    for holder in (getattr(loader, "dataset", None), getattr(loader, "sampler", None)):
        set_epoch = getattr(holder, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(number)


def _pull_of_epoch(sparsity: Sparsity | None, number: int) -> Callable[[float], None]:
    if sparsity is None:
        return lambda lr: None
    return sparsity.mover.step if sparsity.pulls_in(number) else lambda lr: sparsity.pull.project()


def _masked_ap(model: nn.Module, evaluate: Callable[[nn.Module], Evaluation]) -> float | None:
    """AP with closed gates at exactly 0, which is what a cut of them leaves; None where they all are 0 already."""
    with closed_gates_at_zero(model) as changed:
        return evaluate(model).ap if changed else None


def _pull_over_gradient(sparsity: Sparsity | None, number: int) -> Callable[[], float | None]:
    if sparsity is None or not sparsity.pulls_in(number):
        return lambda: None
    return sparsity.pull.against_gradient


def _sparsity_scalars(
    sparsity: Sparsity | None,
    number: int,
    measured: float | None,
    evaluation: Evaluation | None,
    masked_ap: float | None,
) -> dict[str, float | None]:
    """Whether it is sparse enough, and whether the pull is strong enough: TensorBoard's scalars."""
    if sparsity is None or sparsity.from_epoch is None:
        return {}
    plain = None if evaluation is None else evaluation.ap
    return {
        "loss/l1": sparsity.pull.penalty(),
        "gates/strength": sparsity.pull.strength if sparsity.pulls_in(number) else 0.0,
        "gates/pull_over_gradient": measured,
        "metrics/masked_ap": plain if masked_ap is None else masked_ap,
    }


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


def _advance(
    progress: Progress, number: int, evaluation: Evaluation | None, pull: SmallestHalfL1 | None
) -> tuple[Progress, bool]:
    progress = replace(progress, next_epoch=number + 1, so_far=EpochSums())
    if evaluation is None:
        return progress, False
    progress = replace(progress, last_ap=evaluation.ap)
    closed = 0.0 if pull is None else pull.closed_share()
    more_closed = closed > progress.best_closed_share + CLOSED_SHARE_TOLERANCE
    as_closed = closed >= progress.best_closed_share - CLOSED_SHARE_TOLERANCE
    is_best = progress.best_ap is None or more_closed or (as_closed and evaluation.ap > progress.best_ap)
    if is_best:
        most_closed = max(closed, progress.best_closed_share)
        progress = replace(progress, best_ap=evaluation.ap, best_epoch=number, best_closed_share=most_closed)
    return progress, is_best


def _record(
    run: RunFolder,
    number: int,
    losses: dict[str, float | None],
    evaluation: Evaluation | None,
    pull: SmallestHalfL1 | None,
    seconds: float,
) -> None:
    closed = None if pull is None else pull.closed_share()
    metrics = {
        "metrics/ap": None if evaluation is None else evaluation.ap,
        "metrics/ap50": None if evaluation is None else evaluation.ap50,
        "metrics/ap75": None if evaluation is None else evaluation.ap75,
    }
    scalars = losses | metrics | {"gates/closed_share": closed}
    run.log_scalars(scalars, number)
    if pull is not None:
        run.log_gates(pull.gates(), number)
    run.append_row({"epoch": number, **scalars, "seconds": round(seconds, 3)})
    labels = {"gates/pull_over_gradient": "pull/gradient", "metrics/masked_ap": "masked AP"}
    shown = [
        f"{labels.get(name, name.removeprefix('loss/').removeprefix('gates/'))} {value:.4g}"
        for name, value in losses.items()
        if value is not None
    ]
    shown += [] if evaluation is None else [f"AP {evaluation.ap:.4f}", f"AP50 {evaluation.ap50:.4f}"]
    shown += [] if closed is None else [f"closed {closed:.1%}"]
    LOGGER.info("epoch %d: %s (%.1f s)", number, ", ".join(shown), seconds)


def _caption(progress: Progress, pull: SmallestHalfL1 | None) -> str:
    caption = f"epoch {progress.next_epoch}"
    if progress.best_ap is not None:
        caption += f", best AP {progress.best_ap:.3f}"
    return caption if pull is None else f"{caption}, closed {pull.closed_share():.1%}"


def _save_state(save: SaveFunction, run: RunFolder, trainee: Trainee, progress: Progress, world: World) -> None:
    """weights/last.pt, which is there on all ranks when this ends."""
    state = pack_training_state(trainee, progress, world)
    if world.is_first:
        _save(save, run.last, trainee.average.module, state)
    world.barrier()


def _save(save: SaveFunction, path: Path, model: nn.Module, state: dict[str, Any] | None) -> None:
    try:
        save(path, model, state)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise EngineError(
            f"{path}: cannot be written ({reason}); the file of the epoch before is kept; free disk space and resume"
        ) from error
