"""How long one network takes against another, in turns, so that whatever else the machine does meets both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Run = Callable[[], object]
"""One run of a network."""

TURN = 5
"""Runs of one network before the other's turn; the first finds the caches cold and does not count."""
TURNS = 2
"""Of each network in a block."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of single runs of a network: median, 10th and 90th percentile."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int

    @staticmethod
    def of(seconds: Sequence[float]) -> Times:
        ordered = [1000 * value for value in sorted(seconds)]
        low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.9))
        return Times(statistics.median(ordered), low, high, len(ordered))


@dataclass(frozen=True)
class Comparison:
    """A candidate's time over the dense network's: the median of the blocks' ratios and its standard error."""

    dense: Times
    candidate: Times
    ratio: float
    error: float
    blocks: int


def compare_latency(
    dense: Run, candidate: Run, *, error: float = 0.01, least_blocks: int = 8, most_seconds: float = 15.0
) -> Comparison:
    """Measure until the ratio's standard error is at most ``error`` of it, or ``most_seconds`` have passed.

    A block is ``TURNS`` turns of each network, who goes first alternates, and its ratio is that of the medians in it: what
    disturbs a whole block disturbs both.
    """
    taken: dict[str, list[float]] = {"dense": [], "candidate": []}
    ratios: list[float] = []
    started = time.perf_counter()
    while True:
        order = [("dense", dense), ("candidate", candidate)]
        block: dict[str, list[float]] = {"dense": [], "candidate": []}
        for turn in range(TURNS):
            for name, run in order if (turn + len(ratios)) % 2 else reversed(order):
                block[name] += timed(run)
        ratios.append(statistics.median(block["candidate"]) / statistics.median(block["dense"]))
        for name, seconds in block.items():
            taken[name] += seconds
        ratio, found = statistics.median(ratios), standard_error(ratios)
        enough = len(ratios) >= least_blocks and found <= error * ratio
        if enough or time.perf_counter() - started > most_seconds:
            return Comparison(Times.of(taken["dense"]), Times.of(taken["candidate"]), ratio, found, len(ratios))


def measure_latency(run: Run, *, turns: int = 20, most_seconds: float = 10.0) -> Times:
    """A network on its own, in as many turns as ``most_seconds`` allow."""
    taken: list[float] = []
    started = time.perf_counter()
    for _ in range(turns):
        taken += timed(run)
        if time.perf_counter() - started > most_seconds:
            break
    return Times.of(taken)


def timed(run: Run) -> list[float]:
    """Seconds of the runs of one turn that count."""
    seconds = []
    for _ in range(TURN):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def standard_error(values: Sequence[float]) -> float:
    """Of the median, from the median distance to it (for normal values); 0 for a single value."""
    middle = statistics.median(values)
    spread = 1.4826 * statistics.median(abs(value - middle) for value in values)
    return float(1.2533 * spread / len(values) ** 0.5)
