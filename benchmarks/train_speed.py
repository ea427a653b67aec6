"""Images a second of our training beside a bare step of the same dense network, measured in turns in one run.

python -m benchmarks.train_speed --weights yolov5n.pt --data data/bccd.yaml      320 pixels, batches of 16

The bare step is forward, loss, backward and optimiser step on one batch that lies ready as float tensors in torch's
default memory format, in float32, without loader, clipping, moving average or checks. Ours is an epoch of
`engine.train_one_epoch` with the real loader: decoded images from the cache, mosaic and the rest of the augmentation, in
the memory format and precision that a training takes. Loss and optimiser are the same code in both.

One turn is an epoch of ours in each precision, dense and with gates under the pull, and as many bare steps; the table
gives medians over the turns. Then the parts of a step on one fixed batch, also in turns, and the loader alone.
"""

from __future__ import annotations

import copy
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import slim
from data import Augment, DataSettings, DetectionDataset, build_loader
from detection.command import run_script
from detection.datasets import open_data
from detection.losses import make_loss
from detection.network import check_image_size, example_image, start_network
from engine import OptimConfig, Precision, Sparsity, TrainConfig, build_optimizer
from engine.batch import network_input
from engine.checkpoint import EpochSums, Trainee
from engine.epoch import Epoch, clip_gradients, in_float32, train_one_epoch
from engine.interruption import Interruption
from engine.precision import compute_dtype
from engine.trainee import build_trainee
from engine.training import announce_epoch
from models import DetectionLoss, LossGains
from slim import SlimError

PARTS = ("forward", "loss", "backward", "clip and step", "pull", "moving average")


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
    steps: Annotated[int, "measured steps on the fixed batch for the parts"] = 8
    precisions: Annotated[tuple[str, ...], "number formats to measure"] = ("float32", "auto")
    num_cores: Annotated[int, "CPU threads of the network"] = 2
    seed: Annotated[int, "seed of weights, order and augmentation"] = 0


class Bench:
    """The network, the data and one fixed batch, from which every contender is made alike."""

    def __init__(self, flags: TrainSpeedFlags) -> None:
        self.flags = flags
        config = open_data(DataSettings(data=flags.data, data_root=flags.data_root))
        self.network = start_network(flags.weights, flags.cfg, config.names).model
        check_image_size(self.network, flags.img)
        self.train_set = DetectionDataset(config, "train", flags.img, Augment(), flags.seed)
        self.loader = build_loader(self.train_set, flags.batch_size, True, flags.workers, flags.seed)
        if len(self.train_set) < flags.batch_size:
            raise SlimError(f"--batch-size {flags.batch_size}: the training split has {len(self.train_set)} images")
        self.batch = next(batch for batch in self.loader if len(batch.images) == flags.batch_size)
        self.optim = OptimConfig()

    def loss_of(self, model: nn.Module) -> DetectionLoss:
        return make_loss(model, LossGains(), self.flags.img)

    def bare(self) -> Callable[[], None]:
        """One bare step."""
        model = copy.deepcopy(self.network).train()
        loss_fn, optimizer = self.loss_of(model), build_optimizer(model, self.optim)
        images, targets = self.batch.images.float() / 255, self.batch.targets

        def step() -> None:
            optimizer.zero_grad()
            loss, _ = loss_fn(model(images), targets)
            loss.backward()
            optimizer.step()

        return step

    def trainee(self, precision: Precision, gated: bool) -> tuple[Trainee, TrainConfig, Sparsity | None]:
        """A training as `fit` sets it up."""
        model = copy.deepcopy(self.network)
        sparsity = None
        if gated:
            slim.add_gates(model, slim.trace(model, example_image(self.flags.img)))
            sparsity = Sparsity(slim.SmallestHalfL1(model, strength=0.1))
        config = TrainConfig(epochs=self.flags.turns + 1, optim=self.optim, precision=precision)
        return build_trainee(model, config, len(self.loader), torch.device("cpu"), sparsity), config, sparsity


@dataclass
class Ours:
    """Epochs of a training, one a turn."""

    bench: Bench
    precision: Precision
    gated: bool

    def __post_init__(self) -> None:
        self.trainee, self.config, self.sparsity = self.bench.trainee(self.precision, self.gated)
        self.loss_fn = self.bench.loss_of(self.trainee.model)
        self.turn = 0

    @property
    def name(self) -> str:
        dtype = str(compute_dtype(self.precision, torch.device("cpu"))).removeprefix("torch.")
        return f"ours, {'gates and pull' if self.gated else 'dense'}, {dtype}"

    def images_per_second(self) -> float:
        announce_epoch(self.bench.loader, self.turn)
        epoch = Epoch(self.turn, self.config, torch.device("cpu"), "", Interruption(), EpochSums(), self.sparsity)
        started = perf_counter()
        train_one_epoch(self.trainee, self.loss_fn, self.bench.loader, epoch)
        self.turn += 1
        return len(self.bench.train_set) / (perf_counter() - started)


def whole(bench: Bench) -> dict[str, list[float]]:
    """Images a second by contender, a value a turn."""
    bare = bench.bare()
    contenders = [Ours(bench, precision, gated) for precision in bench.flags.precisions for gated in (False, True)]
    found: dict[str, list[float]] = {"bare step": []} | {ours.name: [] for ours in contenders}
    for turn in range(bench.flags.turns + 1):
        started = perf_counter()
        for _ in range(len(bench.loader)):
            bare()
        values = {"bare step": len(bench.loader) * bench.flags.batch_size / (perf_counter() - started)}
        values |= {ours.name: ours.images_per_second() for ours in contenders}
        if turn:  # the first one warms up
            for name, value in values.items():
                found[name].append(value)
    return found


def parts(bench: Bench, precision: Precision, gated: bool) -> Iterator[dict[str, float]]:
    """Seconds of each part of one step on the fixed batch, endlessly."""
    trainee, config, sparsity = bench.trainee(precision, gated)
    loss_fn, device = bench.loss_of(trainee.model), torch.device("cpu")
    model, optimizer, average = trainee.model.train(), trainee.optimizer, trainee.average
    while True:
        marks = [perf_counter()]
        optimizer.zero_grad(set_to_none=True)
        images = network_input(bench.batch.images, device, channels_last=config.channels_last)
        with torch.autocast("cpu", trainee.dtype, enabled=trainee.dtype != torch.float32):
            outputs = model(images)
        marks.append(perf_counter())
        loss, _ = loss_fn(in_float32(outputs), bench.batch.targets)
        marks.append(perf_counter())
        loss.backward()
        marks.append(perf_counter())
        clip_gradients(model, config.optim.clip_norm)
        optimizer.step()
        marks.append(perf_counter())
        if sparsity is not None:
            sparsity.step(0, 1e-4)
        marks.append(perf_counter())
        average.update_parameters(model)
        marks.append(perf_counter())
        yield {name: marks[i + 1] - marks[i] for i, name in enumerate(PARTS)}


def loader_images_per_second(loader: DataLoader[Tensor], turns: int) -> float:
    """Median over epochs of the loader alone."""
    found = []
    for turn in range(turns):
        announce_epoch(loader, turn)
        started, count = perf_counter(), 0
        for batch in loader:
            count += len(batch.images)
        found.append(count / (perf_counter() - started))
    return median(found)


def main(flags: TrainSpeedFlags) -> None:
    torch.set_num_threads(flags.num_cores)
    bench = Bench(flags)
    machine = platform.processor() or platform.machine()
    print(
        f"{flags.weights or flags.cfg} on {flags.data}, {flags.img} pixels, batches of {flags.batch_size}, "
        f"{flags.num_cores} threads, {flags.workers} loader processes, torch {torch.__version__}, {machine}"
    )
    found = whole(bench)
    bare = median(found["bare step"])
    print("| training | images/s | against the bare step | over turns |\n| --- | --- | --- | --- |")
    for name, values in found.items():
        ratios = [value / b for value, b in zip(values, found["bare step"], strict=True)]
        print(f"| {name} | {median(values):.1f} | {median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |")
    print(f"\n| milliseconds of a step | {' | '.join(PARTS)} | sum |\n{'| --- ' * (len(PARTS) + 2)}|")
    named = {
        f"{precision}, {'gates and pull' if gated else 'dense'}": parts(bench, precision, gated)
        for precision in flags.precisions
        for gated in (False, True)
    }
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in named}
    for number in range(flags.steps + 3):
        for name, steps in named.items():
            seconds = next(steps)
            if number >= 3:
                measured[name].append(seconds)
    sums = {}
    for name, rows in measured.items():
        cells = [1000 * median(row[part] for row in rows) for part in PARTS]
        sums[name] = 1000 * median(sum(row.values()) for row in rows)
        print(f"| {name} | {' | '.join(f'{cell:.1f}' for cell in cells)} | {sums[name]:.1f} |")
    for precision in flags.precisions:
        dense, gated = (sums[f"{precision}, {kind}"] for kind in ("dense", "gates and pull"))
        print(f"{precision}: gates and pull cost {gated / dense - 1:.1%} of a step")
    loading = loader_images_per_second(bench.loader, flags.turns)
    alone = {name: flags.batch_size / total * 1000 for name, total in sums.items()}
    print(f"the loader alone: {loading:.0f} images/s, {loading / bare:.1f} times the bare step")
    for name, rate in alone.items():
        print(f"  {loading / rate:.1f} times a step of ours, {name}")


def cli(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    return run_script(TrainSpeedFlags, main, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
