"""The trainings and cuts inside the slimming loop: their settings, the job that all ranks share, what a cut hands on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import slim
from data import DetectionDataset
from deploy import LatencySettings
from engine import (
    TRAINING_STATE_KEY,
    WARM_START_KEY,
    FitResult,
    OptimConfig,
    TrainConfig,
    WeightAverage,
    World,
    build_optimizer,
    pack_warm_start,
    read_state,
)
from slim import SlimError
from tracking import RunFolder
from tracking.journal import make_empty

from .command import with_pairs
from .flags import FinetuneFlags, IterateFlags, NetworkSettings, PruneFlags, SparseFlags, TargetSettings, TrainFlags
from .pruning import Cut, PruneInputs
from .training import train_in

Kind = TypeVar("Kind", bound=TrainFlags)


def sparse_flags(flags: IterateFlags, weights: Path, keep: float) -> SparseFlags:
    """The settings of a round's sparse training, whose cut is to keep such a share of the network at ``weights``."""
    sparsity, training = replace(flags.sparsity, keep_macs=keep), _training(flags, flags.sparse_epochs)
    common = SparseFlags(training=training, sparsity=sparsity, widths=flags.widths)
    return with_pairs(_shared(common, flags, weights), [*flags.train, *flags.sparse])


def finetune_flags(flags: IterateFlags, weights: Path, epochs: int) -> FinetuneFlags:
    """The settings of a recovery, or of the fine-tuning at the end; gates stay."""
    common = FinetuneFlags(training=_training(flags, epochs), keep_gates=True)
    return with_pairs(_shared(common, flags, weights), [*flags.train, *flags.finetune])


def prune_flags(flags: IterateFlags, weights: Path, macs: int | None, latency_share: float | None) -> PruneFlags:
    """The settings of a cut to so many MACs or such a share of the dense network's latency."""
    latency = (
        replace(flags.latency, latency_ms=None, latency_share=latency_share) if latency_share else LatencySettings()
    )
    return with_pairs(
        PruneFlags(
            device=flags.device,
            seed=flags.seed,
            weights=str(weights),
            img=flags.img,
            target=TargetSettings(macs=macs),
            latency=latency,
            widths=flags.widths,
            recalibrate=flags.recalibrate,
            dataset=flags.dataset,
            loading=replace(flags.loading, workers=0),  # val is in memory, or its images are few
        ),
        flags.prune,
    )


@dataclass(frozen=True)
class TrainJob:
    """A training in the folder `work` in which all ranks take part, and what it starts from.

    Arguments:
        resumed: whether it continues from its own last checkpoint.
        carried: checkpoint whose optimiser state and moving average it begins with otherwise.
    """

    work: Path
    flags: TrainFlags
    resumed: bool
    carried: Path | None

    @classmethod
    def prepare(cls, work: Path, flags: TrainFlags, carried: Path | None) -> TrainJob:
        """Continue what an earlier attempt left in `work`, or empty it."""
        last, resumed = RunFolder(work).last, False
        try:
            resumed = read_state(last, TRAINING_STATE_KEY) is not None
        except SlimError as error:
            if last.exists():
                print(f"{error}; the phase starts again")
        if not resumed:
            make_empty(work)
        return cls(work, flags, resumed, carried)

    def run(self, world: World, val_set: DetectionDataset | None = None) -> FitResult:
        """Train; `val_set` is the val split where this process has it open."""
        run, warm_start = RunFolder(self.work), None
        state = read_state(run.last, TRAINING_STATE_KEY) if self.resumed else None
        if not self.resumed and self.carried is not None:
            warm_start = read_warm_start(self.carried)
        return train_in(run, self.flags, resume_state=state, warm_start_state=warm_start, world=world, val_set=val_set)


def worker_loop(world: World) -> None:
    """What the ranks other than 0 do: the trainings that rank 0 comes to, until it says stop."""
    while (job := world.broadcast_from_rank0(stop)) is not None:
        job.run(world)


def stop() -> TrainJob | None:
    """Rank 0's last word to the worker loops."""
    return None


def read_warm_start(weights: Path) -> dict[str, Any]:
    """What the training before hands on: cut along with the network, or as its last checkpoint holds it."""
    carried = read_state(weights, WARM_START_KEY)
    if carried is not None:
        return carried
    state = read_state(weights, TRAINING_STATE_KEY)
    assert state is not None
    return {"model": state["model"], "average": state["average"], "optimizer": state["optimizer"]["state"]}


def cut_training_state(
    inputs: PruneInputs, sparse: Path, plan: slim.Plan, done: Cut, optim: OptimConfig, recalibration_batches: int
) -> dict[str, Any]:
    """The sparse training's weights, optimiser state and moving average, as narrow as the network."""
    state, raw = read_state(sparse, TRAINING_STATE_KEY), inputs.network.model
    assert state is not None
    average = WeightAverage(raw, optim)
    raw.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimizer = build_optimizer(raw, optim)
    optimizer.load_state_dict(state["optimizer"])
    narrow, cut_optimizer, cut_average = slim.apply_plan(raw, plan, optimizer=optimizer, ema=average)
    assert cut_optimizer is not None and cut_average is not None
    inputs.recalibrate(narrow, recalibration_batches)
    cut_average.module.load_state_dict(done.model.state_dict())
    return pack_warm_start(narrow.cpu(), cut_optimizer, cut_average)


def _training(flags: IterateFlags, epochs: int) -> TrainConfig:
    return TrainConfig(epochs=epochs, optim=flags.optim, seed=flags.seed)


def _shared(step: Kind, flags: IterateFlags, weights: Path) -> Kind:
    """A step's settings with those that all trainings have from the loop."""
    return replace(
        step,
        device=flags.device,
        img=flags.img,
        network=NetworkSettings(weights=str(weights)),
        dataset=flags.dataset,
        loading=flags.loading,
        teacher=flags.teacher,
        distill=flags.distill,
    )
