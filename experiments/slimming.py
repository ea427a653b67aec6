"""Dense, masked, cut and fine-tuned in one table, made by running the project's own scripts.

python -m experiments.slimming                      the small demonstration on the synthetic shapes
python -m experiments.slimming --data data/bccd.yaml --weights yolov5n.pt ...     see the README for the full command
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import slim
from engine import EngineError, RunFolder
from engine.command import RunFlags, flag, run_script

ROOT = Path(__file__).resolve().parent.parent
# From scratch on small images the default gains leave classes and objectness almost without gradient.
SHAPES = ["optimizer=adamw", "lr=0.003", "mosaic=0", "scale=0.25", "cls=5", "obj=5"]


@dataclass(frozen=True)
class SlimmingFlags(RunFlags):
    """One comparison."""

    project: str = flag("runs/demo", "folder that holds the run folders")
    weights: str = flag("", "checkpoint to start from; '' trains --cfg from scratch")
    cfg: str = flag("models/yolov5n.yaml", "model description, used without --weights")
    data: str = flag("data/shapes.yaml", "data set description")
    data_root: str | None = flag(None, "folder of data sets; else $SLIM_DATA_ROOT, else ./datasets")
    img: int = flag(128, "image size in pixels")
    batch_size: int = flag(8, "images a step")
    workers: int = flag(1, "loader processes")
    dense_epochs: int = flag(30, "epochs of the dense baseline")
    sparse_epochs: int = flag(16, "epochs of sparse training")
    finetune_epochs: int = flag(14, "epochs of fine-tuning after each cut")
    macs: list[float] = flag([0.5], "shares of the MACs to keep, one cut each")  # noqa: RUF009
    eval_every: int = flag(15, "epochs between evaluations")
    train: list[str] = flag(SHAPES, "further flags of every training, as name=value")  # noqa: RUF009
    sparse: list[str] = flag(["pull-from=11", "final-lr-ratio=0.7"], "further flags of the sparse training")  # noqa: RUF009
    finetune: list[str] = flag(["lr=0.002"], "further flags of the fine-tuning after a cut")  # noqa: RUF009
    test: bool = flag(False, "also evaluate on the test split (nothing is chosen by it)")


@dataclass(frozen=True)
class Row:
    """A line of the table; what was not measured is None."""

    step: str
    ap: float
    ap50: float
    test_ap: float | None
    macs: int
    params: int
    milliseconds: float | None = None


class Comparison:
    """Runs scripts one after another into one run folder and reads their metrics back."""

    def __init__(self, flags: SlimmingFlags) -> None:
        self.flags = flags
        self.run = RunFolder.create(flags.project, flags.name)
        self.data = ["--data", flags.data, *(["--data-root", flags.data_root] if flags.data_root else [])]
        self.common = [
            "--img",
            str(flags.img),
            "--batch-size",
            str(flags.batch_size),
            "--seed",
            str(flags.seed),
            "--device",
            flags.device,
        ]

    def script(self, name: str, folder: str, *arguments: str) -> Path:
        """Run one script; its run folder."""
        command = [f"{name}.py", *arguments, "--project", str(self.run.path), "--name", folder]
        print("$ python " + " ".join(a or "''" for a in command), flush=True)
        done = subprocess.run([sys.executable, *command], cwd=ROOT, check=False)
        if done.returncode:
            raise EngineError(f"{name}.py ended with exit code {done.returncode}; its message stands above")
        return self.run.path / folder

    def training(self, name: str, folder: str, epochs: int, weights: str, further: list[str]) -> Path:
        """A training's run folder."""
        flags = self.flags
        start = ["--weights", weights, "--cfg", flags.cfg, "--epochs", str(epochs)]
        steps = ["--eval-every", str(flags.eval_every), "--workers", str(flags.workers)]
        return self.script(name, folder, *start, *self.data, *self.common, *steps, *as_flags([*flags.train, *further]))

    def test_ap(self, weights: Path, folder: str) -> float | None:
        """AP on the test split."""
        if not self.flags.test:
            return None
        made = self.script(
            "val", f"{folder}-test", "--weights", str(weights), *self.data, *self.common, "--split", "test"
        )
        return float(metrics_of(made)["ap"])


def as_flags(pairs: list[str]) -> list[str]:
    """name=value pairs as command-line flags."""
    for pair in pairs:
        if "=" not in pair:
            raise EngineError(f"{pair}: expected name=value, as in lr=0.002")
    return [part for pair in pairs for part in ("--" + pair.split("=", 1)[0], pair.split("=", 1)[1])]


def metrics_of(folder: Path) -> dict[str, Any]:
    """A run folder's metrics.json."""
    content: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return content


def row_of(step: str, folder: Path, test_ap: float | None) -> Row:
    found = metrics_of(folder)
    return Row(step, found["ap"], found["ap50"], test_ap, found["macs"], found["params"])


def compare(flags: SlimmingFlags) -> list[Row]:
    """All steps; the table's rows in order."""
    work = Comparison(flags)
    dense = work.training("finetune", "dense", flags.dense_epochs, flags.weights, [])
    sparse = work.training("train_sparse", "sparse", flags.sparse_epochs, flags.weights, flags.sparse)
    last = Path("weights") / "last.pt"
    rows = [
        row_of("dense", dense, work.test_ap(dense / last, "dense")),
        row_of("sparse, not cut", sparse, work.test_ap(sparse / last, "sparse")),
    ]
    timed = {"dense": dense / last, "sparse, not cut": sparse / last}
    for macs in flags.macs:
        label = f"{macs:.0%}"
        cut = work.script(
            "prune",
            f"cut-{macs:g}",
            "--weights",
            str(sparse / last),
            "--img",
            str(flags.img),
            "--macs",
            str(macs),
            *work.data,
        )
        found = metrics_of(cut)
        full = found["before"]
        rows.append(
            Row(f"masked to {label}", found["masked_ap"], found["masked_ap50"], None, full["macs"], full["params"])
        )
        pruned = cut / "weights" / "pruned.pt"
        rows.append(row_of(f"cut to {label}", cut, work.test_ap(pruned, f"cut-{macs:g}")))
        tuned = work.training("finetune", f"finetune-{macs:g}", flags.finetune_epochs, str(pruned), flags.finetune)
        rows.append(row_of(f"fine-tuned at {label}", tuned, work.test_ap(tuned / last, f"finetune-{macs:g}")))
        timed |= {f"cut to {label}": pruned, f"fine-tuned at {label}": tuned / last}
    bench = work.script("benchmark", "benchmark", "--weights", *map(str, timed.values()), "--img", str(flags.img))
    times = json.loads((bench / "benchmark.json").read_text(encoding="utf-8"))
    by_step = dict(zip(timed, (float(t["milliseconds"]) for t in times), strict=True))
    # A masked network has the size of the one that it masks, and so its run time.
    rows = [replace(row, milliseconds=by_step.get(row.step, by_step["sparse, not cut"])) for row in rows]
    slim.write_text_atomically(work.run.path / "report.md", table(rows) + "\n")
    print(verdict(rows, metrics_of(sparse)["closed_share"]))
    return rows


def verdict(rows: list[Row], closed_share: float) -> str:
    """What the method promises, and whether this run kept it."""
    dense, tuned = rows[0].ap, [row for row in rows if row.step.startswith("fine-tuned")]
    lines = [f"gates closed after sparse training: {closed_share:.1%} (expected at least 45 %)"]
    lines += [f"{row.step}: AP {row.ap:.4f}, {row.ap - dense:+.4f} against dense" for row in tuned]
    return "\n".join(lines)


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| network | AP val | AP50 val | AP test | M MACs | M parameters | ms an image |", "| --- " * 7 + "|"]
    for r in rows:
        cells = [f"{x:.4f}" if x is not None else "" for x in (r.ap, r.ap50, r.test_ap)]
        ms = "" if r.milliseconds is None else f"{r.milliseconds:.1f}"
        lines.append(f"| {r.step} | {' | '.join(cells)} | {r.macs / 1e6:.1f} | {r.params / 1e6:.3f} | {ms} |")
    return "\n".join(lines)


def main(flags: SlimmingFlags) -> None:
    started = time.perf_counter()
    rows = compare(flags)
    print(table(rows))
    print(f"{time.perf_counter() - started:.0f} seconds")


def cli(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    return run_script(SlimmingFlags, main, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
