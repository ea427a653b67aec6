"""Interleaved timing: the order of the runs, which of them count, and what is made of them; by a clock of our own."""

from __future__ import annotations

import functools
import itertools
import random
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from detection import timing
from detection.timing import (
    InterleavedTimer,
    Timing,
    compare,
    disturbance,
    other_cpu_seconds,
    rounds_for,
    standard_error,
    time_models,
    timing_warning,
)
from slim import SlimError


class Clock:
    """Seconds, which pass only when something is run."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def run(self, name: str, *durations_ms: float) -> None:
        """Takes the durations in turn, the last one from then on."""
        done = self.order.count(name)
        self.order.append(name)
        self.now += durations_ms[min(done, len(durations_ms) - 1)] / 1000

    def __call__(self) -> float:
        return self.now


def test_every_round_runs_a_block_of_each_and_the_runs_before_it_do_not_count() -> None:
    clock = Clock()
    calls = {"a": functools.partial(clock.run, "a", 9, 1, 2, 9, 3, 4), "b": functools.partial(clock.run, "b", 5)}
    timer = InterleavedTimer(
        calls, block=2, settle_ms=0, before=lambda name: clock.order.append(f"before {name}"), clock=clock
    )
    timer.round()
    timer.round()
    assert clock.order == ["before a", "a", "a", "a", "before b", "b", "b", "b"] * 2
    found = timer.timings()
    assert found["a"].runs_ms == pytest.approx((1, 2, 3, 4)) and found["b"].runs_ms == pytest.approx((5, 5, 5, 5))
    assert found["a"].median_ms == pytest.approx(2.5) and found["b"].percentile_ms(90) == pytest.approx(5)


def test_what_is_short_runs_until_it_has_settled() -> None:
    clock = Clock()
    calls = {"short": functools.partial(clock.run, "short", 4), "long": functools.partial(clock.run, "long", 30)}
    InterleavedTimer(calls, block=1, settle_ms=10, clock=clock).round()
    assert clock.order == ["short"] * (3 + 1) + ["long"] * (1 + 1)


def test_rounds_that_warm_up_do_not_count() -> None:
    clock = Clock()
    timer = InterleavedTimer({"a": functools.partial(clock.run, "a", 100, 100, 7)}, block=1, settle_ms=0, clock=clock)
    for counts in rounds_for(repeats=2, warmup=1, block=1):
        timer.round(counts)
    assert timer.timings() == {"a": Timing(pytest.approx((7, 7)))}  # type: ignore[arg-type]
    assert rounds_for(repeats=7, warmup=2, block=3) == [False, False, True, True, True]


def test_percentiles_lie_between_runs() -> None:
    found = Timing((40.0, 10.0, 30.0, 20.0, 50.0))
    assert (found.percentile_ms(10), found.median_ms, found.percentile_ms(90)) == (14, 30, 46)


class Recorder(nn.Module):
    def __init__(self, clock: Clock, name: str, milliseconds: float) -> None:
        super().__init__()
        self.clock, self.name, self.milliseconds = clock, name, milliseconds

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        self.clock.run(self.name, self.milliseconds)
        return images


def test_models_run_in_evaluation_mode_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timing, "InterleavedTimer", functools.partial(InterleavedTimer, clock=clock))
    models = {"slow": Recorder(clock, "slow", 50), "fast": Recorder(clock, "fast", 30)}
    found = time_models(models, torch.zeros(2, 3, 8, 8), repeats=3, warmup=1)
    assert {name: found[name].median_ms for name in found} == pytest.approx({"slow": 50, "fast": 30})
    assert clock.order == (["slow"] * 4 + ["fast"] * 4) * 2
    assert models["slow"].training


def test_no_repeat_and_no_block_are_errors() -> None:
    with pytest.raises(SlimError, match="repeats=0"):
        time_models({}, torch.zeros(1, 3, 8, 8), repeats=0)
    with pytest.raises(SlimError, match="blocks of 0 runs"):
        InterleavedTimer({}, block=0)


class OtherProcesses:
    """CPU seconds of other processes, which use so many cores while a clock goes on."""

    def __init__(self, clock: Clock, cores: float) -> None:
        self.clock, self.cores = clock, cores

    def __call__(self) -> float:
        return self.cores * self.clock.now


@pytest.mark.parametrize(
    ("threads", "cores", "words"),
    [
        (2, 0.15, ""),
        (2, 0.24, "other processes used 0.2 of 2 cores meanwhile"),
        (2, 1.9, "other processes used 1.9 of 2 cores meanwhile"),
        (1, 1.1, ""),
        (1, 1.24, "other processes used 1.2 of 2 cores meanwhile"),
        (0, 0.3, "other processes used 0.3 of 2 cores meanwhile"),
        (8, 0.3, "other processes used 0.3 of 2 cores meanwhile"),
    ],
)
def test_other_processes_on_the_cores_of_the_call_are_told(
    threads: int, cores: float, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "threads_of", lambda count: count or 2)
    clock = Clock()
    calls = {"a": functools.partial(clock.run, "a", 50)}
    timer = InterleavedTimer(calls, threads=threads, clock=clock, others=OtherProcesses(clock, cores))
    timer.round()
    timer.round()
    assert timer.timings()["a"].warning == words


def test_what_others_did_while_it_warmed_up_and_what_is_lost_in_ticks_is_not_told() -> None:
    clock = Clock()
    others = OtherProcesses(clock, 0)
    timer = InterleavedTimer({"a": functools.partial(clock.run, "a", 10)}, clock=clock, others=others)
    others.cores = 50
    timer.round(counts=False)
    others.cores = 0
    clock.now = 0
    timer.round()
    assert timer.timings()["a"].warning == ""
    others.cores = 0.04 / clock.now
    timer = InterleavedTimer({"a": functools.partial(clock.run, "a", 0.1)}, settle_ms=0, clock=clock, others=others)
    timer.round()
    assert timer.timings()["a"].warning == ""


def test_runs_that_differ_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "threads_of", lambda count: count or 2)
    assert disturbance([10, 10, 20, 20], 0.0, 2) == ""
    assert disturbance([10, 10, 35, 35], 0.0, 2) == "the 90th percentile is 3.5 times the 10th"
    assert disturbance([10, 10, 35, 35], 2.0, 2) == (
        "other processes used 2.0 of 2 cores meanwhile and the 90th percentile is 3.5 times the 10th"
    )


def test_one_line_warns_of_several_measurements() -> None:
    assert timing_warning(["", ""]) == timing_warning([]) == ""
    assert timing_warning(["", "bad", "very bad"]) == (
        "warning: times that say little (2 of 3 measurements): very bad; measure again on an idle machine"
    )


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="the system does not tell")
def test_the_cpu_time_of_another_process_counts() -> None:
    burn = "import time\nwhile time.process_time() < 0.4: pass"
    before = other_cpu_seconds()
    subprocess.run([sys.executable, "-c", burn], check=True)
    assert other_cpu_seconds() - before > 0.3


def test_a_slow_network_is_measured_in_fewer_runs(caplog: pytest.LogCaptureFixture) -> None:
    """A block of four runs of 3 s; in 25 s one that warms up and one that counts begin, and a second one."""
    caplog.set_level("INFO")
    clock = Clock()
    timer = InterleavedTimer({"a": functools.partial(clock.run, "a", 3000)}, clock=clock)
    timer.run(rounds_for(repeats=30, warmup=1), most_seconds=25)
    assert len(timer.timings()["a"].runs_ms) == 6 and len(clock.order) == 12
    assert "measured 6 runs of each network, 24 fewer than asked for: 25 s a network were over" in caplog.text


def test_the_slowest_network_has_a_round_that_counts() -> None:
    clock = Clock()
    calls = {name: functools.partial(clock.run, name, 60_000) for name in "ab"}
    timer = InterleavedTimer(calls, clock=clock)
    timer.run(rounds_for(repeats=30, warmup=5), most_seconds=25)
    assert [len(found.runs_ms) for found in timer.timings().values()] == [3, 3]
    assert clock.order == ["a"] * 4 + ["b"] * 4 + ["a"] * 4 + ["b"] * 4


def test_a_fast_network_has_all_its_runs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    clock = Clock()
    timer = InterleavedTimer({"a": functools.partial(clock.run, "a", 20)}, clock=clock)
    timer.run(rounds_for(repeats=30, warmup=2))
    assert len(timer.timings()["a"].runs_ms) == 30 and not caplog.text


class DriftingClock:
    """Seconds, which pass only when something is run; ``drift`` stretches those of a round of both calls."""

    def __init__(self, drift: Iterable[float] = ()) -> None:
        self.now, self.drift, self.runs = 0.0, itertools.chain(drift, itertools.repeat(1.0)), 0
        self.stretch = 1.0

    def __call__(self) -> float:
        return self.now

    def first(self) -> None:
        self.now += 0.030 * self.stretch

    def second(self) -> None:
        self.now += 0.021 * self.stretch
        self.runs += 1
        if self.runs % 4 == 0:  # one that settles and three that count
            self.stretch = next(self.drift)


def test_the_ratio_is_known_when_the_rounds_agree() -> None:
    clock = DriftingClock()
    found = compare(clock.first, clock.second, clock)
    assert found.ratio == pytest.approx(0.7) and found.error == pytest.approx(0)
    assert len(found.first.runs_ms) == len(found.second.runs_ms) == 30
    assert found.first.median_ms == pytest.approx(30) and found.second.median_ms == pytest.approx(21)


def test_drift_of_whole_rounds_cancels() -> None:
    clock = DriftingClock(drift=[1.0, 2.0, 1.5, 3.0, 1.0, 1.2, 5.0, 4.0, 2.5, 1.1])
    found = compare(clock.first, clock.second, clock)
    assert found.ratio == pytest.approx(0.7) and found.error == pytest.approx(0)
    assert found.first.percentile_ms(90) > 60


def test_a_restless_machine_is_given_up_on() -> None:
    clock = DriftingClock()
    draw = random.Random(0)

    def second() -> None:
        clock.now += 0.021 * 10 ** draw.uniform(-2, 0.5)

    found = compare(clock.first, second, clock)
    assert 15 < clock.now < 17 and found.error > 0.01 * found.ratio and len(found.first.runs_ms) > 30
    rounds = [
        (found.first.runs_ms[i : i + 3], found.second.runs_ms[i : i + 3]) for i in range(0, len(found.first.runs_ms), 3)
    ]
    ratios = [statistics.median(second) / statistics.median(first) for first, second in rounds]
    assert found.ratio == statistics.median(ratios) and found.error == standard_error(ratios)


def test_the_standard_error_of_a_median() -> None:
    assert standard_error([3.0]) == 0 and standard_error([1, 1, 1, 9]) == 0
    assert standard_error([1, 2, 3, 4, 5]) == pytest.approx(1.4826 * 1.2533 / 5**0.5)


def test_what_a_record_keeps() -> None:
    found = Timing((10.0, 20.0, 30.0, 40.0, 50.0)).summary()
    assert found == {"median_ms": 30, "p10_ms": 14, "p90_ms": 46, "runs": 5}
    assert Timing((10.0,), "why").summary() == {
        "median_ms": 10,
        "p10_ms": 10,
        "p90_ms": 10,
        "runs": 1,
        "warning": "why",
    }
