"""The training loop: `fit` owns epochs, `train_one_epoch` owns batches."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .batch import Batch, network_input
from .checkpoint import Progress, Trainee, pack_training_state, seed_generators, unpack_training_state
from .errors import EngineError
from .evaluation import Evaluation
from .optimiser import OptimConfig, WeightAverage, build_optimizer, build_scheduler
from .run_folder import RunFolder

LOGGER = logging.getLogger(__name__)

MAX_SKIPPED_STEPS = 20  # in a row: halving the scale as often takes any start value below 1
CLOSED_SHARE_TOLERANCE = 0.01

LossFunction = Callable[[Any, Tensor], tuple[Tensor, Mapping[str, Tensor]]]
SaveFunction = Callable[[Path, nn.Module, "dict[str, Any] | None"], None]


class Pull(Protocol):
    """What sparse training adds to a step; `slim.SmallestHalfL1` is one."""

    def step(self, lr: float) -> None: ...  # move the gates, keep them >= 0
    def project(self) -> None: ...  # only keep them >= 0
    def penalty(self) -> float: ...  # sum of |gate| over the half that is pulled
    def closed_share(self) -> float: ...  # 0..1
    def gates(self) -> dict[str, Tensor]: ...


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
        amp: half precision where the device is a GPU
        channels_last: memory format of images and convolutions
        eval_every: epochs between evaluations; the last epoch is always evaluated
        seed: of all random generators at the start of the run
    """

    epochs: int = 30
    optim: OptimConfig = field(default_factory=OptimConfig)
    amp: bool = True
    channels_last: bool = True
    eval_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "eval_every"):
            if getattr(self, name) < 1:
                raise EngineError(f"{name}={getattr(self, name)}: expected at least 1")


@dataclass(frozen=True)
class FitResult:
    """APs (0..1) are None when nothing was evaluated, closed_share without a pull. `seconds` are this call's."""

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
    pull: Pull | None = None,
    pull_from: int = 0,
    resume_state: dict[str, Any] | None = None,
) -> FitResult:
    """Train `model` in place (it is moved to `device`); weights/last.pt is written at the end of each epoch.

    `loss_fn(outputs, targets)` gives the scalar to minimise and its detached parts. `evaluate` gets the moving
    average of the weights, which is also what `save(path, model, training_state)` writes; best.pt has no training
    state. With a `pull` an epoch can only be the best while its share of closed gates is about the largest seen:
    the AP before the gates close is of no use to a cut. The pull acts from epoch `pull_from` on.

    A run that stopped continues bit for bit from `resume_state` (see `read_training_state`).
    Raises EngineError when a loss or gradient is not finite, before the step that it would have spoiled; what
    weights/last.pt holds then, and after Ctrl-C, is the last finished epoch.
    """
    started = time.perf_counter()
    device = torch.device(device)
    if len(train_loader) == 0:
        raise EngineError("the training loader has no batch: check the data set's train split and --batch-size")
    seed_generators(config.seed)
    trainee = _build_trainee(model, config, len(train_loader), device)
    progress = Progress() if resume_state is None else unpack_training_state(resume_state, trainee)
    run.drop_rows_from(progress.next_epoch)
    try:
        for number in range(progress.next_epoch, config.epochs):
            epoch_started = time.perf_counter()
            _announce_epoch(train_loader, number)
            epoch = Epoch(number, config, device, _pull_of_epoch(pull, number >= pull_from), _caption(progress, pull))
            losses = train_one_epoch(trainee, loss_fn, train_loader, epoch)
            evaluation = None
            if evaluate is not None and ((number + 1) % config.eval_every == 0 or number + 1 == config.epochs):
                evaluation = evaluate(trainee.average.module)
            progress, is_best = _advance(progress, number, evaluation, pull)
            if pull is not None:
                losses["loss/l1"] = pull.penalty()
            _record(run, number, losses, evaluation, pull, time.perf_counter() - epoch_started)
            if is_best:
                _save(save, run.best, trainee.average.module, None)
            # last.pt comes last: it is what declares the epoch finished.
            _save(save, run.last, trainee.average.module, pack_training_state(trainee, progress))
    finally:
        run.close()
    return FitResult(
        best_ap=progress.best_ap,
        best_epoch=progress.best_epoch,
        last_ap=progress.last_ap,
        epochs=config.epochs,
        closed_share=None if pull is None else pull.closed_share(),
        seconds=time.perf_counter() - started,
    )


def train_one_epoch(trainee: Trainee, loss_fn: LossFunction, batches: Loader, epoch: Epoch) -> dict[str, float]:
    """One pass over `batches`; returns the means of the loss parts as "loss/<part>" and the last "lr"."""
    model, optimizer, scaler = trainee.model, trainee.optimizer, trainee.scaler
    model.train()
    sums: dict[str, float] = {}
    lr, steps, skipped_in_a_row = 0.0, 0, 0
    with tqdm(batches, desc=epoch.caption, total=len(batches), leave=False, disable=None) as bar:
        for index, batch in enumerate(bar):
            images, targets = _to_device(batch, epoch)
            lr = float(optimizer.param_groups[0]["lr"])
            where = f"epoch {epoch.number}, batch {index}"

            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(epoch.device.type, enabled=scaler.is_enabled()):
                outputs = model(images)
            loss, parts = loss_fn(_in_float32(outputs), targets)
            values = {name: float(part) for name, part in parts.items()}
            if not torch.isfinite(loss):
                raise EngineError(_not_finite(where, f"loss is {float(loss.detach())}", values, lr))
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), epoch.config.optim.clip_norm)
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

            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value
            steps += 1
            if not bar.disable:
                bar.set_postfix(_means(sums, steps) | {"lr": f"{lr:.5f}"}, refresh=False)
    return {f"loss/{name}": mean for name, mean in _means(sums, steps).items()} | {"lr": lr}


def _means(sums: Mapping[str, float], steps: int) -> dict[str, Any]:
    return {name: total / max(1, steps) for name, total in sums.items()}


def _build_trainee(model: nn.Module, config: TrainConfig, steps_per_epoch: int, device: torch.device) -> Trainee:
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config.optim)
    return Trainee(
        model=model,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, config.optim, steps_per_epoch, config.epochs),
        scaler=torch.amp.GradScaler(device.type, enabled=config.amp and device.type == "cuda"),
        average=WeightAverage(model, config.optim),
    )


def _announce_epoch(loader: Loader, number: int) -> None:
    """Augmentation and order depend on (seed, epoch) alone, so that a resumed run sees the same batches."""
    for holder in (getattr(loader, "dataset", None), getattr(loader, "sampler", None)):
        set_epoch = getattr(holder, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(number)


def _pull_of_epoch(pull: Pull | None, active: bool) -> Callable[[float], None]:
    if pull is None:
        return lambda lr: None
    gates = pull
    return gates.step if active else lambda lr: gates.project()


def _to_device(batch: Batch, epoch: Epoch) -> tuple[Tensor, Tensor]:
    images = network_input(batch.images, epoch.device, channels_last=epoch.config.channels_last)
    return images, batch.targets.to(epoch.device, non_blocking=True)


def _in_float32(outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs.float()
    if isinstance(outputs, (list, tuple)):
        return [_in_float32(output) for output in outputs]
    return outputs


def _not_finite(where: str, what: str, parts: Mapping[str, float], lr: float) -> str:
    listed = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
    return (
        f"{where}: {what} (parts: {listed}; lr {lr:.3g}), expected a finite number; stopped before the step, the last "
        "finished epoch is in weights/last.pt; lower --lr, train without half precision or check the labels"
    )


def _advance(
    progress: Progress, number: int, evaluation: Evaluation | None, pull: Pull | None
) -> tuple[Progress, bool]:
    progress = replace(progress, next_epoch=number + 1)
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
    losses: dict[str, float],
    evaluation: Evaluation | None,
    pull: Pull | None,
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
    shown = [f"{name.removeprefix('loss/')} {value:.4g}" for name, value in losses.items()]
    shown += [] if evaluation is None else [f"AP {evaluation.ap:.4f}", f"AP50 {evaluation.ap50:.4f}"]
    shown += [] if closed is None else [f"closed {closed:.1%}"]
    LOGGER.info("epoch %d: %s (%.1f s)", number, ", ".join(shown), seconds)


def _caption(progress: Progress, pull: Pull | None) -> str:
    caption = f"epoch {progress.next_epoch}"
    if progress.best_ap is not None:
        caption += f", best AP {progress.best_ap:.3f}"
    return caption if pull is None else f"{caption}, closed {pull.closed_share():.1%}"


def _save(save: SaveFunction, path: Path, model: nn.Module, state: dict[str, Any] | None) -> None:
    try:
        save(path, model, state)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise EngineError(
            f"{path}: cannot be written ({reason}); the file of the epoch before is kept; free disk space and resume"
        ) from error
