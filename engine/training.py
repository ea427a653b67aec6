"""The training loop: `fit` owns epochs, `train_one_epoch` (epoch.py) owns batches."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slim import SlimError, SmallestHalfL1
from tracking.run_folder import RunFolder

from .batch_norm import synchronised_norms
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
from .epoch import Epoch, Loader, LossFunction, train_one_epoch
from .evaluation import Evaluation
from .interruption import Interruption
from .settings import TrainConfig
from .sparsity import Sparsity
from .trainee import build_trainee

LOGGER = logging.getLogger(__name__)

CLOSED_SHARE_TOLERANCE = 0.01

SaveFunction = Callable[[Path, nn.Module, "dict[str, Any] | None"], None]


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
    KeyboardInterrupt; a second one leaves at once. Raises SlimError when a loss or gradient is not finite, before the
    step that it would have spoiled, and when memory runs out; weights/last.pt then holds the last finished epoch.
    """
    started = time.perf_counter()
    device, world = torch.device(device), world or World()
    if len(train_loader) == 0:
        raise SlimError("the training loader has no batch: check the data set's train split and --batch-size")
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
            epoch = Epoch(number, config, device, caption, interruption, progress.so_far, sparsity, world)
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
        if world.agree({}, interruption.wanted)[1]:  # while the last epoch was evaluated
            raise KeyboardInterrupt(f"stopped after the last epoch; the state is in {run.last}")
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
        masked = None if sparsity is None else sparsity.masked_ap(model, evaluate)
        evaluation = evaluate(model)
    progress, is_best = _advance(progress, number, evaluation, pull)
    extra = {} if sparsity is None else sparsity.scalars(number, epoch.so_far.measured, evaluation, masked)
    _record(run, number, {**losses, **extra}, evaluation, pull, time.perf_counter() - epoch.started)
    if is_best:
        _save(save, run.best, model, None)
    return progress


def _out_of_patience(progress: Progress, config: TrainConfig) -> bool:
    since = progress.next_epoch - 1 - (progress.best_epoch if progress.best_epoch is not None else config.epochs)
    return 0 < config.patience <= since


def announce_epoch(loader: Loader, number: int) -> None:
    """Augmentation and order depend on (seed, epoch) alone, so that a resumed run sees the same batches."""
    for holder in (getattr(loader, "dataset", None), getattr(loader, "sampler", None)):
        set_epoch = getattr(holder, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(number)


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
        raise SlimError(
            f"{path}: cannot be written ({reason}); the file of the epoch before is kept; free disk space and resume"
        ) from error
