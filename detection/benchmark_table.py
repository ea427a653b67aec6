"""Rows of a benchmark as Markdown, CSV and a plot."""

from __future__ import annotations

import csv
import io
import json
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import slim
from deploy import threads_of
from tracking import plot_trade_off

Column = tuple[str, Callable[["BenchmarkRow"], str]]


@dataclass(frozen=True)
class BenchmarkRow:
    """One network under one engine.

    ``milliseconds`` (median), ``p10_ms`` and ``p90_ms`` are of an image, ``fps`` is images in a second, ``speed_up`` the
    first row's median over this one's. ``bytes`` are those of the file that runs. None and "" stand for unknown.
    """

    weights: str
    network: str
    engine: str
    precision: str
    img: str
    batch_size: int
    num_cores: int
    milliseconds: float
    p10_ms: float
    p90_ms: float
    fps: float
    speed_up: float
    ap: float | None
    ap50: float | None
    bytes: int
    macs: int | None
    params: int | None
    activation: str
    runs: int

    @property
    def title(self) -> str:
        """What tells it from others in a plot."""
        return f"{self.network}, {self.engine}, {self.precision}"


COLUMNS: tuple[Column, ...] = (
    ("network", lambda row: row.network),
    ("engine", lambda row: row.engine),
    ("precision", lambda row: row.precision),
    ("pixels", lambda row: row.img),
    ("cores", lambda row: str(row.num_cores or "all")),
    ("batch", lambda row: str(row.batch_size)),
    ("ms", lambda row: f"{row.milliseconds:.2f}"),
    ("10 to 90 %", lambda row: f"{row.p10_ms:.2f} to {row.p90_ms:.2f}"),
    ("FPS", lambda row: f"{row.fps:.1f}"),
    ("times faster", lambda row: f"{row.speed_up:.2f}"),
    ("AP", lambda row: "" if row.ap is None else f"{row.ap:.4f}"),
    ("MB", lambda row: f"{row.bytes / 1e6:.2f}"),
    ("M MACs", lambda row: "" if row.macs is None else f"{row.macs / 1e6:.1f}"),
    ("M parameters", lambda row: "" if row.params is None else f"{row.params / 1e6:.3f}"),
    ("activation", lambda row: row.activation),
)
SHARED = {"pixels": "{} pixels", "cores": "CPU threads: {}", "batch": "batch size {}", "precision": "{}"}
"""Columns that are told once, above the table, where all rows agree."""


def markdown(rows: Sequence[BenchmarkRow], machine: str) -> str:
    """A line about the machine and all that the rows share, and the table; columns without content are left out."""
    cells = {title: [text(row) for row in rows] for title, text in COLUMNS}
    shared = {title: texts[0] for title, texts in cells.items() if title in SHARED and len(set(texts)) == 1}
    kept = [title for title, texts in cells.items() if title not in shared and any(texts)]
    told = [SHARED[title].format(text) for title, text in shared.items()]
    lines = [f"{'; '.join([machine, *told])}; medians of {rows[0].runs} runs, interleaved.", ""]
    lines += [f"| {' | '.join(kept)} |", "| --- " * len(kept) + "|"]
    lines += [f"| {' | '.join(cells[title][number] for title in kept)} |" for number in range(len(rows))]
    return "\n".join(lines)


def as_csv(rows: Sequence[BenchmarkRow]) -> str:
    """All figures, a line for each row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(BenchmarkRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def plot(rows: Sequence[BenchmarkRow], path: Path) -> None:
    """AP against milliseconds of the rows that have an AP, where there is one."""
    points = {row.title: (row.milliseconds, row.ap) for row in rows if row.ap is not None}
    if points:
        plot_trade_off({"milliseconds an image": points}, path)


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The file's stem; where that is not enough with folders before it (the run's, not its ``weights``), or its suffix."""
    options = {path: [*_tails(Path(path).with_suffix("")), *_tails(Path(path)), path] for path in paths}
    times = Counter(name for names in options.values() for name in set(names))
    return {path: next(n for n in names if times[n] == 1 or n == path) for path, names in options.items()}


def _tails(path: Path) -> list[str]:
    """The last part, the last two, ...; last and best, which every training writes, at least with their run."""
    parts = [part for part in path.parts if part not in ("weights", path.anchor)]
    fewest = 2 if path.stem in ("last", "best") and len(parts) > 1 else 1
    return ["/".join(parts[-count:]) for count in range(fewest, len(parts) + 1)]


def machine_text() -> str:
    """The processor, its cores and the runtimes' versions."""
    runtimes = [f"{name} {version(name)}" for name in ("torch", "onnxruntime", "openvino")]
    return f"{processor_name()}, {threads_of(0)} cores; {', '.join(runtimes)}"


def processor_name() -> str:
    """The processor as the system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def write(rows: Sequence[BenchmarkRow], machine: str, folder: Path, *, finished: bool) -> None:
    """benchmark.md, benchmark.csv, the plot, and where all is measured benchmark.json, which says that."""
    slim.write_text_atomically(folder / "benchmark.md", markdown(rows, machine) + "\n")
    slim.write_text_atomically(folder / "benchmark.csv", as_csv(rows))
    plot(rows, folder / "ap_against_ms.png")
    if finished:
        content = {"machine": machine, "rows": [asdict(row) for row in rows]}
        slim.write_text_atomically(folder / "benchmark.json", json.dumps(content, indent=1) + "\n")
