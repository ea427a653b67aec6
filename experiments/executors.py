"""Where nodes run: processes of this machine, a Ray cluster, or submitit's jobs.

Each runs ``store.run_node`` on tasks, so that all leave the same folders, and rows with the same hashes.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from slim import SlimError

from .grid import ROOT
from .store import NodeFailed, Task, run_node

WAIT_SECONDS = 1.0
MOST_TRIES = 5
"""How often a node is handed out again after its machine was lost."""


class Executor(Protocol):
    """Runs tasks side by side."""

    @property
    def capacity(self) -> int:
        """How many tasks are worth handing out at once."""

    def submit(self, task: Task) -> Any:
        """A handle of a task that is handed out; returns at once."""

    def finished(self, handles: Sequence[Any]) -> list[tuple[Any, Exception | None]]:
        """Wait a moment; the handles that have ended, each with what its task raised."""

    def close(self) -> None:
        """End what still runs; it can be continued."""


class LocalExecutor:
    """So many processes at once on this machine, each with its share of the cores, to which it is pinned."""

    def __init__(self, at_once: int) -> None:
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
        self.capacity = at_once
        self.threads = max(1, len(cpus) // at_once)
        self._pool, self._stop = ThreadPoolExecutor(at_once), threading.Event()
        self._slots: queue.SimpleQueue[tuple[int, ...]] = queue.SimpleQueue()
        for n in range(at_once):
            self._slots.put(tuple(cpus[(n * self.threads + i) % len(cpus)] for i in range(self.threads)))

    def submit(self, task: Task) -> Future[str]:
        return self._pool.submit(self._run, task)

    def _run(self, task: Task) -> str:
        slot = self._slots.get()
        try:
            return run_node(replace(task, threads=self.threads, cpus=slot), self._stop)
        finally:
            self._slots.put(slot)

    def finished(self, handles: Sequence[Future[str]]) -> list[tuple[Future[str], Exception | None]]:
        done, _ = wait(handles, WAIT_SECONDS, FIRST_COMPLETED)
        return [(handle, _raised(handle)) for handle in done]

    def close(self) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)


def _raised(handle: Future[str]) -> Exception | None:
    error = handle.exception()
    if error is not None and not isinstance(error, Exception):
        raise error  # an interruption
    return error


class RayExecutor:
    """Tasks of a Ray cluster, ``threads`` cores each. Ray hands out anew what a lost node was running."""

    def __init__(self, address: str | None, threads: int) -> None:
        import ray

        ray.init(
            address=address,
            ignore_reinit_error=True,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
        )
        self._ray, self.threads = ray, threads
        self._run = ray.remote(num_cpus=threads, max_retries=MOST_TRIES, retry_exceptions=False)(run_node)

    @property
    def capacity(self) -> int:
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)) // self.threads)

    def submit(self, task: Task) -> Any:
        return self._run.remote(replace(task, threads=self.threads))

    def finished(self, handles: Sequence[Any]) -> list[tuple[Any, Exception | None]]:
        done, _ = self._ray.wait(list(handles), num_returns=1, timeout=WAIT_SECONDS)
        return [(handle, self._raised(handle)) for handle in done]

    def _raised(self, handle: Any) -> Exception | None:
        try:
            self._ray.get(handle)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            return cause if isinstance(cause, NodeFailed) else error
        except self._ray.exceptions.RayError as error:
            return SlimError(f"ray: {error}")
        return None

    def close(self) -> None:
        self._ray.shutdown()


class SubmititExecutor:
    """Jobs of a SLURM cluster, or with ``cluster="local"`` processes of this machine."""

    def __init__(self, folder: Path, cluster: str | None, at_once: int, threads: int, minutes: int) -> None:
        import submitit

        self.capacity, self.threads = at_once, threads
        self._executor = submitit.AutoExecutor(folder=str(folder), cluster=cluster)
        self._executor.update_parameters(timeout_min=minutes, cpus_per_task=threads)

    def submit(self, task: Task) -> Any:
        return self._executor.submit(run_node, replace(task, threads=self.threads))

    def finished(self, handles: Sequence[Any]) -> list[tuple[Any, Exception | None]]:
        time.sleep(WAIT_SECONDS)
        return [(job, job.exception()) for job in handles if job.done()]

    def close(self) -> None:
        pass
