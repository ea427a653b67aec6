"""The loop under SIGKILL: what it ends with is what an uninterrupted one ends with."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.scripts.runs import ROOT, SMALL

STEPS = ["--rounds", 2, "--macs", 0.5, "--sparse-epochs", 2, "--recovery-epochs", 1, "--finetune-epochs", 1]


def start(weights: Path, data: Path, project: Path) -> subprocess.Popen[str]:
    given = ["--weights", weights, "--data", data, *SMALL, *STEPS, "--recalibrate", 1, "--max-drop", 1]
    command = [
        sys.executable,
        "-m",
        "tests.scripts.iterate_any_ap",
        *map(str, given),
        "--project",
        str(project),
        "--name",
        "loop",
    ]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
    )


def seconds_of_work(process: subprocess.Popen[str]) -> float:
    """From the first line of a phase to the end of a process, which must succeed."""
    assert process.stdout is not None
    begun, lines = 0.0, []
    with process:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("dense: AP"):
                begun = time.monotonic()
    assert process.returncode == 0, "".join(lines)
    return time.monotonic() - begun


def wait_for_work(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("dense: AP"):
            return


def ending(run: Path) -> dict[str, Any]:
    """Everything that a loop leaves but times: plan, weights, metrics, candidates."""
    metrics = json.loads((run / "metrics.json").read_text())
    for part in (metrics, metrics["baseline"]):
        part.pop("seconds")
    metrics.pop("ms")
    metrics["baseline"].pop("ms")
    with (run / "pareto.csv").open(newline="") as file:
        rows = [{key: value for key, value in row.items() if key != "ms"} for row in csv.DictReader(file)]
    phases = sorted(p.name for p in run.iterdir() if (p / "phase.json").exists())
    return {"plan": (run / "plan.json").read_text(), "metrics": metrics, "rows": rows, "phases": phases}


def assert_same_end(killed: Path, whole: Path) -> None:
    assert ending(killed) == ending(whole)
    for file in ("weights/slim.pt", "finetune/weights/last.pt", "round2-try1-cut/pruned.pt"):
        found, expected = (torch.load(run / file, weights_only=True)["state_dict"] for run in (killed, whole))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), file
    assert not list(killed.rglob("*writing-*")) and not list(killed.glob(".*.unfinished"))


def killed_run(weights: Path, data: Path, project: Path, kills: int, work_seconds: float, seed: int) -> None:
    """Kill the loop so often, at random moments of its work and (once in five) of its start, then let it end."""
    chance = random.Random(seed)
    for number in range(kills):
        process = start(weights, data, project)
        if number % 5 == 3:
            time.sleep(chance.uniform(0.5, 6))
        else:
            wait_for_work(process)
            time.sleep(chance.uniform(0, 1.6 * work_seconds / kills))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    seconds_of_work(start(weights, data, project))


@pytest.mark.long
@pytest.mark.parametrize("kills", [20])
def test_a_loop_killed_at_random_moments_ends_like_an_uninterrupted_one(
    sparse_run: Path, tiny: Path, tmp_path: Path, kills: int
) -> None:
    weights = sparse_run / "weights" / "best.pt"
    work_seconds = seconds_of_work(start(weights, tiny, tmp_path / "whole"))
    killed_run(weights, tiny, tmp_path / "killed", kills, work_seconds, seed=kills)
    assert_same_end(tmp_path / "killed" / "loop", tmp_path / "whole" / "loop")
