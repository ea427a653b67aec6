"""How long one call takes against another, measured until the ratio is known."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .timing import Timing, Turns

CERTAINTY = 0.01
"""Of the ratio: the standard error at which it is known."""
LEAST_ROUNDS = 10
MOST_SECONDS = 15.0
FIRST, SECOND = "first", "second"


@dataclass(frozen=True)
class Comparison:
    """The second call's time over the first's: the median of the rounds' ratios, and its standard error."""

    first: Timing
    second: Timing
    ratio: float
    error: float


def compare(
    first: Callable[[], object], second: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> Comparison:
    """Both in ``Turns`` until the ratio's standard error is at most ``CERTAINTY`` of it, or ``MOST_SECONDS`` have passed.

    A round's ratio is that of its medians: what disturbs a whole round disturbs both, and a round that is disturbed in part
    is one of many.
    """
    turns = Turns({FIRST: first, SECOND: second}, clock=clock)
    turns.round(counts=False)
    ratios: list[float] = []
    started = clock()
    while True:
        turns.round()
        timings = turns.timings()
        latest = [statistics.median(timings[name].runs_ms[-turns.block :]) for name in (FIRST, SECOND)]
        ratios.append(latest[1] / latest[0])
        ratio, error = statistics.median(ratios), standard_error(ratios)
        known = len(ratios) >= LEAST_ROUNDS and error <= CERTAINTY * ratio
        if known or clock() - started > MOST_SECONDS:
            return Comparison(timings[FIRST], timings[SECOND], ratio, error)


def standard_error(values: Sequence[float]) -> float:
    """Of the median, from the median distance to it, as for normal values; 0 for a single value."""
    middle = statistics.median(values)
    spread = 1.4826 * statistics.median(abs(value - middle) for value in values)
    return float(1.2533 * spread / len(values) ** 0.5)


def summary(timing: Timing) -> dict[str, Any]:
    """What a record keeps of the runs."""
    percentiles = {f"p{percent}_ms": timing.percentile_ms(percent) for percent in (10, 90)}
    return {"median_ms": timing.median_ms, **percentiles, "runs": len(timing.runs_ms)}
