"""Rows of a benchmark as Markdown, JSON and a plot."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import slim
from deploy import threads_of
from tracking import plot_runtimes
from tracking.report.markdown import table

from .timing import timing_warning

Row = dict[str, Any]
"""One network under one engine, as ``benchmark.json`` has it, see ``detection.benchmark.rows_of``."""

COLUMNS: dict[str, Callable[[Row], str]] = {
    "network": lambda row: str(row["network"]),
    "engine": lambda row: str(row["engine"]),
    "precision": lambda row: str(row["precision"]),
    "pixels": lambda row: str(row["img"]),
    "cores": lambda row: str(row["num_cores"] or "all"),
    "batch": lambda row: str(row["batch_size"]),
    "ms": lambda row: f"{row['milliseconds']:.2f}",
    "10 to 90 %": lambda row: f"{row['p10_ms']:.2f} to {row['p90_ms']:.2f}",
    "FPS": lambda row: f"{row['fps']:.1f}",
    "times faster": lambda row: f"{row['speed_up']:.2f}",
    "AP": lambda row: "" if row["ap"] is None else f"{row['ap']:.4f}",
    "MB": lambda row: f"{row['bytes'] / 1e6:.2f}",
    "M MACs": lambda row: "" if row["macs"] is None else f"{row['macs'] / 1e6:.1f}",
    "M parameters": lambda row: "" if row["params"] is None else f"{row['params'] / 1e6:.3f}",
    "activation": lambda row: str(row["activation"]),
}


def markdown(rows: Sequence[Row], machine: str) -> str:
    """A line about the machine, one that warns of unsteady times, and the table; columns without content are left out."""
    columns = {title: [text(row) for row in rows] for title, text in COLUMNS.items()}
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    head = f"{machine}; medians of {rows[0]['runs']} runs, interleaved."
    if warning := timing_warning(row["warning"] for row in rows):
        head += f"\n\n{warning}"
    return f"{head}\n\n{table(list(columns), list(zip(*columns.values(), strict=True)))}"


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The file's stem, after its run's for last and best, which every training writes; the path where others have the same."""

    def short(path: Path) -> str:
        parts = [part for part in path.with_suffix("").parts if part != "weights"]
        return "/".join(parts[-2:]) if path.stem in ("last", "best") else path.stem

    times = Counter(short(Path(path)) for path in set(paths))
    return {path: name if times[name := short(Path(path))] == 1 else path for path in paths}


def machine_text() -> str:
    """The processor, its cores and the versions of the runtimes that are installed."""
    runtimes = [f"{name} {version(name)}" for name in ("torch", "onnxruntime", "openvino") if find_spec(name)]
    return f"{processor_name()}, {threads_of(0)} cores; {', '.join(runtimes)}"


def processor_name() -> str:
    """The processor as the system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def write(rows: Sequence[Row], machine: str, folder: Path, *, finished: bool) -> None:
    """Write benchmark.md, the plot of AP against milliseconds, and where all is measured benchmark.json, which says that."""
    slim.write_text_atomically(folder / "benchmark.md", markdown(rows, machine) + "\n")
    points = [
        (str(row["network"]), f"{row['engine']}, {row['precision']}", row["milliseconds"], row["ap"])
        for row in rows
        if row["ap"] is not None
    ]
    if points:
        plot_runtimes(points, folder / "ap_against_ms.png")
    if finished:
        content = {"machine": machine, "rows": rows}
        slim.write_text_atomically(folder / "benchmark.json", json.dumps(content, indent=1) + "\n")
