"""The comparison runs the real scripts and tells what they measured."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments import slimming
from slim import SlimError
from tests.scripts.conftest import without_plots
from tracking.settings import RunSettings

STEPS = ["dense", "sparse, not cut", "masked to 50%", "cut to 50%", "fine-tuned at 50%"]
SLEEPER = [sys.executable, "-c", "import time; print('asleep', flush=True); time.sleep(600)"]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The real scripts with the real arguments, without starting an interpreter for each."""

    def execute(command: list[str], *_: Any) -> int:
        return int(importlib.import_module(Path(command[1]).stem).cli(command[2:]))

    monkeypatch.chdir(slimming.ROOT)
    monkeypatch.setattr(slimming, "execute", execute)
    with without_plots():
        yield


@pytest.mark.usefixtures("in_this_process")
def test_table_is_made_of_the_scripts_own_metrics(
    tiny: Path, small_cfg: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {
        "data": tiny, "cfg": small_cfg, "img": 64, "batch-size": 8, "workers": 0,
        "dense-epochs": 1, "sparse-epochs": 2, "sparse": "sparse-from=1",
        "finetune-epochs": 1, "finetune": "lr=0.01", "project": tmp_path / "runs", "name": "x",
    }  # fmt: skip
    code = slimming.cli([*(str(a) for k, v in arguments.items() for a in (f"--{k}", v)), "--test", "--in-turn"])
    out = capfd.readouterr().out
    assert code == 0, out
    run = tmp_path / "runs" / "x"
    printed = out[out.index("| network | AP val |") :].splitlines()
    rows = [line.split(" | ") for line in printed if line.startswith("| ")][2:]
    assert [row[0].removeprefix("| ") for row in rows] == STEPS
    tuned = json.loads((run / "finetune-0.5" / "metrics.json").read_text())
    assert rows[-1][1] == f"{tuned['ap']:.4f}" and rows[-1][4] == f"{tuned['macs'] / 1e6:.1f}"
    dense = json.loads((run / "dense" / "metrics.json").read_text())
    assert tuned["macs"] <= 0.5 * dense["macs"] and float(rows[-1][6].removesuffix(" |")) > 0
    test = json.loads((run / "dense-test" / "metrics.json").read_text())
    assert rows[0][3] == f"{test['ap']:.4f}" and test["images"] == 6
    report = (run / "report.md").read_text()
    assert f"| {tuned['ap']:.4f} |" in report and "[fine-tuned at 50%](finetune-0.5/report.html)" in report
    assert (run / "report.html").read_text().count("<em>The same images: ") == 3
    assert "$ python train_sparse.py" in out and "gates closed after sparse training: " in out

    # Once more: nothing is run again but the one step that is missing, which continues from its own checkpoint.
    report, ran = (run / "report.md").read_text(), []
    for last_written in ("metrics.json", "report.html"):
        (run / "finetune-0.5" / last_written).unlink()
    original = slimming.execute

    def listed(command: list[str], *more: Any) -> int:
        ran.append([Path(command[1]).stem, "--resume" in command])
        return original(command, *more)

    monkeypatch.setattr(slimming, "execute", listed)
    again = [*(str(a) for k, v in arguments.items() for a in (f"--{k}", v)), "--test", "--in-turn", "--resume"]
    assert slimming.cli(again) == 0
    assert ran == [["finetune", True]]
    assert (run / "report.md").read_text() == report


@pytest.mark.usefixtures("in_this_process")
def test_a_failing_script_ends_the_comparison(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", tiny, "--project", tmp_path / "runs", "--img", 65, "--in-turn"]
    code = slimming.cli([str(a) for a in arguments])
    assert code == 1
    assert "finetune.py ended with exit code 1; its message stands above" in capfd.readouterr().err


def test_a_missing_data_set_ends_both_branches(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert slimming.cli(["--data", str(tmp_path / "none.yaml"), "--project", str(tmp_path / "runs")]) == 1
    told = capfd.readouterr().err.splitlines()
    assert any("none.yaml" in line for line in told)
    assert re.search(r"^error: (finetune|train_sparse)\.py ended with exit code 1; its message ", told[-1])


def test_both_branches_run_at_once_and_keep_their_order() -> None:
    meeting = threading.Barrier(2, timeout=60)  # breaks unless both are there at the same time

    def branch(name: str) -> slimming.Findings:
        meeting.wait()
        return slimming.Findings([], {name: Path(name)})

    found = slimming.at_once([lambda: branch("dense"), lambda: branch("slim")], threading.Event())
    assert [list(f.weights) for f in found] == [["dense"], ["slim"]]


def test_the_first_error_ends_the_other_branch(tmp_path: Path) -> None:
    stop, codes, log = threading.Event(), [], tmp_path / "log"

    def sleeping() -> slimming.Findings:
        codes.append(slimming.execute(SLEEPER, dict(os.environ), log, stop))
        raise SlimError("ended by the other branch")

    def failing() -> slimming.Findings:
        wait_for(lambda: log.exists() and "asleep" in log.read_text())
        raise SlimError("the first error")

    with pytest.raises(SlimError, match="the first error"):
        slimming.at_once([sleeping, failing], stop)
    assert codes == [-signal.SIGTERM]


def test_a_failing_script_behind_a_log_is_quoted(tmp_path: Path) -> None:
    flags = slimming.SlimmingFlags(run=RunSettings(project=str(tmp_path)), img=65)
    run = slimming.RunFolder.create(tmp_path, "x")
    branch = slimming.Branch(flags, run, threading.Event(), tmp_path / "dense.log")
    with pytest.raises(
        SlimError, match=r"benchmark.py ended with exit code 1; its message in .*dense.log: error: .*none"
    ):
        branch.script("benchmark", "benchmark", "--weights", str(tmp_path / "none.pt"))


def test_an_interrupt_ends_both_trainings(tiny: Path, tmp_path: Path) -> None:
    arguments = ["--data", tiny, "--project", tmp_path / "runs", "--name", "x", "--img", 64]
    command = [sys.executable, "-m", "experiments.slimming", *map(str, arguments)]
    output = tmp_path / "output"
    with output.open("w") as out:
        process = subprocess.Popen(
            command, cwd=slimming.ROOT, stdout=out, stderr=out, start_new_session=True, preexec_fn=heed_interrupts
        )
    try:
        trained = [tmp_path / "runs" / "x" / name / "weights" / "last.pt" for name in ("dense", "sparse")]
        wait_for(lambda: all(path.exists() for path in trained) or process.poll() is not None)
        process.send_signal(signal.SIGINT)  # to the parent alone, as from a job scheduler
        assert process.wait(60) == 130, output.read_text()
        with pytest.raises(ProcessLookupError):  # nobody of its process group is left
            os.killpg(process.pid, 0)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert "interrupted: what is finished is in the run folder" in output.read_text()


def heed_interrupts() -> None:
    """A shell starts its background jobs, and thereby all of theirs, with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(condition: Any, seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.1)
