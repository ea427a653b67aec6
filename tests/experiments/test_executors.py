"""The same rows from every executor, whatever is killed on the way: real processes, and a real Ray cluster on this machine."""

from __future__ import annotations

import csv
import gc
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.rows import read_rows
from experiments.store import ROOT
from tests.conftest import Once

pytestmark = pytest.mark.long
EPOCHS = 40
WAIT = 300
FIGURES = (
    "hash",
    "method",
    "keep",
    "seed",
    "parent",
    "split",
    "class",
    "ap",
    "ap50",
    "cliff_ap",
    "macs",
    "training_macs",
)


@pytest.fixture
def grid(write_grid: Callable[..., Path]) -> Path:
    """One sparse training long enough to be hit, cut twice, and a dense one beside it."""
    stages = [
        {"train_sparse": {"epochs": EPOCHS, "fraction": 0.5, "sparse-from": 5}},
        {"prune": {"macs": "$keep", "round-to": 4, "min-channels": 4}},
        {"finetune": {"epochs": 1}},
    ]
    return write_grid(epochs=EPOCHS + 1, methods={"gate": stages, "dense": [{"finetune": {"epochs": EPOCHS + 1}}]})


def start(grid: Path, folder: Path, *more: str) -> subprocess.Popen[bytes]:
    places = ["--store", str(folder / "store"), "--results", str(folder / "results")]
    command = [sys.executable, "-m", "experiments.run", str(grid), *places, *more]
    folder.mkdir(exist_ok=True)
    with (folder / "out.txt").open("ab") as out:
        return subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)


def finished(process: subprocess.Popen[bytes], folder: Path) -> None:
    assert process.wait(WAIT) == 0, (folder / "out.txt").read_text()


def in_the_middle(folder: Path) -> Path:
    """The folder of a training that has some epochs behind it, and some before."""
    until = time.time() + WAIT
    while time.time() < until:
        for file in (folder / "store" / "running").glob("*/run/results.csv"):
            if 3 < len(file.read_text().splitlines()) < EPOCHS - 10:
                return file.parents[1]
        time.sleep(0.05)
    raise AssertionError((folder / "out.txt").read_text())


Figures = tuple[list[tuple[str, ...]], dict[str, list[dict[str, str]]]]


def figures(folder: Path) -> Figures:
    """The rows, and of every training all epochs to the last digit of its losses."""
    rows = [tuple(row[name] for name in FIGURES) for row in read_rows(folder / "results" / "small.csv")]
    epochs = {}
    for file in (folder / "store").glob("*/run/results.csv"):
        with file.open(newline="") as stream:
            epochs[file.parents[1].name] = [row | {"seconds": ""} for row in csv.DictReader(stream)]
    return rows, epochs


def assert_nothing_was_lost_or_done_twice(folder: Path, hit: str) -> None:
    store = folder / "store"
    assert not list((store / "running").iterdir()) and not (store / "failed").exists()
    with (store / hit / "run" / "results.csv").open(newline="") as file:
        epochs = [int(row["epoch"]) for row in csv.DictReader(file)]
    assert epochs == list(range(len(epochs)))
    starts = [line for line in (store / hit / "log.txt").read_text().splitlines() if line.startswith("$ python")]
    assert all("--resume" in line for line in starts[1:])
    for other in store.glob("*/log.txt"):
        if other.parent.name != hit:
            assert other.read_text().count("$ python") <= 2


@pytest.fixture
def whole(grid: Path, once: Once) -> Figures:
    """The figures of a run that nothing interrupted."""
    folder = once("whole-grid", lambda folder: finished(start(grid, folder), folder))
    rows, epochs = figures(folder)
    assert len(rows) == 3 * 2 * 5  # runs, splits, all classes together and each of four
    assert sorted(map(len, epochs.values())) == [1, 1, EPOCHS, EPOCHS + 1]
    return rows, epochs


def test_killed_at_once_the_same_command_continues(grid: Path, tmp_path: Path, whole: Figures) -> None:
    folder = tmp_path / "local"
    process = start(grid, folder)
    hit = in_the_middle(folder)
    process.kill()
    process.wait()
    # The scripts that it had started go on, and hold their claims: what follows waits for them.
    finished(start(grid, folder), folder)
    assert figures(folder) == whole
    assert_nothing_was_lost_or_done_twice(folder, hit.name)


def test_interrupted_the_scripts_save_and_the_same_command_continues(
    grid: Path, tmp_path: Path, whole: Figures
) -> None:
    folder = tmp_path / "local"
    process = start(grid, folder)
    hit = in_the_middle(folder)
    process.send_signal(signal.SIGINT)
    assert process.wait(WAIT) == 130
    assert "interrupted" in (folder / "out.txt").read_text().splitlines()[-1]
    assert hit.is_dir()
    finished(start(grid, folder), folder)
    assert figures(folder) == whole
    assert "--resume" in (folder / "store" / hit.name / "log.txt").read_text()
    assert_nothing_was_lost_or_done_twice(folder, hit.name)


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed (extra slurm)")
def test_submitit_gives_the_same_rows(grid: Path, tmp_path: Path, whole: Figures) -> None:
    folder, flags = tmp_path / "submitit", ("--executor", "submitit", "--cluster", "local")
    process = start(grid, folder, *flags)
    hit = in_the_middle(folder)
    process.kill()
    process.wait()
    finished(start(grid, folder, *flags), folder)
    assert figures(folder) == whole
    assert_nothing_was_lost_or_done_twice(folder, hit.name)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, list[Any]]]:
    """Two nodes of one core each on the loopback address, and a head that runs nothing."""
    monkeypatch.setenv(
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0"
    )  # Ray's word for: not this machine's address, the loopback one
    monkeypatch.setenv("RAY_worker_niceness", "0")
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="ray is not installed (extra ray)")
    cluster = cluster_utils.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "node_ip_address": "127.0.0.1"}
    )
    try:
        yield cluster, [cluster.add_node(num_cpus=1) for _ in range(2)]
    finally:
        cluster.shutdown()
        for process in gc.get_objects():  # Ray looks after none of its processes' ends
            if type(process) is subprocess.Popen:
                process.wait(WAIT)


def test_ray_finishes_when_a_node_is_killed_in_the_middle_of_a_run(
    grid: Path, tmp_path: Path, whole: Figures, cluster: tuple[Any, list[Any]]
) -> None:
    (ray_cluster, nodes), folder = cluster, tmp_path / "ray"
    process = start(grid, folder, "--executor", "ray", "--address", ray_cluster.address)
    hit = in_the_middle(folder)
    ray_cluster.remove_node(nodes[0], allow_graceful=False)
    finished(process, folder)
    assert figures(folder) == whole
    assert_nothing_was_lost_or_done_twice(folder, hit.name)
    assert os.listdir(folder / "store" / "claims")
