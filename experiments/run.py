"""Run a grid of experiments: what is missing of it, and nothing twice.

python -m experiments.run experiments/grids/shapes-which.yaml --dry-run
python -m experiments.run experiments/grids/bccd-headline.yaml --only gate seed=0 --data-root datasets --weights yolov5n.pt

The same command continues after anything. A run whose rows stand in experiments/results counts as done, wherever it was made.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

from tqdm import tqdm

import slim
from data import DetectionDataset
from data.settings import DataSettings
from detection.command import run_script
from detection.datasets import open_data
from detection.network import example_image, file_digest, start_network
from slim import SlimError

from .executors import Executor, LocalExecutor, RayExecutor, SubmititExecutor
from .grid import TRAININGS, Data, Node, Run, expand, read_grid
from .rows import FORWARD_AND_BACKWARD, RESULTS, add_rows, read_rows, rows_of
from .store import NodeFailed, Task, failure, forget_failure, is_done, link_run, metrics_of

MACS_PER_SECOND, SECONDS_AN_IMAGE, SECONDS_A_PIXEL, SECONDS_A_NODE = 3.4e10, 0.004, 1.4e-7, 25.0
"""Of one core in training, what each image and its pixels cost besides, and a script's start with its evaluation: YOLOv5n in
bfloat16 on a Xeon with AVX-512, where the estimate is in the rows' own proportion once there are some."""


@dataclass(frozen=True)
class GridFlags:
    """Options."""

    only: Annotated[tuple[str, ...], "methods and name=value of axes or seed, as patterns: runs that match"] = ()
    dry_run: Annotated[bool, "tell runs, epochs and estimated hours, and run nothing"] = False
    executor: Annotated[Literal["local", "ray", "submitit"], "where runs go"] = "local"
    at_once: Annotated[int, "local, submitit: runs at once", "at least 1"] = 2
    threads: Annotated[int, "ray, submitit: cores of a run; local runs share this machine's", "at least 1"] = 1
    address: Annotated[str | None, "ray: the cluster's address; else one of this machine is started"] = None
    cluster: Annotated[str | None, "submitit: slurm or local; else what it finds"] = None
    minutes: Annotated[int, "submitit: time limit of a job", "at least 1"] = 240
    store: Annotated[str, "folder of the runs, shared by all machines"] = "runs/experiments"
    results: Annotated[str, "folder of the rows, a CSV file a grid"] = str(RESULTS)
    weights: Annotated[str, "the checkpoint that chains start from; else the grid's"] = ""
    data_root: Annotated[str | None, "folder of data sets; else $SLIM_DATA_ROOT, else ./datasets"] = None
    retry_failed: Annotated[bool, "run again what failed before"] = False
    bootstrap: Annotated[
        bool, "also compare, on resampled images, the pairs of the grid's tables whose predictions are in --store"
    ] = False


@dataclass
class Plan:
    """What is to be done for a grid: of the chosen runs those without rows, and the nodes that they need, parents first."""

    path: Path
    grid: dict[str, Any]
    runs: list[Run]
    chosen: list[Run]
    missing: list[Run]
    weights: str
    nodes: dict[str, Node] = field(default_factory=dict)

    def order(self) -> list[str]:
        return [run.key for run in self.runs]


def make_plan(path: str, flags: GridFlags) -> Plan:
    """Read a grid and find what is missing of the runs that --only selects."""
    grid = read_grid(path)
    weights = flags.weights or grid.get("weights", "")
    img = grid["flags"].get("img", 320)

    @functools.cache
    def data_of(file: str) -> Data:
        config = open_data(DataSettings(data=file, data_root=flags.data_root))
        splits = {
            s: DetectionDataset(config, s, img, cache="none") for s in dict.fromkeys(("train", "val", *grid["splits"]))
        }
        return Data(file, " ".join(split.digest()[:16] for split in splits.values()), len(splits["train"]))

    runs = expand(grid, data_of, file_digest(weights) if weights else "")
    chosen = [run for run in runs if is_selected(run, flags.only)]
    if not chosen:
        raise SlimError(f"--only {' '.join(flags.only)}: selects none of {len(runs)} runs, such as {runs[0]}")
    done = {(row["hash"], row["split"]) for row in read_rows(results_file(grid, flags))}
    missing = [run for run in chosen if not all((run.key, split) in done for split, _ in run.evaluations)]
    plan = Plan(Path(path), grid, runs, chosen, missing, weights)
    known = {node.key: node for run in runs for node in run.nodes}

    def need(node: Node) -> None:
        for _, parent in node.parents:
            need(known[parent])
        plan.nodes.setdefault(node.key, node)

    for run in missing:
        for node in run.nodes:
            need(node)
    return plan


def results_file(grid: dict[str, Any], flags: GridFlags) -> Path:
    return Path(flags.results) / f"{grid['name']}.csv"


def is_selected(run: Run, only: Sequence[str]) -> bool:
    """Whether one pattern of each kind (method, and each name=) matches a run."""
    kinds: dict[str, list[str]] = {}
    for pattern in only:
        kinds.setdefault(pattern.partition("=")[0] if "=" in pattern else "", []).append(pattern)
    return all(any(fnmatchcase(word, p) for word in run.words for p in patterns) for patterns in kinds.values())


def estimated_seconds(plan: Plan, flags: GridFlags) -> dict[str, float]:
    """Core seconds of each node that is not done, from its training's MACs and images, and how long rows so far took."""
    img = plan.grid["flags"].get("img", 320)
    cfg = plan.grid["flags"].get("cfg", "models/yolov5n.yaml")
    dense = slim.cost(start_network(plan.weights, cfg, ["object"]).model, example_image(img)).macs
    images = {Path(node.data.file).stem: node.data.train_images for node in plan.nodes.values()}
    rows = [row for row in read_rows(results_file(plan.grid, flags)) if row["data"] in images and float(row["seconds"])]
    ratios = [
        float(row["seconds"])
        / training_seconds(float(row["training_macs"]), int(row["epochs"]) * images[row["data"]], img)
        for row in rows
    ]
    slower = median(ratios) if ratios else 1.0
    keep: dict[str, float] = {}
    found = {}
    for key, node in plan.nodes.items():
        parent = dict(node.parents).get("weights")
        share = dict(node.flags).get("macs") or 1.0 if node.script not in TRAININGS else 1.0
        keep[key] = keep.get(parent or "", 1.0) * min(1.0, float(share))
        if is_done(flags.store, key):
            continue
        seen = node.data.train_images * node.epochs
        found[key] = SECONDS_A_NODE + slower * training_seconds(
            FORWARD_AND_BACKWARD * keep[key] * dense * seen, seen, img
        )
    return found


def training_seconds(macs: float, images: int, img: int) -> float:
    """Of one core, for so many MACs, gradients included, on so many images of ``img`` pixels a side."""
    return macs / MACS_PER_SECOND + images * (SECONDS_AN_IMAGE + SECONDS_A_PIXEL * img**2)


def summary(plan: Plan, seconds: dict[str, float], flags: GridFlags) -> str:
    """A line a method, and the total."""
    lines = [f"{plan.grid['name']}: {len(plan.runs)} runs, {len(plan.missing)} to do"]
    counted: set[str] = set()
    for method in plan.grid["methods"]:
        runs = [run for run in plan.missing if run.method == method]
        new = {node.key: node for run in runs for node in run.nodes if node.key in seconds and node.key not in counted}
        counted |= new.keys()
        hours = sum(seconds[key] for key in new) / 3600
        lines.append(
            f"  {method}: {len(runs)} runs, {sum(n.epochs for n in new.values())} epochs, {hours:.1f} core hours"
        )
    rest = sum(s for key, s in seconds.items() if key not in counted)
    total = sum(seconds.values()) / 3600
    at_once = flags.at_once if flags.executor == "local" else 1
    note = f" (teachers' included: {rest / 3600:.1f})" if rest else ""
    epochs = sum(plan.nodes[key].epochs for key in seconds)
    lines.append(
        f"  in all: {epochs} epochs, {total:.1f} core hours{note}, about {total / at_once:.1f} hours at {at_once} at once"
    )
    return "\n".join(lines)


def make_executor(flags: GridFlags) -> Executor:
    if flags.executor == "ray":
        return RayExecutor(flags.address, flags.threads)
    if flags.executor == "submitit":
        return SubmititExecutor(
            Path(flags.store) / "submitit", flags.cluster, flags.at_once, flags.threads, flags.minutes
        )
    return LocalExecutor(flags.at_once)


def execute(plan: Plan, flags: GridFlags, executor: Executor) -> dict[str, str]:
    """Run all nodes that are missing, parents first, and write a run's rows as soon as it is whole; the failures' reasons."""
    store, failed = Path(flags.store).absolute(), dict[str, str]()
    seconds = estimated_seconds(plan, flags)
    waiting = {key: node for key, node in plan.nodes.items() if not is_done(store, key)}
    for key in waiting if flags.retry_failed else ():
        forget_failure(store, key)
    running: dict[Any, Node] = {}
    written: set[str] = set()
    with tqdm(
        total=round(sum(seconds.values())), unit="s", bar_format="{desc} {percentage:3.0f}% [{elapsed}<{remaining}]"
    ) as bar:
        while True:
            for run in plan.missing:
                if run.key not in written and all(is_done(store, node.key) for node in run.nodes):
                    add_rows(results_file(plan.grid, flags), rows_of(run, store), plan.order())
                    link_run(store, run)
                    written.add(run.key)
                    bar.write(f"{run}: AP {metrics_of(store, run.evaluations[0][1].key)['ap']:.4f}")
            for key, node in list(waiting.items()):
                parents = [parent for _, parent in node.parents]
                why = failure(store, key) or next(
                    (f"its parent failed: {failed[p]}" for p in parents if p in failed), None
                )
                if why:
                    failed[key] = why
                    del waiting[key]
                elif len(running) < executor.capacity and all(is_done(store, parent) for parent in parents):
                    weights = str(Path(plan.weights).absolute()) if plan.weights else ""
                    task = Task(
                        node,
                        str(store),
                        weights,
                        flags.data_root and str(Path(flags.data_root).absolute()),
                        flags.threads,
                    )
                    running[executor.submit(task)] = node
                    del waiting[key]
            bar.set_description_str(f"{len(written)} of {len(plan.missing)} runs, {len(running)} processes")
            if not running:
                return failed
            for handle, error in executor.finished(list(running)):
                node = running.pop(handle)
                bar.update(round(seconds.get(node.key, 0.0)))
                if error is not None:
                    failed[node.key] = str(error)
                    bar.write(f"failed: {error}")
                    if not isinstance(error, NodeFailed):
                        raise SlimError(f"{node.script} {node.key}: {error}") from error


def run_grid(path: str, flags: GridFlags) -> None:
    """A grid's command; SlimError at its end where runs failed."""
    plan = make_plan(path, flags)
    print(summary(plan, estimated_seconds(plan, flags), flags))
    if flags.dry_run:
        return
    failed: dict[str, str] = {}
    if plan.missing:
        executor = make_executor(flags)
        try:
            failed = execute(plan, flags, executor)
        finally:
            executor.close()
    print(table(plan, flags))
    if flags.bootstrap:
        print(f"{compare_on_resamples(plan, flags)} pairs compared on resampled images")
    if failed:
        runs = [run for run in plan.missing if any(node.key in failed for node in run.nodes)]
        reason = next(iter(failed.values()))
        raise SlimError(f"{len(runs)} of {len(plan.missing)} runs failed: {reason}; --retry-failed runs them again")


def table(plan: Plan, flags: GridFlags) -> str:
    """The rows of the selected runs, all classes together, as Markdown; for means and intervals see experiments.tables."""
    keys = {run.key: run for run in plan.chosen}
    rows = [row for row in read_rows(results_file(plan.grid, flags)) if row["hash"] in keys and not row["class"]]
    columns = ("run", "split", "AP", "AP50", "AP right after the cut", "M MACs", "M parameters", "epochs")
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for row in rows:
        aps = (row[name] and f"{float(row[name]):.4f}" for name in ("ap", "ap50", "cliff_ap"))
        costs = f"{int(row['macs']) / 1e6:.1f}", f"{int(row['params']) / 1e6:.3f}", row["epochs"]
        lines.append(f"| {' | '.join([str(keys[row['hash']]), row['split'], *aps, *costs])} |")
    return "\n".join(lines)


def compare_on_resamples(plan: Plan, flags: GridFlags) -> int:
    """Add rows to bootstrap.csv for the pairs that the grid's tables compare, and of which both predictions are here."""
    from .bootstrap import append_bootstrap_rows
    from .comparisons import BOOTSTRAP, compared_runs, read_specs
    from .comparisons import read_rows as read_frame

    rows, count = read_frame(Path(flags.results)), 0
    for spec in read_specs(plan.path.parent):
        if spec.grid != plan.grid["name"]:
            continue
        nodes = {run.key: node.key for run in plan.runs for split, node in run.evaluations if split == spec.split}
        files = {key: Path(flags.store) / node / "run" / "predictions.json" for key, node in nodes.items()}
        here = {key for key, file in files.items() if file.is_file()}
        pairs = compared_runs(spec, rows)
        pairs = pairs[pairs["hash"].isin(here) & pairs["against_hash"].isin(here)].assign(split=spec.split)
        for run in {run.stages[0].data.file: run for run in plan.runs}.values():
            of_data = pairs[pairs["data"] == Path(run.stages[0].data.file).stem]
            config = open_data(DataSettings(data=run.stages[0].data.file, data_root=flags.data_root))
            truth = DetectionDataset(
                config, spec.split, plan.grid["flags"].get("img", 320), cache="none"
            ).ground_truth()
            count += append_bootstrap_rows(Path(flags.results) / BOOTSTRAP, truth, of_data, files.__getitem__)
    return count


def cli(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    path = words.pop(0) if words and not words[0].startswith("-") else ""

    def act(flags: GridFlags) -> None:
        if not path:
            raise SlimError("no grid given; python -m experiments.run experiments/grids/NAME.yaml")
        run_grid(path, flags)

    return run_script(GridFlags, act, __doc__ or "", words)


if __name__ == "__main__":
    sys.exit(cli())
