"""The folder of an experiment's runs: each node is there complete or not at all, and is run by one process at a time.

    STORE/<key>/run/           the script's own run folder, log.txt, node.json (what it was, how long it took, and on what)
    STORE/running/<key>/       what is not finished yet; a training continues from it
    STORE/failed/<key>.json    what failed and why
    STORE/claims/<key>         locked while a process works on it
    STORE/by-name/<grid>/...   links to the finished runs' last folders

The folder may be shared by several machines, if their file system supports locks (NFS 4 does).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from detection.benchmark_table import processor_name
from detection.command import INTERRUPTED, as_words
from slim import SlimError, write_text_atomically
from tracking import RunFolder

from .grid import ROOT, TRAININGS, Node, Run

PRUNED = ("prune", "torch_pruning")
"""Scripts that leave weights/pruned.pt."""
MODULES = ("torch_pruning",)
"""Scripts that are modules of this package."""
POLL_SECONDS = 2.0


class NodeFailed(SlimError):
    """A script ended with an error; the message says which and why."""


@dataclass(frozen=True)
class Task:
    """A node to run, and where: plain data that another process or machine can be handed.

    Args:
        node: what to run
        store: the folder of runs, the same path on all machines
        weights: the checkpoint that chains start from, on this machine
        data_root: folder of data sets on this machine
        threads: of the process
        cpus: to which it is pinned; none pins nothing
    """

    node: Node
    store: str
    weights: str
    data_root: str | None
    threads: int
    cpus: tuple[int, ...] = ()


def is_done(store: str | Path, key: str) -> bool:
    return (Path(store) / key / "node.json").is_file()


def failure(store: str | Path, key: str) -> str | None:
    """Why a node failed; None where it did not."""
    file = Path(store) / "failed" / f"{key}.json"
    return str(json.loads(file.read_text(encoding="utf-8"))["reason"]) if file.is_file() else None


def forget_failure(store: str | Path, key: str) -> None:
    (Path(store) / "failed" / f"{key}.json").unlink(missing_ok=True)


def network_of(store: str | Path, key: str) -> Path:
    """The network that a finished node left."""
    folder = Path(store) / key / "run" / "weights"
    pruned = folder / "pruned.pt"
    return pruned if pruned.is_file() else folder / "last.pt"


def link_run(store: str | Path, run: Run) -> None:
    """Show a finished run under its words: STORE/by-name/<grid>/<method keep=0.3 seed=0> leads to its last stage's run folder."""
    name = Path(store) / "by-name" / run.grid / str(run).replace(" ", "-")
    name.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        name.symlink_to(Path("..") / ".." / run.key / "run")


def metrics_of(store: str | Path, key: str) -> dict[str, Any]:
    """A finished node's metrics.json."""
    found: dict[str, Any] = json.loads((Path(store) / key / "run" / "metrics.json").read_text(encoding="utf-8"))
    return found


def facts_of(store: str | Path, key: str) -> dict[str, Any]:
    """A finished node's node.json."""
    found: dict[str, Any] = json.loads((Path(store) / key / "node.json").read_text(encoding="utf-8"))
    return found


@contextlib.contextmanager
def claimed(store: Path, key: str) -> Iterator[int]:
    """Wait until no other process works on a node, then keep others out; gives the lock's descriptor.

    Whoever inherits the descriptor holds the claim too: it ends with the last process of the run, so that a script whose
    starter was killed is not started a second time beside itself.
    """
    file = store / "claims" / key
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(POLL_SECONDS)
        yield descriptor
    finally:
        os.close(descriptor)


def run_node(task: Task, stop: threading.Event | None = None) -> str:
    """Run a node unless it is done, here and now; returns its key. Once ``stop`` is set its script is interrupted.

    Raises NodeFailed when its script ends with an error, of this try or an earlier one, and KeyboardInterrupt when it is
    interrupted; a later call continues then.
    """
    store, node = Path(task.store), task.node
    with claimed(store, node.key) as descriptor:
        if is_done(store, node.key):
            return node.key
        if reason := failure(store, node.key):
            raise NodeFailed(reason)
        folder = store / "running" / node.key
        folder.mkdir(parents=True, exist_ok=True)
        started = time.time()
        code = execute(command_of(task, folder), folder / "log.txt", task, descriptor, stop)
        if code in (INTERRUPTED, -2, -15):
            raise KeyboardInterrupt(f"{node.script} {node.key}")
        if code:
            reason = f"{node.script}: {last_line(folder / 'log.txt')} (exit code {code}; {folder / 'log.txt'})"
            (store / "failed").mkdir(exist_ok=True)
            write_text_atomically(
                store / "failed" / f"{node.key}.json", json.dumps({"reason": reason, **description(node)})
            )
            raise NodeFailed(reason)
        facts = description(node) | {
            "started": started,
            "seconds": round(seconds_of(folder, started), 1),
            **provenance(task),
        }
        write_text_atomically(folder / "node.json", json.dumps(facts, indent=1))
        folder.rename(store / node.key)
        return node.key


def command_of(task: Task, folder: Path) -> list[str]:
    """The script with its flags; a training that has a checkpoint is resumed."""
    node, here = task.node, ["--project", str(folder), "--name", "run"]
    start = ["-m", f"experiments.{node.script}"] if node.script in MODULES else [f"{node.script}.py"]
    if node.script in TRAININGS and (folder / "run" / "weights" / "last.pt").is_file():
        return [*start, "--resume", *here]
    # What a script that cannot continue has left is made anew.
    shutil.rmtree(folder / "run", ignore_errors=True)
    flags = as_words(dict(node.flags))
    files = ["--data", node.data.file, *(["--data-root", task.data_root] if task.data_root else [])]
    for flag, key in node.parents:
        files += [f"--{flag}", str(network_of(task.store, key))]
    if node.weights:
        files += ["--weights", task.weights]
    return [*start, *files, *flags, *here]


def execute(command: Sequence[str], log: Path, task: Task, descriptor: int, stop: threading.Event | None = None) -> int:
    """A script's exit code; its output is added to a log. An interruption is handed on, and waited for."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(task.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONUNBUFFERED": "1",
    }
    with log.open("a", encoding="utf-8") as out:
        print("$ python", *command, file=out, flush=True)
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=out,
            pass_fds=[descriptor],
            start_new_session=True,  # a terminal's Ctrl-C comes once, from here: a second one would leave at once
        )
        try:
            if task.cpus and hasattr(os, "sched_setaffinity"):
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(process.pid, task.cpus)
            while process.poll() is None and not (stop and stop.is_set()):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait()
        return process.returncode


def last_line(log: Path) -> str:
    """A script's last word, which says what went wrong."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip().splitlines()
    return lines[-1].strip() if lines else "no output"


def seconds_of(folder: Path, started: float) -> float:
    """How long a run took: a training's epochs, of all tries together, else this try."""
    rows = RunFolder(folder / "run").read_rows()
    return sum(float(row["seconds"]) for row in rows) if rows else time.time() - started


def description(node: Node) -> dict[str, Any]:
    """A node as plain data."""
    return {
        "key": node.key,
        "script": node.script,
        "flags": dict(node.flags),
        "parents": dict(node.parents),
        "data": node.data.file,
        "data_digest": node.data.digest,
    }


def provenance(task: Task) -> dict[str, str]:
    """On what a run was made, and with what code."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    cores = "core" if task.threads == 1 else "cores"
    return {
        "commit": git.stdout.strip(),
        "hardware": f"{processor_name()}, {task.threads} {cores}, {torch.backends.cpu.get_cpu_capability()}",
        "versions": f"python {platform.python_version()}, torch {version('torch')}",
    }
