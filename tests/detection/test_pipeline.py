"""Stages side by side: all items, in order, never too many at once, and an end in every case."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from detection.video.pipeline import STAGES, StageTimes, rate_alone, run_overlapped
from slim import SlimError


class Recorded:
    """Stages on numbers: tenfold, plus one. A stage may be given something to do at an item."""

    def __init__(self, count: int, **at: Any) -> None:
        self.count, self.at = count, at
        self.written: list[tuple[int, int]] = []
        self.open = self.most_open = self.inferring = self.most_inferring = 0
        self.closed = False
        self.lock = threading.Lock()

    def do(self, stage: str, item: int) -> None:
        where, act = self.at.get(stage, (None, None))
        if where == item:
            act()

    def read(self) -> Iterator[int]:
        try:
            for item in range(self.count):
                self.do("read", item)
                self.open += 1
                self.most_open = max(self.most_open, self.open)
                yield item
        finally:
            self.closed = True

    def infer(self, item: int) -> int:
        with self.lock:
            self.inferring += 1
            self.most_inferring = max(self.most_inferring, self.inferring)
        time.sleep(0.004 if item % 3 == 0 else 0.001)
        self.do("infer", item)
        with self.lock:
            self.inferring -= 1
        return 10 * item

    def write(self, item: int, found: int) -> None:
        self.do("write", item)
        self.written.append((item, found))
        self.open -= 1

    def prepare(self, item: int) -> int:
        self.do("prepare", item)
        return item

    def interpret(self, item: int, prepared: int, output: int) -> int:
        self.do("interpret", item)
        assert prepared == item
        return output + 1

    def run(self, timing: StageTimes, **more: Any) -> None:
        run_overlapped(self.read(), self, timing, **more)


@pytest.mark.parametrize(("at_once", "burst"), [(1, 1), (1, 3), (3, 2), (2, 7)])
def test_all_items_in_order_and_few_at_a_time(at_once: int, burst: int) -> None:
    recorded, timing, told = Recorded(40), StageTimes(at_once), []
    recorded.run(timing, burst=burst, on_progress=lambda: told.append(timing.items))
    assert recorded.written == [(item, 10 * item + 1) for item in range(40)]
    assert recorded.most_open <= at_once + 3 * burst and recorded.most_inferring == at_once
    assert told[-1] == timing.items == 40 and recorded.closed


def test_the_time_of_each_stage() -> None:
    timing = StageTimes(2)
    Recorded(30).run(timing)
    summary = timing.summary()
    assert tuple(summary["milliseconds"]) == STAGES and summary["milliseconds"]["inference"] >= 2
    assert summary["fps"] == pytest.approx(30 / timing.wall_s)
    timing.engine_fps = 2 * timing.fps
    assert timing.summary()["share_of_engine_fps"] == pytest.approx(0.5)
    assert StageTimes().summary()["fps"] == 0 and StageTimes().summary()["share_of_engine_fps"] is None


def test_the_rate_of_several_threads_that_do_nothing_else() -> None:
    calls: list[float] = []

    def call() -> None:
        time.sleep(0.01)
        calls.append(time.monotonic())

    rate = rate_alone(call, 3, 0.2)
    assert len(calls) - 3 <= rate * (calls[-1] - calls[0] + 0.02) and 30 < rate <= 300


@pytest.mark.parametrize("burst", [1, 4])
@pytest.mark.parametrize("stage", ["read", "prepare", "infer", "interpret", "write"])
def test_an_error_anywhere_ends_all_after_what_came_before_it(stage: str, burst: int) -> None:
    def fail() -> None:
        raise SlimError(f"{stage} failed")

    recorded = Recorded(1000, **{stage: (7, fail)})
    before = threading.active_count()
    with pytest.raises(SlimError, match=f"{stage} failed"):
        recorded.run(StageTimes(2), burst=burst)
    assert [item for item, _ in recorded.written] == list(range(7))
    assert threading.active_count() == before and recorded.closed


@pytest.mark.parametrize("burst", [1, 4])
def test_ctrl_c_writes_what_was_read(burst: int) -> None:
    recorded = Recorded(100_000, write=(9, lambda: os.kill(os.getpid(), signal.SIGINT)))
    timing, before = StageTimes(2), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        recorded.run(timing, burst=burst)
    assert 10 <= timing.items == len(recorded.written) < 1000 and recorded.open <= 1
    assert [item for item, _ in recorded.written] == list(range(timing.items))
    assert signal.getsignal(signal.SIGINT) is before and timing.fps > 0


def test_a_reader_that_waits_for_ever_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detection.video.pipeline._LEAVE_READER_S", 0.1)
    never = threading.Event()
    recorded = Recorded(10, read=(5, never.wait))
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        recorded.run(StageTimes())
    assert [item for item, _ in recorded.written] == list(range(5))
    never.set()


def test_nothing_at_once_is_refused() -> None:
    with pytest.raises(SlimError, match="0 at once"):
        Recorded(1).run(StageTimes(0))
