"""Interleaved timing: the order of the runs, which of them count, and what is made of them; by a clock of our own."""

from __future__ import annotations

import functools
import itertools
import random
import statistics
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from detection import timing
from detection.timing import InterleavedTimer, Timing, compare, milliseconds_per_image, rounds_for, standard_error
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


def test_a_models_median_is_that_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timing, "InterleavedTimer", functools.partial(InterleavedTimer, clock=clock))
    models = {"slow": Recorder(clock, "slow", 50), "fast": Recorder(clock, "fast", 30)}
    found = milliseconds_per_image(models, torch.zeros(2, 3, 8, 8), repeats=3, warmup=1)
    assert found == pytest.approx({"slow": 25, "fast": 15})
    assert clock.order == (["slow"] * 4 + ["fast"] * 4) * 2
    assert models["slow"].training


def test_no_repeat_and_no_block_are_errors() -> None:
    with pytest.raises(SlimError, match="repeats=0"):
        milliseconds_per_image({}, torch.zeros(1, 3, 8, 8), repeats=0)
    with pytest.raises(SlimError, match="blocks of 0 runs"):
        InterleavedTimer({}, block=0)


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
