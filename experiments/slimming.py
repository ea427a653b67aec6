"""Dense, masked, cut and fine-tuned in one table, made by running the project's own scripts.

python -m experiments.slimming                      the small demonstration on the synthetic shapes
python -m experiments.slimming --data data/bccd.yaml --weights yolov5n.pt ...     see the README for the full command
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch

import slim
from detection.command import as_arguments, flat, run_script
from detection.flags import ScriptFlags
from slim import SlimError
from tracking import COMPARISON_FILE, RunFolder, write_report
from tracking.settings import RunSettings

ROOT = Path(__file__).resolve().parent.parent
# From scratch on small images the default gains, made for COCO at 640 pixels, train boxes and classes too little.
SHAPES = (
    *("optimizer=adamw", "lr=0.004", "momentum=0.9", "box=0.4", "cls=10", "obj=10"),
    *("mosaic=0", "scale=0.1", "translate=0.05"),
)
# Late, when the features are there, and just long enough to close: every epoch with closed gates must be regained.
L1_STEP = ("sparse-from=29", "travel=1.3", "final-lr-ratio=0.5")


@dataclass(frozen=True)
class SlimmingFlags(ScriptFlags):
    """Options of the comparison."""

    run: RunSettings = RunSettings(project="runs/demo")
    seed: Annotated[int, "seed of every random generator"] = 0
    weights: Annotated[str, "checkpoint to start from; '' trains --cfg from scratch"] = ""
    cfg: Annotated[str, "model description, used without --weights"] = "models/yolov5n.yaml"
    data: Annotated[str, "data set description"] = "data/shapes.yaml"
    data_root: Annotated[str | None, "folder of data sets; else $SLIM_DATA_ROOT, else ./datasets"] = None
    img: Annotated[int, "image size in pixels"] = 128
    batch_size: Annotated[int, "images a step"] = 8
    workers: Annotated[int, "loader processes"] = 0
    dense_epochs: Annotated[int, "epochs of the dense baseline"] = 60
    sparse_epochs: Annotated[int, "epochs of sparse training"] = 32
    finetune_epochs: Annotated[int, "epochs of fine-tuning after each cut"] = 28
    macs: Annotated[tuple[float, ...], "shares of the MACs to keep, one cut each"] = (0.5,)
    eval_every: Annotated[int, "epochs between evaluations"] = 25
    train: Annotated[tuple[str, ...], "further flags of every training, as name=value"] = SHAPES
    sparse: Annotated[tuple[str, ...], "further flags of the sparse training"] = L1_STEP
    finetune: Annotated[tuple[str, ...], "further flags of the fine-tuning after a cut"] = ()
    teacher: Annotated[bool, "fine-tune each cut a second time, with the dense baseline as its teacher"] = False
    resume: Annotated[bool, "continue --name: steps that are finished are not run again"] = False
    test: Annotated[bool, "also evaluate on the test split (nothing is chosen by it)"] = False
    in_turn: Annotated[bool, "baseline and slim branch in turn; else both at once on half of the cores each"] = False


RESULTS = ("metrics.json", "benchmark.json", "export.json")
"""What a script writes when it has done its work."""


TRAININGS = ("finetune", "train_sparse")
"""Scripts that continue what an interruption left."""


@dataclass(frozen=True)
class Row:
    """A line of the table; what was not measured is None."""

    step: str
    ap: float
    ap50: float
    test_ap: float | None
    macs: int
    params: int
    folder: str
    milliseconds: float | None = None


ROWS = COMPARISON_FILE
"""The table as data, in the comparison's run folder."""


@dataclass(frozen=True)
class Branch:
    """Runs scripts one after another into the comparison's run folder and reads their metrics back.

    Their output goes to ``log``, where given. Once ``stop`` is set the running script is ended.
    """

    flags: SlimmingFlags
    run: RunFolder
    stop: threading.Event
    log: Path | None = None

    @property
    def data(self) -> list[str]:
        return ["--data", self.flags.data, *(["--data-root", self.flags.data_root] if self.flags.data_root else [])]

    @property
    def common(self) -> list[str]:
        names = ("img", "batch_size", "seed", "device")
        return as_arguments([f"{name.replace('_', '-')}={getattr(self.flags, name)}" for name in names])

    def script(self, name: str, folder: str, *arguments: str) -> Path:
        """Run one script, unless it is done already; its run folder."""
        made = self.run.path / folder
        if any((made / result).is_file() for result in RESULTS):
            print(f"{made}: done before", flush=True)
            return made
        if name in TRAININGS and (made / "weights" / "last.pt").is_file():
            arguments = ("--resume",)
        else:
            shutil.rmtree(made, ignore_errors=True)
        command = [f"{name}.py", *arguments, "--project", str(self.run.path), "--name", folder]
        shown = " ".join(a or "''" for a in command) + ("" if self.log is None else f" >> {self.log}")
        print(f"$ python {shown}", flush=True)
        threads = {} if self.flags.in_turn else {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // 2))}
        code = execute([sys.executable, *command], {**threads, **os.environ}, self.log, self.stop)
        if code:
            raise SlimError(f"{name}.py ended with exit code {code}; its message {self.last_words()}")
        return made

    def last_words(self) -> str:
        """Where the message of a script that failed is found, or what it is."""
        if self.log is None:
            return "stands above"
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"in {self.log}: {lines[-1] if lines else 'none'}"

    def training(self, name: str, folder: str, epochs: int, weights: str, further: Sequence[str]) -> Path:
        """A training's run folder."""
        flags = self.flags
        start = ["--weights", weights, "--cfg", flags.cfg, "--epochs", str(epochs)]
        steps = ["--eval-every", str(flags.eval_every), "--workers", str(flags.workers)]
        return self.script(
            name, folder, *start, *self.data, *self.common, *steps, *as_arguments([*flags.train, *further])
        )

    def test_ap(self, weights: Path, folder: str) -> float | None:
        """AP on the test split."""
        if not self.flags.test:
            return None
        made = self.script(
            "val", f"{folder}-test", "--weights", str(weights), *self.data, *self.common, "--split", "test"
        )
        return float(metrics_of(made)["ap"])


def metrics_of(folder: Path) -> dict[str, Any]:
    """A run folder's metrics.json."""
    content: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return content


@dataclass
class Findings:
    """A branch's rows, and the weights that are timed by the row that they belong to."""

    rows: list[Row] = field(default_factory=list)
    weights: dict[str, Path] = field(default_factory=dict)

    def add(self, work: Branch, step: str, folder: Path, file: str = "last.pt") -> Path:
        """The row of a run folder's network, with its AP on the test split; returns its weights."""
        weights, found = folder / "weights" / file, metrics_of(folder)
        test_ap = work.test_ap(weights, folder.name)
        self.rows.append(Row(step, found["ap"], found["ap50"], test_ap, found["macs"], found["params"], folder.name))
        self.weights[step] = weights
        return weights


def execute(command: list[str], environment: dict[str, str], log: Path | None, stop: threading.Event) -> int:
    """A process's exit code; it is ended when ``stop`` is set or this process is interrupted."""
    with contextlib.nullcontext() if log is None else log.open("a", encoding="utf-8") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out and subprocess.STDOUT)
        try:
            while process.poll() is None and not stop.is_set():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    return process.returncode


def dense_branch(work: Branch) -> Findings:
    """The baseline."""
    found = Findings()
    found.add(work, "dense", work.training("finetune", "dense", work.flags.dense_epochs, work.flags.weights, ()))
    return found


def slim_branch(work: Branch) -> Findings:
    """Sparse training, then for each target a cut and its fine-tuning."""
    flags, found = work.flags, Findings()
    sparse = work.training("train_sparse", "sparse", flags.sparse_epochs, flags.weights, flags.sparse)
    trained = found.add(work, "sparse, not cut", sparse)
    for macs in flags.macs:
        target = ["--weights", str(trained), "--img", str(flags.img), "--macs", str(macs)]
        cut = work.script("prune", f"cut-{macs:g}", *target, *work.data)
        metrics = metrics_of(cut)
        masked, full = (metrics["masked_ap"], metrics["masked_ap50"], None), metrics["before"]
        found.rows.append(Row(f"masked to {macs:.0%}", *masked, full["macs"], full["params"], cut.name))
        pruned = found.add(work, f"cut to {macs:.0%}", cut, "pruned.pt")
        tuned = work.training("finetune", f"finetune-{macs:g}", flags.finetune_epochs, str(pruned), flags.finetune)
        found.add(work, f"fine-tuned at {macs:.0%}", tuned)
    return found


def finetune_with_teacher(work: Branch) -> Findings:
    """Fine-tuning of each cut with the dense baseline as its teacher."""
    found, epochs = Findings(), work.flags.finetune_epochs
    further = [*work.flags.finetune, f"teacher={work.run.path / 'dense' / 'weights' / 'last.pt'}"]
    for macs in work.flags.macs:
        pruned = work.run.path / f"cut-{macs:g}" / "weights" / "pruned.pt"
        tuned = work.training("finetune", f"taught-{macs:g}", epochs, str(pruned), further)
        found.add(work, f"fine-tuned at {macs:.0%}, with teacher", tuned)
    return found


def at_once(branches: list[Callable[[], Findings]], stop: threading.Event) -> list[Findings]:
    """What each branch found, in order; the first error ends the others."""
    with ThreadPoolExecutor(len(branches)) as pool:
        futures = [pool.submit(branch) for branch in branches]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            stop.set()
            raise
    return [future.result() for future in futures]


def compare(flags: SlimmingFlags) -> list[Row]:
    """All steps; the table's rows in order."""
    project, name = flags.run.project, flags.run.name
    run = RunFolder(Path(project) / name) if flags.resume else RunFolder.create(project, name)
    run.write_config(flat(flags), "experiments.slimming")
    stop = threading.Event()
    work = Branch(flags, run, stop)
    baseline = work if flags.in_turn else replace(work, log=run.path / "dense.log")
    branches = [lambda: dense_branch(baseline), lambda: slim_branch(work)]
    dense, slimmed = [branch() for branch in branches] if flags.in_turn else at_once(branches, stop)
    rows, timed = [*dense.rows, *slimmed.rows], {**dense.weights, **slimmed.weights}
    if flags.teacher:
        last = finetune_with_teacher(work)
        rows, timed = [*rows, *last.rows], {**timed, **last.weights}
    bench = work.script("benchmark", "benchmark", "--weights", *map(str, timed.values()), "--img", str(flags.img))
    step, smallest = list(timed.items())[-1]
    exported = work.script("export", "export", "--weights", str(smallest), "--img", str(flags.img), *work.data)
    print(f"{step}, for other runtimes: {exported / 'weights' / smallest.with_suffix('.onnx').name}")
    times = json.loads((bench / "benchmark.json").read_text(encoding="utf-8"))["rows"]
    by_step = dict(zip(timed, (float(t["milliseconds"]) for t in times), strict=True))
    # A masked network has the size of the one that it masks, and so its run time.
    rows = [replace(row, milliseconds=by_step.get(row.step, by_step["sparse, not cut"])) for row in rows]
    slim.write_text_atomically(run.path / ROWS, json.dumps([asdict(row) for row in rows], indent=1))
    write_report(run)
    print(verdict(rows, metrics_of(run.path / "sparse")["closed_share"]))
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
