"""Two calls against each other, by a clock of our own."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Iterable

import pytest

from detection.comparison import compare, standard_error, summary
from detection.timing import Timing


class Clock:
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
    clock = Clock()
    found = compare(clock.first, clock.second, clock)
    assert found.ratio == pytest.approx(0.7) and found.error == pytest.approx(0)
    assert len(found.first.runs_ms) == len(found.second.runs_ms) == 30
    assert found.first.median_ms == pytest.approx(30) and found.second.median_ms == pytest.approx(21)


def test_drift_of_whole_rounds_cancels() -> None:
    clock = Clock(drift=[1.0, 2.0, 1.5, 3.0, 1.0, 1.2, 5.0, 4.0, 2.5, 1.1])
    found = compare(clock.first, clock.second, clock)
    assert found.ratio == pytest.approx(0.7) and found.error == pytest.approx(0)
    assert found.first.percentile_ms(90) > 60


def test_a_restless_machine_is_given_up_on() -> None:
    clock = Clock()
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
    found = summary(Timing((10.0, 20.0, 30.0, 40.0, 50.0)))
    assert found == {"median_ms": 30, "p10_ms": 14, "p90_ms": 46, "runs": 5}
