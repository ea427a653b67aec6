"""Tidy rows: one for each run, split and class, kept as CSV in the repository."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from slim import write_text_atomically

from .grid import Run
from .store import facts_of, metrics_of

COLUMNS = (
    *("hash", "grid", "method", "keep", "axes", "seed", "parent", "data", "split", "class", "ap", "ap50", "ap75"),
    *("cliff_ap", "macs", "params", "epochs", "training_macs", "seconds", "commit", "hardware", "versions"),
)
"""Of the rows, one a run, split and class (empty: all classes). AP 0..1; MACs of one image; seconds of the whole chain."""
FORWARD_AND_BACKWARD = 3
"""A training step's multiply-accumulates over those of the forward pass: gradients of maps and of weights cost as much each."""


def rows_of(run: Run, store: str | Path) -> list[dict[str, Any]]:
    """A finished run's rows. AP 0..1; training_macs are those of all trainings of the chain, teachers not counted."""
    last, cuts, spent, seconds = metrics_of(store, run.key), [], 0, 0.0
    for node in run.stages:
        metrics, facts = metrics_of(store, node.key), facts_of(store, node.key)
        spent += FORWARD_AND_BACKWARD * int(metrics["macs"]) * node.data.train_images * node.epochs
        seconds += float(facts["seconds"])
        cuts += [] if node.epochs else [metrics["ap"]]
    facts, axes = facts_of(store, run.key), dict(run.axes)
    common = {
        "hash": run.key,
        "grid": run.grid,
        "method": run.method,
        "keep": axes.pop("keep", ""),
        "axes": " ".join(f"{name}={value}" for name, value in sorted(axes.items())),
        "seed": run.seed,
        "parent": run.stages[0].key if len(run.stages) > 1 else "",
        "data": Path(run.stages[0].data.file).stem,
        "cliff_ap": shown(cuts[-1]) if cuts else "",
        "macs": last["macs"],
        "params": last["params"],
        "epochs": run.epochs,
        "training_macs": spent,
        "seconds": round(seconds),
        **{name: facts[name] for name in ("commit", "hardware", "versions")},
    }
    rows = []
    for split, node in run.evaluations:
        metrics = metrics_of(store, node.key)
        whole = {name: shown(metrics[name]) for name in ("ap", "ap50", "ap75")}
        rows.append(common | {"split": split, "class": "", **whole})
        rows += [common | {"split": split, "class": name, "ap": shown(ap)} for name, ap in metrics["per_class"].items()]
    return rows


def shown(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def read_rows(file: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV file as text; none where there is no file."""
    if not Path(file).is_file():
        return []
    with Path(file).open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def add_rows(file: str | Path, new: Sequence[dict[str, Any]], order: Sequence[str]) -> None:
    """Put a run's rows into a file, in place of older ones of that run; whole, or not at all.

    Runs stand in the order of their keys in ``order``, those that it lacks first.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        kept = [row for row in read_rows(file) if row["hash"] not in {row["hash"] for row in new}]
        rows = [*kept, *({c: str(row.get(c, "")) for c in COLUMNS} for row in new)]
        place = {key: number for number, key in enumerate(order)}
        rows.sort(key=lambda row: place.get(row["hash"], -1))
        stream = io.StringIO()
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text_atomically(file, stream.getvalue())
