"""Run a grid of experiments: what is missing of it, and nothing twice.

python -m experiments.run experiments/grids/shapes-ablations.yaml --dry-run
python -m experiments.run experiments/grids/bccd-headline.yaml --only gate seed=0 --data-root datasets --weights yolov5n.pt

The same command continues after anything. A run whose rows stand in experiments/results counts as done, wherever it was made.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data import DetectionDataset
from data.results import ResultIds, result_ids
from data.settings import DataSettings
from detection.command import run_script
from detection.datasets import open_data
from slim import SlimError

from .executors import Executor, LocalExecutor, RayExecutor, SubmititExecutor
from .grid import Node
from .rows import add_rows, read_rows, rows_of
from .schedule import Schedule, estimated_seconds, make_schedule, summary
from .settings import GridFlags
from .store import NodeFailed, Task, failure, forget_failure, is_done, link_run, metrics_of


def make_executor(flags: GridFlags) -> Executor:
    if flags.executor == "ray":
        return RayExecutor(flags.address, flags.threads)
    if flags.executor == "submitit":
        return SubmititExecutor(
            Path(flags.store) / "submitit", flags.cluster, flags.at_once, flags.threads, flags.minutes
        )
    return LocalExecutor(flags.at_once)


def execute(schedule: Schedule, flags: GridFlags, executor: Executor, seconds: dict[str, float]) -> dict[str, str]:
    """Run all nodes that are missing, parents first, and write a run's rows as soon as it is whole; the failures' reasons.

    ``seconds`` are those that each node is expected to take.
    """
    store, failed = Path(flags.store).absolute(), dict[str, str]()
    waiting = {key: node for key, node in schedule.nodes.items() if not is_done(store, key)}
    for key in waiting if flags.retry_failed else ():
        forget_failure(store, key)
    running: dict[Any, Node] = {}
    written: set[str] = set()
    layout = "{desc} {percentage:3.0f}% [{elapsed}<{remaining}]"
    # In a log no bar, only a line for each run.
    with tqdm(total=round(sum(seconds.values())), bar_format=layout, disable=None) as bar:
        while True:
            for run in schedule.missing:
                if run.key not in written and all(is_done(store, node.key) for node in run.nodes):
                    add_rows(flags.results_file(schedule.grid["name"]), rows_of(run, store), schedule.order())
                    link_run(store, run)
                    written.add(run.key)
                    ap = metrics_of(store, run.evaluations[0][1].key)["ap"]
                    bar.write(f"{run}: AP {ap:.4f}; {len(written)} of {len(schedule.missing)} runs")
                    sys.stdout.flush()
            for key, node in list(waiting.items()):
                parents = [parent for _, parent in node.parents]
                why = failure(store, key) or next(
                    (f"its parent failed: {failed[p]}" for p in parents if p in failed), None
                )
                if why:
                    failed[key] = why
                    del waiting[key]
                elif len(running) < executor.capacity and all(is_done(store, parent) for parent in parents):
                    weights = str(Path(schedule.weights).absolute()) if schedule.weights else ""
                    task = Task(
                        node,
                        str(store),
                        weights,
                        flags.data_root and str(Path(flags.data_root).absolute()),
                        flags.threads,
                    )
                    running[executor.submit(task)] = node
                    del waiting[key]
            bar.set_description_str(f"{len(written)} of {len(schedule.missing)} runs, {len(running)} processes")
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
    schedule = make_schedule(path, flags)
    seconds = estimated_seconds(schedule, flags)
    print(summary(schedule, seconds, flags))
    if flags.dry_run:
        return
    failed: dict[str, str] = {}
    if schedule.missing:
        executor = make_executor(flags)
        try:
            failed = execute(schedule, flags, executor, seconds)
        finally:
            executor.close()
    print(table(schedule, flags))
    if flags.bootstrap:
        print(f"{compare_on_resamples(schedule, flags)} pairs compared on resampled images")
    if failed:
        runs = [run for run in schedule.missing if any(node.key in failed for node in run.nodes)]
        reason = next(iter(failed.values()))
        raise SlimError(f"{len(runs)} of {len(schedule.missing)} runs failed: {reason}; --retry-failed runs them again")


def table(schedule: Schedule, flags: GridFlags) -> str:
    """The rows of the selected runs, all classes together, as Markdown; for means and intervals see experiments.tables."""
    keys = {run.key: run for run in schedule.chosen}
    rows = [
        row for row in read_rows(flags.results_file(schedule.grid["name"])) if row["hash"] in keys and not row["class"]
    ]
    columns = ("run", "split", "AP", "AP50", "AP right after the cut", "M MACs", "M parameters", "epochs")
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for row in rows:
        aps = (row[name] and f"{float(row[name]):.4f}" for name in ("ap", "ap50", "cliff_ap"))
        costs = f"{int(row['macs']) / 1e6:.1f}", f"{int(row['params']) / 1e6:.3f}", row["epochs"]
        lines.append(f"| {' | '.join([str(keys[row['hash']]), row['split'], *aps, *costs])} |")
    return "\n".join(lines)


def compare_on_resamples(schedule: Schedule, flags: GridFlags) -> int:
    """Add rows to bootstrap.csv for the pairs that the grid's tables compare, and of which both predictions are here."""
    from .bootstrap import append_bootstrap_rows
    from .comparisons import BOOTSTRAP, compared_runs, read_specs
    from .comparisons import read_rows as read_frame

    rows, count = read_frame(Path(flags.results)), 0
    for spec in read_specs(schedule.path.parent):
        if spec.grid != schedule.grid["name"]:
            continue
        nodes = {run.key: node.key for run in schedule.runs for split, node in run.evaluations if split == spec.split}
        files = {key: Path(flags.store) / node / "run" / "predictions.json" for key, node in nodes.items()}
        here = {key for key, file in files.items() if file.is_file()}
        pairs = compared_runs(spec, rows)
        pairs = pairs[pairs["hash"].isin(here) & pairs["against_hash"].isin(here)].assign(split=spec.split)
        for run in {run.stages[0].data.file: run for run in schedule.runs}.values():
            of_data = pairs[pairs["data"] == Path(run.stages[0].data.file).stem]
            config = open_data(DataSettings(data=run.stages[0].data.file, data_root=flags.data_root))
            dataset = DetectionDataset(config, spec.split, schedule.grid["flags"].get("img", 320), cache="none")
            detections = functools.partial(_detections, files, result_ids(config, spec.split, dataset.files))
            count += append_bootstrap_rows(Path(flags.results) / BOOTSTRAP, dataset.ground_truth(), of_data, detections)
    return count


def _detections(files: Mapping[str, Path], ids: ResultIds, run: str) -> list[dict[str, Any]]:
    """The predictions of a run, by the indices of images and classes."""
    return ids.indices(json.loads(files[run].read_text(encoding="utf-8")))


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
