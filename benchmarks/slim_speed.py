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

The MACs in the table are slim.cost's for both. The search goes by torch-pruning's own count, as its users' would.
"""

from __future__ import annotations

import copy
import gc
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import torchvision
from torch import Tensor, nn

import models
import slim
from deploy import threads_of
from detection.benchmark_table import processor_name
from detection.command import check_installed, run_script
from slim import SlimError
from tracking.report.markdown import table

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


Pruned = tuple[nn.Module, int]
"""A pruned network, and how many times it was pruned on the way."""


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


def slim_cut(network: Subject, *, channels: float | None = None, macs: float | None = None) -> Pruned:
    """Cut by slim to a share of the channels or of the MACs."""
    graph = slim.trace(network.model, network.image)
    scores = slim.score(network.model, graph, "l1")
    plan = slim.make_plan(graph, scores, channels=channels, macs=macs, round_to=ROUND_TO, min_channels=ROUND_TO)
    return slim.apply_plan(network.model, plan), 1


def torch_pruning_cut(network: Subject, model: nn.Module, ratio: float = 1 - KEEP) -> Pruned:
    """Cut ``model``, a copy of the network's, by torch-pruning, which takes away this share of the channels; in place."""
    import torch_pruning as tp

    tp.pruner.BasePruner(
        model,
        (network.image,),
        importance=tp.importance.MagnitudeImportance(p=1),
        global_pruning=True,
        pruning_ratio=ratio,
        round_to=ROUND_TO,
        ignored_layers=[model.get_submodule(path) for path in network.head],
        output_transform=network.raw_maps,
    ).step()
    return model, 1


def search_on_copies(network: Subject) -> Pruned:
    """Cut by torch-pruning to half of the MACs: prune new copies until one is near enough; SlimError when none is.

    By false position: MACs go with the square of the channels that are kept, so the root of what is kept is nearly a line,
    and a chord of it soon meets the target. The first ratio is what torch-pruning's own documentation advises: 0.29.
    """
    import torch_pruning as tp

    def count(model: nn.Module) -> int:  # norms, activations and pools too
        return int(tp.utils.count_ops_and_params(model, (network.image,))[0])

    goal, dense, kept = math.sqrt(KEEP), count(network.model), 1.0
    low, high = (0.0, 1.0), (1.0, 0.0)
    for tries in range(1, MAX_TRIES + 1):
        ratio = low[0] + (high[0] - low[0]) * (low[1] - goal) / (low[1] - high[1])
        model, _ = torch_pruning_cut(network, copy.deepcopy(network.model), ratio)
        kept = count(model) / dense
        if abs(kept - KEEP) <= TOLERANCE:
            return model, tries
        point = (ratio, math.sqrt(kept))
        low, high = (point, high) if kept > KEEP else (low, point)
    raise SlimError(f"{kept:.4f} of the MACs left after {MAX_TRIES} prunings, aimed at {KEEP}")


def compare(network: Subject, job: str, repeats: int) -> list[list[str]]:
    """A row of cells for slim and one for torch-pruning, which take turns; a tool that fails says why in its row."""
    seconds: dict[str, list[float]] = {"slim": [], "torch-pruning": []}
    ends: dict[str, list[str]] = {tool: [] for tool in seconds}
    dense = slim.cost(network.model, network.image).macs
    for turn in range(repeats + 1):
        for tool in sorted(seconds, reverse=bool(turn % 2)):
            if len(ends[tool]) == 1:
                continue
            spare = copy.deepcopy(network.model)
            gc.collect()
            started = perf_counter()
            try:
                model, prunings = JOBS[job][tool](network, spare)
                seconds[tool].append(perf_counter() - started)
                ends[tool] = [str(prunings), f"{slim.cost(model, network.image).macs / dense:.1%}"]
            except Exception as error:
                ends[tool] = ["fails: " + (str(error).strip() or repr(error)).splitlines()[0]]
    middle = {tool: median(times[1:]) for tool, times in seconds.items() if len(ends[tool]) > 1}  # the first warms up
    ratios = {tool: f"{time / middle['slim']:.2f}" if "slim" in middle else "" for tool, time in middle.items()}
    return [
        [network.name, tool, f"{middle[tool]:.3f}", ratios[tool], *end]
        if tool in middle
        else [network.name, tool, *end, "", "", ""]
        for tool, end in ends.items()
    ]


JOBS: dict[str, dict[str, Callable[[Subject, nn.Module], Pruned]]] = {
    "Half of the channels, once": {
        "slim": lambda network, spare: slim_cut(network, channels=KEEP),
        "torch-pruning": torch_pruning_cut,
    },
    f"Half of the MACs, to within {TOLERANCE:.0%}": {
        "slim": lambda network, spare: slim_cut(network, macs=KEEP),
        "torch-pruning": lambda network, spare: search_on_copies(network),
    },
}
"""What each tool does with a network; a spare copy of the network lies ready, for the one that cuts in place."""


def main(flags: SlimSpeedFlags) -> None:
    """Print both tables."""
    check_installed("torch_pruning")
    if flags.num_cores:
        torch.set_num_threads(flags.num_cores)
    networks = [build(name, flags.img, flags.seed) for name in flags.models]
    print(
        f"torch {torch.__version__}, torch-pruning {version('torch-pruning')}, {processor_name()}, {threads_of(0)} cores, "
        f"{torch.get_num_threads()} threads\none {flags.img}x{flags.img} image, random weights (seed {flags.seed}), "
        f"medians of {flags.repeats} interleaved runs"
    )
    for job in JOBS:
        rows = [row for network in networks for row in compare(network, job, flags.repeats)]
        print(f"\n{job}:\n\n{table(['network', 'tool', 's', '/ slim', 'prunings', 'MACs left'], rows)}", flush=True)


def cli(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_script(SlimSpeedFlags, main, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
