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
_ALONE_S = 0.5
_LEAVE_READER_S = 3.0
"""How long a reader may take to notice the end: one that waits for a camera is left behind."""


def rate_alone(call: Callable[[], Any], at_once: int, seconds: float = _ALONE_S) -> float:
    """How many calls a second as many threads make that do nothing else, after one of each to warm up."""

    def repeat(_: int) -> tuple[int, float]:
        call()
        started, count = perf_counter(), 0
        while not count or perf_counter() - started < seconds:
            call()
            count += 1
        return count, perf_counter() - started

    with ThreadPoolExecutor(at_once) as pool:
        return sum(count / took for count, took in pool.map(repeat, range(at_once)))


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
    engine_fps: float = 0.0
    """Items a second of inference alone, with nothing beside it: ``rate_alone``."""

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
    queue: SimpleQueue[list[_Entry] | BaseException | None] = SimpleQueue()  # bursts; an error or None is the end
    room, stopped, lock = threading.Semaphore(2 + -(-timing.at_once // burst)), threading.Event(), threading.Lock()

    def infer(prepared: Any) -> Any:
        began = perf_counter()
        output = stages.infer(prepared)
        with lock:
            timing.seconds["inference"] += perf_counter() - began
        return output

    def read() -> None:
        entries: list[_Entry] = []
        end: BaseException | None = None
        try:
            while True:
                if not entries:
                    room.acquire()
                if stopped.is_set():
                    break
                with timing.timed("read"):
                    item = next(items, None)
                if item is None or stopped.is_set():
                    break
                with timing.timed("pre-process"):
                    prepared = stages.prepare(item)
                entries.append((item, prepared, pool.submit(infer, prepared)))
                if len(entries) == burst:
                    queue.put(entries)
                    entries = []
        except BaseException as error:  # raised in the caller's thread, when all before it is written
            end = error
        finally:
            queue.put(entries)
            queue.put(end)
            if close := getattr(items, "close", None):  # of a generator: here, where it runs
                close()

    def stop() -> None:
        if not stopped.is_set():
            stopped.set()
            room.release()
            reader.join(_LEAVE_READER_S)
            queue.put(None)

    started, switch_s = perf_counter(), sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    reader = threading.Thread(target=read, name="reader", daemon=True)
    with Interruption() as interruption, ThreadPoolExecutor(timing.at_once, "inference") as pool:
        reader.start()
        try:
            while True:
                on_progress()
                if interruption.wanted:
                    stop()
                try:
                    entries = queue.get(timeout=_LOOK_S)
                except Empty:
                    continue
                if not isinstance(entries, list):
                    break
                wait([future for _, _, future in entries])
                for item, prepared, future in entries:
                    output = future.result()
                    with timing.timed("post-process"):
                        found = stages.interpret(item, prepared, output)
                    with timing.timed("write"):
                        stages.write(item, found)
                    timing.items += 1
                room.release()
        finally:
            stop()
            timing.wall_s = perf_counter() - started
            sys.setswitchinterval(switch_s)
            on_progress()
    if entries is not None:
        raise entries
    if interruption.wanted:
        raise KeyboardInterrupt


_Entry = tuple[Any, Any, Future[Any]]
"""An item, what the network takes of it, and its output to come."""
