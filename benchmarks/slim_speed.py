"""Seconds that slim and torch-pruning take for the same two jobs, measured in turns in one run.

python -m benchmarks.slim_speed                                   YOLOv5 n, s, m, l, x and ResNet-50 at 64 pixels
python -m benchmarks.slim_speed --models yolov5x --img 640        one network at the size that it is used with

Job 1: trace the network, score by L1 magnitude, remove half of the channels, cut. Job 2: the same until half of the MACs
are left, to within one percent of the dense network's. slim solves for MACs; torch-pruning takes a share of channels,
so its users search: on new copies of the network (by false position, which needs fewer tries than bisection), or in
small steps on a single copy. Both ways run twice, the faster is then measured like everything else.

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
import os
import platform
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
from detection.command import run_script
from slim import SlimError

YAMLS = Path(models.__file__).parent
ROUND_TO = 8
KEEP = 0.5
TOLERANCE = 0.01
"""How far a search may end from its target, as a share of the dense network's MACs."""
STEP = 0.01
"""Share of the channels that one small step removes: half of the MACs go over about 30."""
MAX_TRIES = 20


@dataclass(frozen=True)
class SpeedFlags:
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
class Network:
    """What is pruned; ``head`` are the paths of the layers whose outputs must keep their width."""

    name: str
    model: nn.Module
    image: Tensor
    head: tuple[str, ...]
    raw_maps: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Trial:
    """One run of one tool: seconds by phase, CPU seconds, the pruned model, how many times it was pruned on the way."""

    seconds: Mapping[str, float]
    cpu_s: float
    model: nn.Module
    prunings: int = 1


class Stopwatch:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_start, self.mark = process_time(), perf_counter()

    def lap(self, phase: str) -> None:
        """The time since the last lap belongs to a phase."""
        now = perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.mark
        self.mark = now

    def trial(self, model: nn.Module, prunings: int = 1) -> Trial:
        """What was measured until now."""
        return Trial(self.seconds, process_time() - self.cpu_start, model, prunings)


Job = Callable[[], Trial]


@dataclass(frozen=True)
class Row:
    """A tool on a network: medians of ``runs`` runs and the share of the MACs left, or why it failed.

    ``prunings``: how many times the network was pruned in one run.
    """

    network: str
    tool: str
    seconds: Mapping[str, float]
    total_s: float
    cpu_s: float
    runs: int
    prunings: int
    macs: float
    failure: str = ""


def build(name: str, img: int, seed: int) -> Network:
    """A network with random weights; SlimError for an unknown name."""
    torch.manual_seed(seed)
    image = torch.rand(1, 3, img, img)
    if (YAMLS / f"{name}.yaml").is_file():
        yolo = models.build_model(models.load_description(YAMLS / f"{name}.yaml"), 80).eval()
        head = tuple(f"model.{len(yolo.model) - 1}.m.{i}" for i in range(len(yolo.detect.m)))
        return Network(name, yolo, image, head, lambda outputs: outputs[1])
    if name not in torchvision.models.list_models(torchvision.models):
        raise SlimError(f"--models {name}: neither a YAML of {YAMLS} nor a torchvision classifier, such as resnet50")
    model = torchvision.models.get_model(name, weights=None).eval()
    last = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]
    return Network(name, model, image, tuple(last))


def torch_pruning() -> Any:
    """The module; SlimError where it is not installed."""
    try:
        import torch_pruning as module
    except ImportError as error:
        raise SlimError("torch-pruning is not installed; pip install '.[bench]' brings it") from error
    return module


def slim_cut(network: Network, *, channels: float | None = None, macs: float | None = None) -> Trial:
    """slim to a share of the channels or of the MACs."""
    watch = Stopwatch()
    graph = slim.trace(network.model, network.image)
    watch.lap("trace")
    scores = slim.score(network.model, graph, "l1")
    plan = slim.make_plan(graph, scores, channels=channels, macs=macs, round_to=ROUND_TO, min_channels=ROUND_TO)
    watch.lap("solve")
    pruned = slim.apply_plan(network.model, plan)
    watch.lap("cut")
    return watch.trial(pruned)


def pruner_of(network: Network, model: nn.Module, ratio: float, steps: int = 1) -> Any:
    """torch-pruning's pruner; it traces as it is made. In place."""
    tp = torch_pruning()
    return tp.pruner.BasePruner(
        model,
        (network.image,),
        importance=tp.importance.MagnitudeImportance(p=1),
        global_pruning=True,
        pruning_ratio=ratio,
        iterative_steps=steps,
        round_to=ROUND_TO,
        ignored_layers=[model.get_submodule(path) for path in network.head],
        output_transform=network.raw_maps,
    )


def torch_pruning_cut(network: Network) -> Trial:
    """torch-pruning to half of the channels, on a copy that is not counted."""
    model = copy.deepcopy(network.model)
    watch = Stopwatch()
    pruner = pruner_of(network, model, 1 - KEEP)
    watch.lap("trace")
    # Each group's indices hold only when the groups before it are cut.
    for group in pruner.step(interactive=True):
        watch.lap("solve")
        group.prune()
        watch.lap("cut")
    watch.lap("solve")
    return watch.trial(model)


def count(network: Network, model: nn.Module) -> int:
    """MACs as torch-pruning counts them: norms, activations and pools too."""
    return int(torch_pruning().utils.count_ops_and_params(model, (network.image,))[0])


def search_on_copies(network: Network) -> Trial:
    """torch-pruning to half of the MACs: prune new copies until one is near enough."""
    watch = Stopwatch()
    dense = count(network, network.model)
    model = network.model

    def kept_at(ratio: float) -> float:
        nonlocal model
        model = copy.deepcopy(network.model)
        pruner_of(network, model, ratio).step()
        return count(network, model) / dense

    tries = false_position(kept_at)
    watch.lap("search")
    return watch.trial(model, tries)


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
    raise missed(kept, MAX_TRIES)


def search_in_small_steps(network: Network) -> Trial:
    """torch-pruning to half of the MACs: prune a single copy a little and count, again and again."""
    watch = Stopwatch()
    dense = count(network, network.model)
    model = copy.deepcopy(network.model)
    steps = round(1 / STEP)
    pruner = pruner_of(network, model, 1.0, steps)
    kept, taken = 1.0, 0
    while kept > KEEP + TOLERANCE and taken < steps:
        pruner.step()
        taken += 1
        kept = count(network, model) / dense
    if abs(kept - KEEP) > TOLERANCE:
        raise missed(kept, taken)
    watch.lap("search")
    return watch.trial(model, taken)


def missed(kept: float, tries: int) -> SlimError:
    return SlimError(f"{kept:.4f} of the MACs left after {tries} prunings, aimed at {KEEP}")


def in_turns(network: Network, jobs: Mapping[str, Job], repeats: int, warmup: int = 1) -> list[Row]:
    """A row a job. The jobs take turns, and in every other turn the last begins; a job that fails is not run again."""
    trials: dict[str, list[Trial]] = {tool: [] for tool in jobs}
    failures: dict[str, str] = {}
    for turn in range(-warmup, repeats):
        for tool in list(jobs) if turn % 2 == 0 else list(jobs)[::-1]:
            if tool in failures:
                continue
            gc.collect()
            try:
                trial = jobs[tool]()
            except Exception as error:
                failures[tool] = first_line(error)
                continue
            if turn >= 0:
                trials[tool].append(trial)
    dense = slim.cost(network.model, network.image).macs
    return [summary(network, tool, trials[tool], dense, failures.get(tool, "")) for tool in jobs]


def summary(network: Network, tool: str, trials: list[Trial], dense: int, failure: str) -> Row:
    """The row of one job; running the pruned network is part of it."""
    macs = math.nan
    if not failure:
        try:
            macs = slim.cost(trials[-1].model, network.image).macs / dense
        except Exception as error:
            failure = f"the pruned network does not run: {first_line(error)}"
    if failure:
        return Row(network.name, tool, {}, math.nan, math.nan, 0, 0, macs, failure)
    seconds = {phase: median(trial.seconds[phase] for trial in trials) for phase in trials[0].seconds}
    total_s = median(sum(trial.seconds.values()) for trial in trials)
    cpu_s = median(trial.cpu_s for trial in trials)
    return Row(network.name, tool, seconds, total_s, cpu_s, len(trials), trials[-1].prunings, macs)


def first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def compare_cuts(network: Network, repeats: int) -> list[Row]:
    """Job 1: rows of slim and of torch-pruning."""
    jobs = {"slim": lambda: slim_cut(network, channels=KEEP), "torch-pruning": lambda: torch_pruning_cut(network)}
    return in_turns(network, jobs, repeats)


def compare_searches(network: Network, repeats: int) -> list[Row]:
    """Job 2: rows of slim and of torch-pruning's faster way, measured in turns, and of its slower way, run twice."""
    ways = {
        "torch-pruning, new copies": lambda: search_on_copies(network),
        "torch-pruning, small steps": lambda: search_in_small_steps(network),
    }
    tried = in_turns(network, ways, repeats=2, warmup=0)
    faster, slower = sorted(tried, key=lambda row: (bool(row.failure), row.cpu_s))
    jobs = {"slim": lambda: slim_cut(network, macs=KEEP), faster.tool: ways[faster.tool]}
    return [*in_turns(network, jobs, repeats), slower]


def head_lines(phases: tuple[str, ...]) -> str:
    """The head of a Markdown table of rows."""
    titles = ["network", "tool", *(f"{p} s" for p in phases), "total s", "/ slim's", "CPU s", "/ slim's"]
    titles += ["runs", "prunings", "MACs left"]
    return "| " + " | ".join(titles) + " |\n|" + " --- |" * len(titles)


def line(row: Row, ours: Row, phases: tuple[str, ...]) -> str:
    """A row as Markdown; ``ours`` is slim's row on the same network."""
    if row.failure:
        cells = ["fails: " + row.failure.replace("|", "\\|"), *("" for _ in range(len(phases) + 6))]
    else:
        cells = [f"{row.seconds[p]:.3f}" for p in phases]
        cells += [f"{row.total_s:.3f}", f"{row.total_s / ours.total_s:.2f}"]
        cells += [f"{row.cpu_s:.3f}", f"{row.cpu_s / ours.cpu_s:.2f}"]
        cells += [str(row.runs), str(row.prunings), f"{row.macs:.1%}"]
    return "| " + " | ".join([row.network, row.tool, *cells]) + " |"


def cpu_name() -> str:
    """The processor as the system names it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def main(flags: SpeedFlags) -> None:
    torch_pruning()
    if flags.num_cores:
        torch.set_num_threads(flags.num_cores)
    networks = [build(name, flags.img, flags.seed) for name in flags.models]
    print(
        f"torch {torch.__version__}, torch-pruning {version('torch-pruning')}, {cpu_name()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads\none {flags.img}x{flags.img} image, random weights (seed {flags.seed}), "
        f"medians of {flags.repeats} runs in turns\n"
    )
    print("Half of the channels, once:\n")
    report(networks, compare_cuts, flags.repeats, ("trace", "solve", "cut"))
    print(f"\nHalf of the MACs, to within {TOLERANCE:.0%}:\n")
    report(networks, compare_searches, flags.repeats, ())


def report(
    networks: list[Network], compare: Callable[[Network, int], list[Row]], repeats: int, phases: tuple[str, ...]
) -> None:
    """Print a table, each network's rows as soon as they are there."""
    print(head_lines(phases))
    for network in networks:
        rows = compare(network, repeats)
        for row in rows:
            print(line(row, rows[0], phases), flush=True)


def cli(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    return run_script(SpeedFlags, main, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
