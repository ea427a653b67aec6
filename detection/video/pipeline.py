"""Reading, inference and writing side by side, in order, with bounded memory; and where the time goes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import Any, Protocol

from engine.interruption import Interruption
from slim import SlimError

STAGES = ("read", "pre-process", "inference", "post-process", "write")
_LOOK_S = 0.1
_SWITCH_S = 0.0005
"""After which a thread that computes in Python makes way: stages are that short, and a network waits for its next input."""
_LEAVE_READER_S = 3.0
"""How long a reader may take to notice the end: one that waits for a camera is left behind."""


class Stages(Protocol):
    """What is done with each item, in the order of ``STAGES`` after reading.

    ``prepare`` runs in the thread that reads, inference in ``at_once`` threads, the last two in the caller's; all see the
    items in order, but for inference.
    """

    def prepare(self, item: Any, /) -> Any:
        """What the network takes of an item."""

    def infer(self, prepared: Any, /) -> Any:
        """The network's output."""

    def interpret(self, item: Any, prepared: Any, output: Any, /) -> Any:
        """What is found."""

    def write(self, item: Any, found: Any, /) -> None:
        """Keep what is found."""


@dataclass
class StageTimes:
    """Seconds by stage over all items, and of the whole run."""

    at_once: int = 1
    """Items in inference side by side."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    items: int = 0
    wall_s: float = 0.0

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time until the block ends to a stage."""
        started = perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += perf_counter() - started

    @property
    def fps(self) -> float:
        """Items a second from end to end."""
        return self.items / self.wall_s if self.wall_s else 0.0

    @property
    def engine_fps(self) -> float:
        """Items a second if inference, as long as it took here, were all: ``at_once`` / seconds of one."""
        busy = self.seconds["inference"]
        return self.at_once * self.items / busy if busy else 0.0

    def milliseconds(self) -> dict[str, float]:
        """Of one item, by stage."""
        return {stage: 1000 * seconds / max(1, self.items) for stage, seconds in self.seconds.items()}

    def summary(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "frames": self.items,
            "seconds": self.wall_s,
            "fps": self.fps,
            "milliseconds": self.milliseconds(),
            "frames_at_once": self.at_once,
            "engine_fps": self.engine_fps,
            "share_of_engine_fps": self.fps / self.engine_fps if self.engine_fps else None,
        }


def run_overlapped(
    items: Iterator[Any],
    stages: Stages,
    timing: StageTimes,
    *,
    burst: int = 1,
    on_progress: Callable[[], None] = lambda: None,
) -> None:
    """Take all items through all stages; at most ``timing.at_once + 3 * burst`` are on their way at any moment.

    ``burst`` items are read in a row, and written in a row: with short stages on few cores that saves a quarter of their time,
    whose code and data the network would otherwise drive out of the caches between any two items.

    An error in any stage ends all of them once what stood before it in line is written, and is raised. Ctrl-C (or SIGTERM)
    ends the reading; what was read is still written, and KeyboardInterrupt raised. ``timing`` is filled, in either case,
    and ``on_progress`` called now and then.
    """
    if timing.at_once < 1 or burst < 1:
        raise SlimError(f"{timing.at_once} at once, bursts of {burst}: expected at least 1")
    started, switch_s = perf_counter(), sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    with Interruption() as interruption, ThreadPoolExecutor(timing.at_once, "inference") as pool:
        reader = _Reader(items, stages, pool, timing, burst)
        reader.start()
        try:
            while entries := _next_burst(reader, burst, interruption, on_progress):
                wait([future for _, _, future in entries])
                for item, prepared, future in entries:
                    output = future.result()
                    with timing.timed("post-process"):
                        found = stages.interpret(item, prepared, output)
                    with timing.timed("write"):
                        stages.write(item, found)
                    timing.items += 1
                    reader.room.release()
        finally:
            reader.stop()
            timing.wall_s = perf_counter() - started
            sys.setswitchinterval(switch_s)
            on_progress()
    if reader.error is not None:
        raise reader.error
    if interruption.wanted:
        raise KeyboardInterrupt


_Entry = tuple[Any, Any, Future[Any]]
"""An item, what the network takes of it, and its output to come."""


def _next_burst(
    reader: _Reader, burst: int, interruption: Interruption, on_progress: Callable[[], None]
) -> list[_Entry]:
    """The next entries; fewer at the end, then none."""
    entries: list[_Entry] = []
    while len(entries) < burst:
        if interruption.wanted:
            reader.stop()
        try:
            entry = reader.queue.get(timeout=_LOOK_S)
        except Empty:
            on_progress()
            continue
        if entry is None:
            reader.queue.put(None)
            break
        entries.append(entry)
    on_progress()
    return entries


class _Reader(threading.Thread):
    """Reads and prepares items, and hands them to inference; None in the queue is the end."""

    def __init__(
        self, items: Iterator[Any], stages: Stages, pool: ThreadPoolExecutor, timing: StageTimes, burst: int
    ) -> None:
        super().__init__(name="reader", daemon=True)
        self.items, self.stages, self.pool, self.timing, self.burst = items, stages, pool, timing, burst
        self.queue: SimpleQueue[_Entry | None] = SimpleQueue()
        self.room = threading.Semaphore(timing.at_once + 3 * burst)
        self.stopped = threading.Event()
        self.error: BaseException | None = None
        self.lock = threading.Lock()

    def stop(self) -> None:
        """End the reading; a reader that waits for a camera is left behind."""
        if not self.stopped.is_set():
            self.stopped.set()
            self.join(_LEAVE_READER_S)
            self.queue.put(None)

    def run(self) -> None:
        try:
            while self._has_room():
                for _ in range(self.burst):
                    with self.timing.timed("read"):
                        item = next(self.items, None)
                    if item is None or self.stopped.is_set():
                        return
                    with self.timing.timed("pre-process"):
                        prepared = self.stages.prepare(item)
                    self.queue.put((item, prepared, self.pool.submit(self._infer, prepared)))
        except BaseException as error:  # raised in the caller's thread, when all before it is written
            self.error = error
        finally:
            self.queue.put(None)
            close = getattr(self.items, "close", None)  # of a generator: here, where it runs
            if close is not None:
                close()

    def _has_room(self) -> bool:
        """Wait for room for a burst."""
        missing = self.burst
        while missing and not self.stopped.is_set():
            missing -= self.room.acquire(timeout=_LOOK_S)
        return not missing

    def _infer(self, prepared: Any) -> Any:
        started = perf_counter()
        output = self.stages.infer(prepared)
        with self.lock:
            self.timing.seconds["inference"] += perf_counter() - started
        return output
