"""Seconds that slim and torch-pruning take for the same two jobs, interleaved in one run.

python -m benchmarks.slim_speed                                   YOLOv5 n, s, m, l, x and ResNet-50 at 64 pixels
python -m benchmarks.slim_speed --models yolov5x --img 640        one network at the size that it is used with

Job 1: trace the network, score by L1 magnitude, remove half of the channels, cut. Job 2: the same until half of the MACs
are left, to within one percent of the dense network's. slim solves for MACs; torch-pruning takes a share of channels, so its
users search on new copies of the network, here by false position, which needs fewer tries than bisection.

Both tools rank all channels together, keep multiples of 8, leave the network's last layers alone, see the same example
image and run with the same threads. What goes into the seconds, where there is a choice, favours torch-pruning:

- slim's trace includes its dry run, which proves that every group can be cut, and its cut includes the copy that leaves
  the given network whole. torch-pruning cuts in place; job 1 does not count the copy that its users make, job 2 counts
  those that the search needs.
- torch-pruning is shown the head's raw maps instead of the decoded boxes, which spares it a part of the graph; slim
  traces the whole network.

On a machine that does other work too, believe the CPU seconds, with --num-cores 1: threads that wait for each other burn
CPU as well. The MACs in the table are slim.cost's for both. The search goes by torch-pruning's own count, as its users' would.
"""

from __future__ import annotations

import copy
import gc
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Annotated, Any

import torch
import torchvision
from torch import Tensor, nn

import models
import slim
from deploy import threads_of
from detection.benchmark_table import processor_name
from detection.command import run_script
from slim import SlimError

YAMLS = Path(models.__file__).parent
ROUND_TO = 8
KEEP = 0.5
TOLERANCE = 0.01
"""How far a search may end from its target, as a share of the dense network's MACs."""
MAX_TRIES = 20


@dataclass(frozen=True)
class SlimSpeedFlags:
    """A comparison of slim with torch-pruning."""

    models: Annotated[tuple[str, ...], "networks: a YAML of models/ by its name, or a torchvision classifier"] = (
        "yolov5n",
        "yolov5s",
        "yolov5m",
        "yolov5l",
        "yolov5x",
        "resnet50",
    )
    img: Annotated[int, "side of the example image in pixels, a multiple of 32"] = 64
    repeats: Annotated[int, "measured runs of each tool on each network"] = 5
    num_cores: Annotated[int, "CPU threads; 0 leaves torch's own choice"] = 0
    seed: Annotated[int, "seed of the random weights"] = 0


@dataclass(frozen=True)
class Subject:
    """What is pruned; ``head`` are the paths of the layers whose outputs must keep their width."""

    name: str
    model: nn.Module
    image: Tensor
    head: tuple[str, ...]
    raw_maps: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class ToolRun:
    """One run of one tool: seconds, CPU seconds, the pruned model, how many times it was pruned on the way."""

    seconds: float
    cpu_s: float
    model: nn.Module
    prunings: int = 1


def timed(act: Callable[[], tuple[nn.Module, int]]) -> ToolRun:
    """Run what gives a pruned model and the number of its prunings."""
    wall, cpu = perf_counter(), process_time()
    model, prunings = act()
    return ToolRun(perf_counter() - wall, process_time() - cpu, model, prunings)


@dataclass(frozen=True)
class ToolSpeed:
    """A tool on a network: medians of ``runs`` runs and the share of the MACs left, or why it failed."""

    network: str
    tool: str
    seconds: float = math.nan
    cpu_s: float = math.nan
    runs: int = 0
    prunings: int = 0
    macs: float = math.nan
    failure: str = ""

    def line(self, ours: ToolSpeed) -> str:
        """The row as Markdown; ``ours`` is slim's row on the same network."""
        if self.failure:
            cells = ["fails: " + self.failure.replace("|", "\\|"), *[""] * 6]
        else:
            cells = [f"{self.seconds:.3f}", f"{self.seconds / ours.seconds:.2f}"]
            cells += [f"{self.cpu_s:.3f}", f"{self.cpu_s / ours.cpu_s:.2f}"]
            cells += [str(self.runs), str(self.prunings), f"{self.macs:.1%}"]
        return "| " + " | ".join([self.network, self.tool, *cells]) + " |"


TITLES = ("network", "tool", "s", "/ slim's", "CPU s", "/ slim's", "runs", "prunings", "MACs left")
HEAD = "| " + " | ".join(TITLES) + " |\n|" + " --- |" * len(TITLES)


def build(name: str, img: int, seed: int) -> Subject:
    """A network with random weights; SlimError for an unknown name."""
    torch.manual_seed(seed)
    image = torch.rand(1, 3, img, img)
    if (YAMLS / f"{name}.yaml").is_file():
        yolo = models.build_model(models.load_description(YAMLS / f"{name}.yaml"), 80).eval()
        head = tuple(f"model.{len(yolo.model) - 1}.m.{i}" for i in range(len(yolo.detect.m)))
        return Subject(name, yolo, image, head, lambda outputs: outputs[1])
    if name not in torchvision.models.list_models(torchvision.models):
        raise SlimError(f"--models {name}: neither a YAML of {YAMLS} nor a torchvision classifier, such as resnet50")
    model = torchvision.models.get_model(name, weights=None).eval()
    last = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]
    return Subject(name, model, image, tuple(last))


def torch_pruning() -> Any:
    """The module; SlimError where it is not installed."""
    try:
        import torch_pruning as module
    except ImportError as error:
        raise SlimError("torch-pruning is not installed; pip install '.[bench]' brings it") from error
    return module


def slim_cut(network: Subject, *, channels: float | None = None, macs: float | None = None) -> ToolRun:
    """Cut by slim to a share of the channels or of the MACs."""

    def act() -> tuple[nn.Module, int]:
        graph = slim.trace(network.model, network.image)
        scores = slim.score(network.model, graph, "l1")
        plan = slim.make_plan(graph, scores, channels=channels, macs=macs, round_to=ROUND_TO, min_channels=ROUND_TO)
        return slim.apply_plan(network.model, plan), 1

    return timed(act)


def pruner_of(network: Subject, model: nn.Module, ratio: float) -> Any:
    """torch-pruning's pruner; it traces as it is made. In place."""
    tp = torch_pruning()
    return tp.pruner.BasePruner(
        model,
        (network.image,),
        importance=tp.importance.MagnitudeImportance(p=1),
        global_pruning=True,
        pruning_ratio=ratio,
        round_to=ROUND_TO,
        ignored_layers=[model.get_submodule(path) for path in network.head],
        output_transform=network.raw_maps,
    )


def torch_pruning_cut(network: Subject) -> ToolRun:
    """Cut by torch-pruning to half of the channels, on a copy that is not counted."""
    model = copy.deepcopy(network.model)

    def act() -> tuple[nn.Module, int]:
        pruner_of(network, model, 1 - KEEP).step()
        return model, 1

    return timed(act)


def search_on_copies(network: Subject) -> ToolRun:
    """Cut by torch-pruning to half of the MACs: prune new copies until one is near enough."""

    def act() -> tuple[nn.Module, int]:
        dense = count(network, network.model)
        made: list[nn.Module] = []

        def kept_at(ratio: float) -> float:
            made[:] = [copy.deepcopy(network.model)]
            pruner_of(network, made[0], ratio).step()
            return count(network, made[0]) / dense

        tries = false_position(kept_at)
        return made[0], tries

    return timed(act)


def count(network: Subject, model: nn.Module) -> int:
    """MACs as torch-pruning counts them: norms, activations and pools too."""
    return int(torch_pruning().utils.count_ops_and_params(model, (network.image,))[0])


def false_position(kept_at: Callable[[float], float]) -> int:
    """Calls with pruning ratios until one keeps ``KEEP``; returns the number of calls. SlimError when none is found.

    MACs go with the square of the channels that are kept, so the root of what is kept is nearly a line, and a chord of it
    soon meets the target. The first ratio is what torch-pruning's own documentation advises: 0.29 for half.
    """
    goal = math.sqrt(KEEP)
    low, high = (0.0, 1.0), (1.0, 0.0)
    kept = 1.0
    for tries in range(1, MAX_TRIES + 1):
        ratio = low[0] + (high[0] - low[0]) * (low[1] - goal) / (low[1] - high[1])
        kept = kept_at(ratio)
        if abs(kept - KEEP) <= TOLERANCE:
            return tries
        point = (ratio, math.sqrt(kept))
        low, high = (point, high) if kept > KEEP else (low, point)
    raise SlimError(f"{kept:.4f} of the MACs left after {MAX_TRIES} prunings, aimed at {KEEP}")


def interleaved(network: Subject, jobs: Mapping[str, Callable[[], ToolRun]], repeats: int) -> list[ToolSpeed]:
    """A row a job. The jobs take turns, and in every other turn the last begins; a job that fails is not run again."""
    done: dict[str, list[ToolRun]] = {tool: [] for tool in jobs}
    failures: dict[str, str] = {}
    for turn in range(-1, repeats):  # the first does not count
        for tool in list(jobs) if turn % 2 == 0 else list(jobs)[::-1]:
            if tool in failures:
                continue
            gc.collect()
            try:
                run = jobs[tool]()
            except Exception as error:
                failures[tool] = first_line(error)
                continue
            if turn >= 0:
                done[tool].append(run)
    dense = slim.cost(network.model, network.image).macs
    return [summary(network, tool, done[tool], dense, failures.get(tool, "")) for tool in jobs]


def summary(network: Subject, tool: str, runs: list[ToolRun], dense: int, failure: str) -> ToolSpeed:
    """The row of one job; running the pruned network is part of it."""
    if not failure:
        try:
            macs = slim.cost(runs[-1].model, network.image).macs / dense
        except Exception as error:
            failure = f"the pruned network does not run: {first_line(error)}"
    if failure:
        return ToolSpeed(network.name, tool, failure=failure)
    seconds, cpu_s = median(run.seconds for run in runs), median(run.cpu_s for run in runs)
    return ToolSpeed(network.name, tool, seconds, cpu_s, len(runs), runs[-1].prunings, macs)


def first_line(error: Exception) -> str:
    """What a table has room for."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def compare_cuts(network: Subject, repeats: int) -> list[ToolSpeed]:
    """Job 1: rows of slim and of torch-pruning."""
    jobs = {"slim": lambda: slim_cut(network, channels=KEEP), "torch-pruning": lambda: torch_pruning_cut(network)}
    return interleaved(network, jobs, repeats)


def compare_searches(network: Subject, repeats: int) -> list[ToolSpeed]:
    """Job 2: rows of slim and of torch-pruning."""
    jobs = {"slim": lambda: slim_cut(network, macs=KEEP), "torch-pruning": lambda: search_on_copies(network)}
    return interleaved(network, jobs, repeats)


def main(flags: SlimSpeedFlags) -> None:
    """Print both tables, each network's rows as soon as they are there."""
    torch_pruning()
    if flags.num_cores:
        torch.set_num_threads(flags.num_cores)
    networks = [build(name, flags.img, flags.seed) for name in flags.models]
    print(
        f"torch {torch.__version__}, torch-pruning {version('torch-pruning')}, {processor_name()}, {threads_of(0)} cores, "
        f"{torch.get_num_threads()} threads\none {flags.img}x{flags.img} image, random weights (seed {flags.seed}), "
        f"medians of {flags.repeats} interleaved runs"
    )
    for title, compare in {
        "Half of the channels, once": compare_cuts,
        f"Half of the MACs, to within {TOLERANCE:.0%}": compare_searches,
    }.items():
        print(f"\n{title}:\n\n{HEAD}")
        for network in networks:
            rows = compare(network, flags.repeats)
            for row in rows:
                print(row.line(rows[0]), flush=True)


def cli(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_script(SlimSpeedFlags, main, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
