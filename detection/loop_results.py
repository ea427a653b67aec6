"""What a finished slimming loop leaves: files of the slim network, tables, TensorBoard, pictures and reports."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import slim
from data import DetectionDataset
from tracking import RunFolder, plot_widths, read_png, save_png, side_by_side, write_report
from tracking.journal import Journal

from .candidates import Candidate
from .evaluator import draw_networks


def save_networks(run: RunFolder, networks: Sequence[Path], plans: Sequence[slim.Plan]) -> Path:
    """Copy the phases' files of the slim network, its checkpoint first, and write the rounds' plans as one plan.

    Returns the checkpoint's place in the run.
    """
    for made in networks:
        slim.write_atomically(run.path / "weights" / made.name, functools.partial(shutil.copyfile, made))
    slim.write_text_atomically(run.path / "plan.json", functools.reduce(slim.compose, plans).to_json())
    return run.path / "weights" / networks[0].name


def write_reports(
    run: RunFolder, metrics: Mapping[str, Any], networks: Mapping[str, nn.Module], val_set: DetectionDataset, step: int
) -> None:
    """Pictures, metrics and reports, the phases' too: those were written before the phases had their names.

    `metrics` are metrics.json's, with those of the dense network as "baseline"; `networks` are drawn side by side on
    images of `val_set`, in TensorBoard at `step`, the number of rounds.
    """
    picture = side_by_side(draw_networks(networks, val_set))
    save_png(picture, run.path / "side_by_side.png")
    run.log_picture("detections", picture, step)
    widths = plot_widths(metrics["baseline"]["channels"], metrics["channels"], run.path / "widths.png")
    run.log_picture("widths", read_png(widths), step)
    run.write_metrics(metrics)
    run.close()
    for training in sorted(run.path.glob("*/results.csv")):
        write_report(RunFolder(training.parent))
    write_report(run)


def write_tensorboard(
    run: RunFolder, journal: Journal, candidates: Sequence[Candidate], baseline: Mapping[str, Any]
) -> None:
    """TensorBoard's series against the round, written anew: a loop that continued shows no step twice."""
    for old in run.path.glob("events.out.*"):
        old.unlink()
    for c in candidates:
        if c.round and not (c.attempt and c.accepted):
            continue
        found = journal.result(f"round{c.round}-try{c.attempt}-evaluation") if c.round else baseline
        assert found is not None
        run.log_channels(found["channels"], c.round)
        scalars = {"metrics/ap": c.ap, "metrics/ap50": c.ap50, "cost/macs": c.macs, "cost/params": c.params}
        run.log_scalars(scalars, c.round)
