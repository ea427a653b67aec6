"""What is to be done for a grid, and what it will cost."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Any

import slim
from data import DetectionDataset
from data.settings import DataSettings
from detection.datasets import open_data
from detection.network import example_image, file_digest, start_network
from slim import SlimError

from .grid import TRAININGS, Data, Node, Run, expand, read_grid
from .rows import FORWARD_AND_BACKWARD, read_rows
from .settings import GridFlags
from .store import is_done

MACS_PER_SECOND, SECONDS_AN_IMAGE, SECONDS_A_PIXEL, SECONDS_A_NODE = 3.4e10, 0.004, 1.4e-7, 25.0
"""Of one core in training, what each image and its pixels cost besides, and a script's start with its evaluation: YOLOv5n in
bfloat16 on a Xeon with AVX-512, where the estimate is in the rows' own proportion once there are some."""


@dataclass
class Schedule:
    """What is to be done for a grid: of the chosen runs those without rows, and the nodes that they need, parents first."""

    path: Path
    grid: Mapping[str, Any]
    runs: list[Run]
    chosen: list[Run]
    missing: list[Run]
    weights: str
    nodes: dict[str, Node] = field(default_factory=dict)

    def order(self) -> list[str]:
        return [run.key for run in self.runs]


def make_schedule(path: str, flags: GridFlags) -> Schedule:
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
    done = {(row["hash"], row["split"]) for row in read_rows(flags.results_file(grid["name"]))}
    missing = [run for run in chosen if not all((run.key, split) in done for split, _ in run.evaluations)]
    schedule = Schedule(Path(path), grid, runs, chosen, missing, weights)
    for run in missing:
        schedule.nodes |= {node.key: node for node in run.nodes}
    return schedule


def is_selected(run: Run, only: Sequence[str]) -> bool:
    """Whether one pattern of each kind (method, and each name=) matches a run."""
    kinds: dict[str, list[str]] = {}
    for pattern in only:
        kinds.setdefault(pattern.partition("=")[0] if "=" in pattern else "", []).append(pattern)
    return all(any(fnmatchcase(word, p) for word in run.words for p in patterns) for patterns in kinds.values())


def estimated_seconds(schedule: Schedule, flags: GridFlags) -> dict[str, float]:
    """Core seconds of each node that is not done, from its training's MACs and images, and how long rows so far took."""
    img = schedule.grid["flags"].get("img", 320)
    cfg = schedule.grid["flags"].get("cfg", "models/yolov5n.yaml")
    dense = slim.cost(start_network(schedule.weights, cfg, ["object"]).model, example_image(img)).macs
    images = {Path(node.data.file).stem: node.data.train_images for node in schedule.nodes.values()}
    rows = [row for row in read_rows(flags.results_file(schedule.grid["name"])) if row["data"] in images]
    ratios = [
        float(row["seconds"])
        / training_seconds(float(row["training_macs"]), int(row["epochs"]) * images[row["data"]], img)
        for row in rows
        if float(row["seconds"])
    ]
    slower = median(ratios) if ratios else 1.0
    keep: dict[str, float] = {}
    found = {}
    for key, node in schedule.nodes.items():
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


def summary(schedule: Schedule, seconds: dict[str, float], flags: GridFlags) -> str:
    """A line a method, and the total."""
    lines = [f"{schedule.grid['name']}: {len(schedule.runs)} runs, {len(schedule.missing)} to do"]
    counted: set[str] = set()
    for method in schedule.grid["methods"]:
        runs = [run for run in schedule.missing if run.method == method]
        new = {node.key: node for run in runs for node in run.nodes if node.key in seconds and node.key not in counted}
        counted |= new.keys()
        hours = sum(seconds[key] for key in new) / 3600
        lines.append(
            f"  {method}: {len(runs)} runs, {sum(n.epochs for n in new.values())} epochs, {hours:.1f} core hours"
        )
    total = sum(seconds.values()) / 3600
    at_once = flags.at_once if flags.executor == "local" else 1
    epochs = sum(schedule.nodes[key].epochs for key in seconds)
    lines.append(
        f"  in all: {epochs} epochs, {total:.1f} core hours, about {total / at_once:.1f} hours at {at_once} at once"
    )
    return "\n".join(lines)
