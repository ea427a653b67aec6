"""What two ranks do together; `test_distributed.py` starts this under torchrun and looks at what it leaves."""

from __future__ import annotations

import copy
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

import slim
from detection.command import run_on_all_ranks
from engine import OptimConfig, Sparsity, TrainConfig, World, fit, read_training_state
from engine.batch_norm import synchronised_norms
from models import DetectionLoss, LossGains, build_model, load_description
from slim import SlimError
from tests.engine.tiny_detector import RecordingL1, TinyBatch, TinyDetector, TinyLoader, TinySet, save, weight_sum
from tests.engine.tiny_detector import squared_loss as whole_loss
from tests.scripts.runs import ROOT
from tracking import RunFolder

IMAGES = 6
CONFIG = TrainConfig(1, OptimConfig(lr=0.001, weight_decay=0.0, clip_norm=1e9), precision="float32", sync_bn=True)


@dataclass(frozen=True)
class RankFlags:
    """What to do."""

    act: Annotated[str, "name of a function of this module"] = ""
    out: Annotated[str, "folder to leave results in"] = ""


class ShareLoader:
    """A rank's images of each whole batch, and the objects in them."""

    def __init__(self, batches: list[TinyBatch], rank: int, ranks: int) -> None:
        self.dataset, self.batches, self.rank, self.ranks = TinySet(), batches, rank, ranks

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[TinyBatch]:
        for batch in self.batches:
            size = len(batch.images) // self.ranks
            first = self.rank * size
            targets = batch.targets[(batch.targets[:, 0] >= first) & (batch.targets[:, 0] < first + size)].clone()
            targets[:, 0] -= first
            yield TinyBatch(batch.images[first : first + size], targets, [0] * size, [None] * size)


def yolo() -> nn.Module:
    """The narrowest YOLOv5, three classes."""
    torch.manual_seed(3)
    description = {**load_description(ROOT / "models" / "yolov5n.yaml"), "width_multiple": 0.02, "depth_multiple": 0.1}
    return build_model(description, 3)


def batches(count: int, in_images: int) -> list[TinyBatch]:
    """Whole batches with objects in their first images alone, of other numbers in each."""
    random = torch.Generator().manual_seed(7)
    made = []
    for _ in range(count):
        images = torch.randint(0, 256, (IMAGES, 3, 64, 64), dtype=torch.uint8, generator=random)
        rows = [
            [
                image,
                k % 3,
                *torch.rand(2, generator=random).tolist(),
                *(torch.rand(2, generator=random) / 2 + 0.1).tolist(),
            ]
            for image in range(in_images)
            for k in range(2 * image + 1)
        ]
        made.append(TinyBatch(images, torch.tensor(rows), [], []))
    return made


def train_yolo(
    model: nn.Module, world: World, made: list[TinyBatch], run: RunFolder, config: TrainConfig = CONFIG
) -> None:
    loss = DetectionLoss(model, LossGains(), None if world.size == 1 else world.sum)
    loader = ShareLoader(made, world.rank, world.size)
    fit(model, loss, loader, config=config, run=run, save=save, device="cpu", world=world)


def one_step(out: Path, world: World) -> None:
    """Two halves against the whole: with objects in one half alone, then in both."""
    for name, in_images in (("one", 3), ("both", 5)):
        made = batches(1, in_images)
        start = copy.deepcopy(yolo().state_dict())
        model = yolo()
        train_yolo(model, world, made, RunFolder(out / name / "shared"))
        whole = yolo()
        if world.is_first:
            train_yolo(whole, World(), made, RunFolder(out / name / "whole"))
        states = {"start": start, "shared": model.state_dict(), "whole": whole.state_dict()}
        kinds = {type(module).__name__ for module in model.modules()}
        torch.save({**states, "kinds": kinds}, out / f"{name}{world.rank}.pt")


def gated_steps(out: Path, world: World) -> None:
    """Sparse training in which batch norms are each rank's own, and what would be cut after it."""
    model, config = yolo(), TrainConfig(2, OptimConfig(lr=0.05), precision="float32")
    slim.add_gates(model, slim.trace(model, torch.zeros(1, 3, 64, 64)))
    graph, floors = slim.trace(model, torch.zeros(1, 3, 64, 64)), {"round_to": 1, "min_channels": 1}
    l1 = slim.BudgetL1(model, graph, macs=0.7, strength=20.0, steps=6, options=floors)
    saved: dict[str, Any] = {}

    def keep(path: Path, average: nn.Module, state: dict[str, Any] | None) -> None:
        saved[path.name] = (copy.deepcopy(average.state_dict()), copy.deepcopy(state))

    keep_average(saved)  # rank 0 alone saves; the others' averages are looked at as well
    loader = ShareLoader(batches(3, 5), world.rank, world.size)
    fit(
        model,
        DetectionLoss(model, LossGains(), world.sum),
        loader,
        config=config,
        run=RunFolder(out / "gated"),
        save=keep,
        device="cpu",
        sparsity=Sparsity(l1),
        world=world,
    )
    plan = slim.make_plan(graph, slim.score(model, graph, "gate"), macs=0.7, **floors)
    gates = {name: gate.detach() for name, gate in slim.gate_vectors(model).items()}
    found = {"model": model.state_dict(), "average": saved["average"].state_dict(), "gates": gates}
    found |= {"l1": l1.state(), "plan": plan.to_json(), "files": sorted(set(saved) - {"average"})}
    torch.save(found, out / f"gated{world.rank}.pt")


def keep_average(saved: dict[str, Any]) -> None:
    """Catch the moving average that `fit` makes."""
    import engine.state

    original = engine.state.WeightAverage

    def caught(*args: Any) -> Any:
        saved["average"] = original(*args)
        return saved["average"]

    engine.state.WeightAverage = caught  # type: ignore[assignment,misc]


class RankLoader(TinyLoader):
    """Other batches on each rank."""

    def __init__(self, rank: int) -> None:
        super().__init__(4)
        self.rank = rank

    def __iter__(self) -> Iterator[TinyBatch]:
        for batch in super().__iter__():
            yield TinyBatch(batch.images + self.rank * 50, batch.targets, [0, 1], [None, None])


def interruption(out: Path, world: World) -> None:
    """A whole run, and one in which rank 1 alone is interrupted, resumed."""

    def train(run: RunFolder, loss: Any, state: dict[str, Any] | None = None) -> TinyDetector:
        torch.manual_seed(4 if state is None else 9)
        model = TinyDetector()
        sparsity = Sparsity(RecordingL1(model, 3.0), from_epoch=1)
        config = TrainConfig(epochs=3)
        common: dict[str, Any] = {"config": config, "run": run, "save": save, "device": "cpu", "world": world}
        fit(model, loss, RankLoader(world.rank), evaluate=weight_sum, sparsity=sparsity, resume_state=state, **common)
        return model

    whole, parts = RunFolder(out / "whole"), RunFolder(out / "parts")
    uninterrupted = train(whole, whole_loss).state_dict()
    steps = []

    def signalled(outputs: Any, targets: Tensor, images: Tensor) -> Any:
        steps.append(1)
        if world.rank == 1 and len(steps) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole_loss(outputs, targets, images)

    said = ""
    try:
        train(parts, signalled)
    except KeyboardInterrupt as stop:
        said = str(stop)
    progress = read_training_state(parts.last)["progress"]
    resumed = train(parts, whole_loss, read_training_state(parts.last)).state_dict()
    found = {"said": said, "steps": len(steps), "so_far": progress["so_far"]["batches"], "resumed": resumed}
    torch.save({**found, "uninterrupted": uninterrupted}, out / f"interrupted{world.rank}.pt")


def norms(out: Path, world: World) -> None:
    """One norm over both ranks, in bfloat16 and in evaluation mode too; a copy of it made meanwhile stands alone."""
    torch.manual_seed(5)
    whole = torch.randn(4, 3, 5, 5) * 3 + 100
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=None))
    with synchronised_norms(model, world):
        half = model(whole[2 * world.rank : 2 * world.rank + 2].bfloat16())
        other = copy.deepcopy(model)
        other(whole[2 * world.rank : 2 * world.rank + 2])
        model.eval()
        evaluated = model(whole)
    found = {"half": half, "evaluated": evaluated, "left": "forward" in vars(model[0]), "state": model.state_dict()}
    torch.save({**found, "copied": other.state_dict()}, out / f"norms{world.rank}.pt")


def everything(out: Path, world: World) -> None:
    for act in (one_step, gated_steps, interruption, norms):
        act(out, world)


def failure(out: Path, world: World) -> None:
    """Rank 1 fails while rank 0 waits for it."""
    print("once")
    if world.rank == 1:
        raise SlimError("the disk of rank 1 is full")
    world.barrier()


def loss(out: Path, world: World) -> None:
    """Rank 1 dies without a word."""
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier()


def main(flags: RankFlags, world: World) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    globals()[flags.act](Path(flags.out), world)


if __name__ == "__main__":
    sys.exit(run_on_all_ranks(RankFlags, main, __doc__ or ""))
