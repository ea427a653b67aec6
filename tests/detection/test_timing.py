"""Measuring in turns: the order of the runs, which of them count, and what is made of them; by a clock of our own."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from detection import timing
from detection.timing import Timing, Turns, milliseconds_per_image, rounds_for
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
    turns = Turns(calls, block=2, settle_ms=0, before=lambda name: clock.order.append(f"before {name}"), clock=clock)
    turns.round()
    turns.round()
    assert clock.order == ["before a", "a", "a", "a", "before b", "b", "b", "b"] * 2
    found = turns.timings()
    assert found["a"].runs_ms == pytest.approx((1, 2, 3, 4)) and found["b"].runs_ms == pytest.approx((5, 5, 5, 5))
    assert found["a"].median_ms == pytest.approx(2.5) and found["b"].percentile_ms(90) == pytest.approx(5)


def test_what_is_short_runs_until_it_has_settled() -> None:
    clock = Clock()
    calls = {"short": functools.partial(clock.run, "short", 4), "long": functools.partial(clock.run, "long", 30)}
    Turns(calls, block=1, settle_ms=10, clock=clock).round()
    assert clock.order == ["short"] * (3 + 1) + ["long"] * (1 + 1)


def test_rounds_that_warm_up_do_not_count() -> None:
    clock = Clock()
    turns = Turns({"a": functools.partial(clock.run, "a", 100, 100, 7)}, block=1, settle_ms=0, clock=clock)
    for counts in rounds_for(repeats=2, warmup=1, block=1):
        turns.round(counts)
    assert turns.timings() == {"a": Timing(pytest.approx((7, 7)))}  # type: ignore[arg-type]
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
    monkeypatch.setattr(timing, "Turns", functools.partial(Turns, clock=clock))
    models = {"slow": Recorder(clock, "slow", 50), "fast": Recorder(clock, "fast", 30)}
    found = milliseconds_per_image(models, torch.zeros(2, 3, 8, 8), repeats=3, warmup=1)
    assert found == pytest.approx({"slow": 25, "fast": 15})
    assert clock.order == (["slow"] * 4 + ["fast"] * 4) * 2
    assert models["slow"].training


def test_no_repeat_and_no_block_are_errors() -> None:
    with pytest.raises(SlimError, match="repeats=0"):
        milliseconds_per_image({}, torch.zeros(1, 3, 8, 8), repeats=0)
    with pytest.raises(SlimError, match="blocks of 0 runs"):
        Turns({}, block=0)
