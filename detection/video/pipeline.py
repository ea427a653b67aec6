"""Reading, inference and writing side by side, in order, with bounded memory; and where the time goes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from queue import SimpleQueue
from time import perf_counter
from typing import Any

from engine.interruption import Interruption
from slim import SlimError

STAGES = ("read", "pre-process", "inference", "post-process", "write")
_LOOK_S = 0.1
_SWITCH_S = 0.0005
"""After which a thread that computes in Python makes way: stages are that short, and a network waits for its next input."""
_LEAVE_READER_S = 3.0
"""How long a reader may take to notice the end: one that waits for a camera is left behind."""


@dataclass(frozen=True)
class Work:
    """What is done with each item, in the order of ``STAGES``.

    ``read`` gives the items; ``prepare(item)`` what the network takes; ``infer(prepared)`` its output;
    ``interpret(item, prepared, output)`` what is found; ``write(item, found)`` keeps it. The first two run in one thread,
    inference in ``at_once`` threads, the last two in another one; all see the items in order, but for inference.
    """

    read: Iterator[Any]
    prepare: Callable[[Any], Any]
    infer: Callable[[Any], Any]
    interpret: Callable[[Any, Any, Any], Any]
    write: Callable[[Any, Any], None]


@dataclass
class StageTimes:
    """Seconds by stage over all items, and of the whole run."""

    at_once: int = 1
    """Items in inference side by side."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    items: int = 0
    wall_s: float = 0.0

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
    work: Work, timing: StageTimes, *, burst: int = 1, on_progress: Callable[[], None] = lambda: None
) -> None:
    """All items through all stages; at most ``timing.at_once + 3 * burst`` are on their way at any moment.

    ``burst`` items are read in a row, and written in a row: with short stages on few cores that saves a quarter of their time,
    whose code and data the network would otherwise drive out of the caches between any two items.

    An error in any stage ends all of them once what stood before it in line is written, and is raised. Ctrl-C (or SIGTERM)
    ends the reading; what was read is still written, and KeyboardInterrupt raised. ``timing`` is filled, in either case,
    and ``on_progress`` called now and then, in this thread.
    """
    at_once = timing.at_once
    if at_once < 1 or burst < 1:
        raise SlimError(f"{at_once} at once, bursts of {burst}: expected at least 1")
    with Interruption() as interruption, ThreadPoolExecutor(at_once, "inference") as pool:
        line = _Line(work, pool, timing, burst)
        started, switch_s = perf_counter(), sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_S)
        line.reader.start()
        line.writer.start()
        try:
            while line.writer.is_alive():
                line.writer.join(_LOOK_S)
                on_progress()
                if interruption.wanted:
                    line.stop()
                    line.reader.join(_LEAVE_READER_S)
                    line.queue.put(None)
                    line.writer.join()
        finally:
            line.stop()
            line.reader.join(_LEAVE_READER_S)
            timing.wall_s = perf_counter() - started
            sys.setswitchinterval(switch_s)
        on_progress()
    if line.error is not None:
        raise line.error
    if interruption.wanted:
        raise KeyboardInterrupt


_Entry = tuple[Any, Any, Future[Any]]
"""An item, what the network takes of it, and its output to come."""


class _Line:
    """The threads and what they share."""

    def __init__(self, work: Work, pool: ThreadPoolExecutor, timing: StageTimes, burst: int) -> None:
        self.work, self.pool, self.timing, self.burst = work, pool, timing, burst
        self.queue: SimpleQueue[_Entry | None] = SimpleQueue()
        self.room = threading.Semaphore(timing.at_once + 3 * burst)
        self.stopped = threading.Event()
        self.ended = False
        self.error: BaseException | None = None
        self.inference_lock = threading.Lock()
        self.reader = threading.Thread(target=self._read_all, name="reader", daemon=True)
        self.writer = threading.Thread(target=self._write_all, name="writer", daemon=True)

    def stop(self) -> None:
        self.stopped.set()

    def _read_all(self) -> None:
        try:
            while self._has_room():
                for _ in range(self.burst):
                    with self._timed("read"):
                        item = next(self.work.read, None)
                    if item is None or self.stopped.is_set():
                        return
                    with self._timed("pre-process"):
                        prepared = self.work.prepare(item)
                    self.queue.put((item, prepared, self.pool.submit(self._infer, prepared)))
        except BaseException as error:  # raised in the main thread, when all before it is written
            self._fail(error)
        finally:
            self.queue.put(None)
            close = getattr(self.work.read, "close", None)  # of a generator: here, where it runs
            if close is not None:
                close()

    def _has_room(self) -> bool:
        """For a burst, as soon as there is."""
        missing = self.burst
        while missing and not self.stopped.is_set():
            missing -= self.room.acquire(timeout=_LOOK_S)
        return not missing

    def _infer(self, prepared: Any) -> Any:
        started = perf_counter()
        output = self.work.infer(prepared)
        with self.inference_lock:
            self.timing.seconds["inference"] += perf_counter() - started
        return output

    def _write_all(self) -> None:
        try:
            while burst := self._next_burst():
                wait([future for _, _, future in burst])
                for item, prepared, future in burst:
                    output = future.result()
                    with self._timed("post-process"):
                        found = self.work.interpret(item, prepared, output)
                    with self._timed("write"):
                        self.work.write(item, found)
                    self.timing.items += 1
                    self.room.release()
        except BaseException as error:
            self._fail(error)

    def _next_burst(self) -> list[_Entry]:
        """The next entries; fewer at the end, then none."""
        entries: list[_Entry] = []
        while not self.ended and len(entries) < self.burst:
            entry = self.queue.get()
            self.ended = entry is None
            entries += [] if entry is None else [entry]
        return entries

    def _fail(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error

    def _timed(self, stage: str) -> _Timed:
        return _Timed(self.timing.seconds, stage)


class _Timed:
    """Adds the time until the block ends to its stage."""

    def __init__(self, seconds: dict[str, float], stage: str) -> None:
        self.seconds, self.stage = seconds, stage

    def __enter__(self) -> None:
        self.started = perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.stage] += perf_counter() - self.started
