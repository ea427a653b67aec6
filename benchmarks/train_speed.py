"""Images a second of our training beside a bare step of the same dense network, measured in turns in one run.

python -m benchmarks.train_speed --weights yolov5n.pt --data data/bccd.yaml      320 pixels, batches of 16

The bare step is forward, loss, backward and optimiser step on one batch that lies ready as float tensors in torch's
default memory format, in float32, without loader, clipping, moving average or checks. Ours is an epoch of
`engine.train_one_epoch` with the real loader: decoded images from the cache, mosaic and the rest of the augmentation, in
the memory format and precision that a training takes, dense and with gates under the L1 step. Loss and optimiser are the
same code in both. A turn is an epoch of each contender; the table gives medians over the turns.
"""

from __future__ import annotations

import copy
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Annotated

import torch

import slim
from data import Augment, DataSettings, DetectionDataset, build_loader
from detection.command import run_script
from detection.datasets import open_data
from detection.losses import make_loss
from detection.network import check_image_size, example_image, start_network
from engine import OptimConfig, Precision, Sparsity, TrainConfig, TrainState, build_optimizer
from engine.epoch import Epoch, train_one_epoch
from engine.interruption import Interruption
from engine.state import EpochSums
from engine.training import announce_epoch
from models import LossGains
from slim import SlimError

CPU = torch.device("cpu")


@dataclass(frozen=True)
class TrainSpeedFlags:
    """A comparison of whole training with bare steps."""

    weights: Annotated[str, "checkpoint to start from; '' trains --cfg from scratch"] = ""
    cfg: Annotated[str, "model description, used without --weights"] = "models/yolov5n.yaml"
    data: Annotated[str, "data set description"] = "data/bccd.yaml"
    data_root: Annotated[str | None, "folder of data sets; else $SLIM_DATA_ROOT, else ./datasets"] = None
    img: Annotated[int, "image size in pixels, a multiple of the largest stride"] = 320
    batch_size: Annotated[int, "images a step"] = 16
    workers: Annotated[int, "loader processes; 0 loads in the main process, the fastest way on two cores"] = 0
    turns: Annotated[int, "measured turns, after one that does not count"] = 5
    precisions: Annotated[tuple[Precision, ...], "number formats to measure"] = ("float32", "auto")
    num_cores: Annotated[int, "CPU threads of the network"] = 2
    seed: Annotated[int, "seed of weights, order and augmentation"] = 0


def contenders(flags: TrainSpeedFlags) -> dict[str, Callable[[], int]]:
    """What is measured, by name: each call trains for an epoch and returns the number of images."""
    config = open_data(DataSettings(data=flags.data, data_root=flags.data_root))
    network = start_network(flags.weights, flags.cfg, config.names).model
    check_image_size(network, flags.img)
    train_set = DetectionDataset(config, "train", flags.img, Augment(), flags.seed)
    loader = build_loader(train_set, flags.batch_size, True, flags.workers, flags.seed)
    if len(train_set) < flags.batch_size:
        raise SlimError(f"--batch-size {flags.batch_size}: the training split has {len(train_set)} images")
    batch = next(batch for batch in loader if len(batch.images) == flags.batch_size)

    def bare_epoch() -> Callable[[], int]:
        model = copy.deepcopy(network).train()
        loss_fn, optimizer = make_loss(model, LossGains(), flags.img), build_optimizer(model, OptimConfig())
        images, targets = batch.images.float() / 255, batch.targets

        def epoch() -> int:
            for _ in range(len(loader)):
                optimizer.zero_grad()
                loss, _ = loss_fn(model(images), targets)
                loss.backward()
                optimizer.step()
            return len(loader) * len(images)

        return epoch

    def our_epoch(precision: Precision, gated: bool) -> tuple[str, Callable[[], int]]:
        model = copy.deepcopy(network)
        sparsity = None
        if gated:
            slim.add_gates(model, slim.trace(model, example_image(flags.img)))
            sparsity = Sparsity(slim.SmallestHalfL1(model, strength=0.1))
        training = TrainConfig(epochs=flags.turns + 1, precision=precision)
        state = TrainState.create(model, training, len(loader), CPU, sparsity)
        loss_fn = make_loss(model, LossGains(), flags.img)
        numbers = iter(range(training.epochs))

        def epoch() -> int:
            number = next(numbers)
            announce_epoch(loader, number)
            train_one_epoch(
                state, loss_fn, loader, Epoch(number, training, CPU, "", Interruption(), EpochSums(), sparsity)
            )
            return len(train_set)

        return f"ours, {'gates and L1 step' if gated else 'dense'}, {str(state.dtype).removeprefix('torch.')}", epoch

    def loader_epoch() -> int:
        return sum(len(batch.images) for batch in loader)

    ours = [our_epoch(precision, gated) for precision in flags.precisions for gated in (False, True)]
    return {"bare step": bare_epoch(), **dict(ours), "the loader alone": loader_epoch}


def main(flags: TrainSpeedFlags) -> None:
    torch.set_num_threads(flags.num_cores)
    measured = contenders(flags)
    rates: dict[str, list[float]] = {name: [] for name in measured}
    for turn in range(flags.turns + 1):
        for name, epoch in measured.items():
            started = perf_counter()
            images = epoch()
            if turn:  # the first one warms up
                rates[name].append(images / (perf_counter() - started))
    print(
        f"{flags.weights or flags.cfg} on {flags.data}, {flags.img} pixels, batches of {flags.batch_size}, "
        f"{flags.num_cores} threads, {flags.workers} loader processes, torch {torch.__version__}, "
        f"{platform.processor() or platform.machine()}"
    )
    print("| training | images/s | against the bare step | over turns |\n| --- | --- | --- | --- |")
    for name, values in rates.items():
        ratios = [value / bare for value, bare in zip(values, rates["bare step"], strict=True)]
        print(f"| {name} | {median(values):.1f} | {median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |")


def cli(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    return run_script(TrainSpeedFlags, main, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
