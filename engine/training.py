"""The training loop: `fit` owns epochs, `train_one_epoch` (epoch.py) owns batches."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slim import SlimError
from tracking.run_folder import RunFolder

from .batch_norm import synchronised_norms
from .distributed import World
from .epoch import Epoch, Loader, LossFunction, train_one_epoch
from .evaluation import Evaluation
from .interruption import Interruption
from .settings import TrainConfig
from .sparsity import Sparsity
from .state import EpochSums, Progress, TrainState, seed_generators

LOGGER = logging.getLogger(__name__)

CLOSED_SHARE_TOLERANCE = 0.01

EvaluateFunction = Callable[[nn.Module], Evaluation]
SaveFunction = Callable[[Path, nn.Module, "dict[str, Any] | None"], None]


@dataclass(frozen=True)
class FitResult:
    """What a training reached; APs (0..1) are None when nothing was evaluated, closed_share without gates.

    `epochs` are those that were trained, fewer than planned after an early stop; `seconds` are this call's. `evaluation` is
    that of the final weights, on rank 0, where this call made it: None after the resumption of a finished run.
    """

    best_ap: float | None
    best_epoch: int | None
    last_ap: float | None
    epochs: int
    closed_share: float | None
    seconds: float
    evaluation: Evaluation | None = field(default=None, repr=False)


def fit(
    model: nn.Module,
    loss_fn: LossFunction,
    train_loader: Loader,
    *,
    config: TrainConfig,
    run: RunFolder,
    save: SaveFunction,
    device: torch.device | str,
    evaluate: EvaluateFunction | None = None,
    sparsity: Sparsity | None = None,
    resume_state: dict[str, Any] | None = None,
    warm_start_state: dict[str, Any] | None = None,
    world: World | None = None,
) -> FitResult:
    """Train `model` in place; it is moved to `device`, and weights/last.pt is written at the end of each epoch.

    Args:
        model: gives raw outputs in training mode. Parameters that require no gradient are frozen, and with those of a norm
            its statistics (see `freeze`)
        loss_fn: `loss_fn(outputs, targets, images)` gives the scalar to minimise and its detached scalar parts by name, from
            FP32 outputs and the images as the network saw them, under the autocast of the forward pass; targets are on
            the loader's device
        train_loader: batches (see `Batch`); `set_epoch` of its data set and sampler is called before each epoch
        config: how long and how to train
        run: folder that gets rows, scalars, histograms and weights
        save: `save(path, model, training_state)` writes the moving average of the weights; best.pt and epochN.pt have no
            training state
        device: where to train
        evaluate: gives the AP of the moving average of the weights
        sparsity: what changes the gates. With it an epoch can only be the best while its share of closed gates is about the
            largest seen: the AP before the gates close is of no use to a cut
        resume_state: continues a run that stopped, bit for bit (see `read_training_state`)
        warm_start_state: optimiser state and moving average of an earlier training (see `pack_warm_start`)
        world: the ranks that share this training. All call this with the same arguments, each with its share of the batches;
            `loss_fn` gives a rank's part of the loss, of which the sum is minimised, and the parts' means are reported. Rank
            0 alone evaluates, writes and speaks: its AP is that of one process to the last bit

    The first Ctrl-C or SIGTERM, on any rank, finishes the step on all, saves weights/last.pt there, in the middle of the
    epoch, and raises KeyboardInterrupt; a second one leaves at once. Raises SlimError when a loss or gradient is not finite,
    before the step that it would have spoiled, and when memory runs out; weights/last.pt then holds the last finished epoch.
    """
    started = time.perf_counter()
    device, world = torch.device(device), world or World()
    if len(train_loader) == 0:
        raise SlimError("the training loader has no batch: check the data set's train split and --batch-size")
    seed_generators(config.seed + world.rank)
    state = TrainState.create(model, config, len(train_loader), device, sparsity, world)
    average = state.average.module
    progress, evaluation = Progress(), None
    if resume_state is not None:
        progress = state.restore(resume_state, world)
    elif warm_start_state is not None:
        state.warm_start(warm_start_state)
    if world.is_first:
        run.drop_rows_from(progress.next_epoch)
    norms = synchronised_norms(model, world) if config.sync_bn else contextlib.nullcontext()
    with Interruption() as interruption, norms, contextlib.closing(run):
        while progress.next_epoch < config.epochs and not _out_of_patience(progress, config):
            number = progress.next_epoch
            announce_epoch(train_loader, number)
            caption = _caption(progress, sparsity)
            epoch = Epoch(number, config, device, caption, interruption, progress.so_far, sparsity, world)
            scalars: dict[str, float | None] = {**train_one_epoch(state, loss_fn, train_loader, epoch)}
            if epoch.stopped:
                _save_state(save, run, state, replace(progress, so_far=epoch.so_far), world)
                raise KeyboardInterrupt(
                    f"stopped after batch {epoch.so_far.batches} of epoch {number}; the state is in {run.last}"
                )
            if world.is_first:
                evaluation, masked_ap = None, None
                if evaluate is not None and _is_evaluated(number, config):
                    masked_ap = None if sparsity is None else sparsity.masked_ap(average, evaluate)
                    evaluation = evaluate(average)
                    masked_ap = evaluation.ap if masked_ap is None else masked_ap
                if sparsity is not None:
                    scalars |= sparsity.scalars(number, epoch.so_far.measured, masked_ap)
                progress = _advance(progress, evaluation, sparsity)
                _record(run, number, scalars, evaluation, sparsity, time.perf_counter() - epoch.started)
                if progress.best_epoch == number:
                    save(run.best, average, None)
                if config.save_period > 0 and number % config.save_period == 0:
                    save(run.best.with_name(f"epoch{number}.pt"), average, None)
            progress = world.broadcast_from_rank0(functools.partial(replace, progress))
            # last.pt comes last: it is what declares the epoch finished.
            _save_state(save, run, state, progress, world)
        if world.mean_and_any({}, interruption.wanted)[1]:  # while the last epoch was evaluated
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
        closed_share=None if sparsity is None else sparsity.l1.closed_share(),
        seconds=time.perf_counter() - started,
        evaluation=evaluation,
    )


def announce_epoch(loader: Loader, number: int) -> None:
    """Tell data set and sampler the epoch: what they draw depends on it alone, so that a resumed run sees the same batches."""
    for holder in (getattr(loader, "dataset", None), getattr(loader, "sampler", None)):
        set_epoch = getattr(holder, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(number)


def _is_evaluated(number: int, config: TrainConfig) -> bool:
    return number + 1 == config.epochs or (config.eval_every > 0 and (number + 1) % config.eval_every == 0)


def _out_of_patience(progress: Progress, config: TrainConfig) -> bool:
    """Whether the evaluation after the last epoch was the one that patience ended with; between evaluations it never is."""
    if progress.best_epoch is None or not config.patience or not _is_evaluated(progress.next_epoch - 1, config):
        return False
    return progress.next_epoch - 1 - progress.best_epoch >= config.patience


def _advance(progress: Progress, evaluation: Evaluation | None, sparsity: Sparsity | None) -> Progress:
    """The progress after one more epoch, which is the best when `best_epoch` says so."""
    number = progress.next_epoch
    progress = replace(progress, next_epoch=number + 1, so_far=EpochSums())
    if evaluation is None:
        return progress
    progress = replace(progress, last_ap=evaluation.ap)
    closed, most_closed = 0.0 if sparsity is None else sparsity.l1.closed_share(), progress.best_closed_share
    is_better = progress.best_ap is None or evaluation.ap > progress.best_ap
    as_closed = closed >= most_closed - CLOSED_SHARE_TOLERANCE
    if not (closed > most_closed + CLOSED_SHARE_TOLERANCE or (as_closed and is_better)):
        return progress
    return replace(progress, best_ap=evaluation.ap, best_epoch=number, best_closed_share=max(closed, most_closed))


def _record(
    run: RunFolder,
    number: int,
    losses: Mapping[str, float | None],
    evaluation: Evaluation | None,
    sparsity: Sparsity | None,
    seconds: float,
) -> None:
    """Write an epoch's row, scalars and histograms, and log its line."""
    closed = None if sparsity is None else sparsity.l1.closed_share()
    metrics = {f"metrics/{name}": getattr(evaluation, name, None) for name in ("ap", "ap50", "ap75")}
    scalars = {**losses, **metrics, "gates/closed_share": closed}
    run.log_scalars(scalars, number)
    if sparsity is not None:
        run.log_gates(sparsity.l1.gates(), number)
        if channels := sparsity.channels():
            run.log_channels(channels, number)
    run.append_row({"epoch": number, **scalars, "seconds": round(seconds, 3)})
    labels = {"gates/pull_over_gradient": "L1 step/gradient", "metrics/masked_ap": "masked AP"}
    shown = [
        f"{labels.get(name, name.removeprefix('loss/').removeprefix('gates/'))} {value:.4g}"
        for name, value in losses.items()
        if value is not None
    ]
    shown += [] if evaluation is None else [f"AP {evaluation.ap:.4f}", f"AP50 {evaluation.ap50:.4f}"]
    shown += [] if closed is None else [f"closed {closed:.1%}"]
    LOGGER.info("epoch %d: %s (%.1f s)", number, ", ".join(shown), seconds)


def _caption(progress: Progress, sparsity: Sparsity | None) -> str:
    """What the progress bar says."""
    best = "" if progress.best_ap is None else f", best AP {progress.best_ap:.3f}"
    closed = "" if sparsity is None else f", closed {sparsity.l1.closed_share():.1%}"
    return f"epoch {progress.next_epoch}{best}{closed}"


def _save_state(save: SaveFunction, run: RunFolder, state: TrainState, progress: Progress, world: World) -> None:
    """Write weights/last.pt, which is there on all ranks when this ends."""
    packed = state.pack(progress, world)
    if world.is_first:
        save(run.last, state.average.module, packed)
    world.barrier()
