"""The search for the widest network that is fast enough, by measurements of few candidates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

FIXED = 0.2
"""What is first taken for the share of a network's latency that does not fall with its MACs."""
NARROW = 0.02
"""A bracket so narrow, as a share of the MACs, is not divided further."""
MARGIN = 0.15
"""The part of a bracket at each of its ends in which no trial is made: it would hardly narrow it."""


@dataclass(frozen=True)
class Trial:
    """A candidate and its latency. ``keep_macs`` is the share of the uncut network's MACs that it has (at most what was
    asked for), ``latency`` in the unit of the target, ``widths`` tells equal candidates."""

    round_to: int
    keep_macs: float
    latency: float
    widths: str


Measure = Callable[[float, int], Trial]
"""The candidate that keeps at most this share of the MACs, in multiples of so many channels."""


def search_latency(
    measure: Measure,
    target: float,
    least: Mapping[int, float],
    *,
    whole: float = 1.0,
    tolerance: float = 0.05,
    most_trials: int = 10,
) -> Trial | None:
    """The candidate with the most MACs whose latency is at most ``target``; None where even the smallest is slower.

    Each rounding in ``least`` is searched between the smallest share of the MACs that it allows, its value there, and the
    uncut network, whose latency is ``whole``. A latency from ``1 - tolerance`` of the target up ends the search. A later
    rounding is tried from the MACs of the best network so far: it is only of use where it measures faster at them.
    """
    best: Trial | None = None
    for round_to, smallest in least.items():
        if smallest >= 1:
            continue
        start = None if best is None else max(best.keep_macs, smallest)
        found = _widest(measure, target, round_to, smallest, start, whole, tolerance, most_trials)
        if found is not None and (best is None or found.keep_macs > best.keep_macs):
            best = found
    return best


def _widest(
    measure: Measure,
    target: float,
    round_to: int,
    smallest: float,
    start: float | None,
    whole: float,
    tolerance: float,
    most_trials: int,
) -> Trial | None:
    """Of one rounding. With ``start``, smaller networks than of this share are of no interest."""
    aim = (1 - tolerance / 2) * target
    fast: Trial | None = None
    low, high, slow_latency = smallest, 1.0, whole
    share = max(smallest, (aim / whole - FIXED) / (1 - FIXED)) if start is None else start
    for number in range(most_trials):
        if fast is None and start is None and number == most_trials - 1:
            share = smallest  # else nothing would be known of it
        trial = measure(share, round_to)
        slower = (high, slow_latency)
        if trial.latency <= target:
            fast, low = trial, share
        elif fast is None and (start is not None or share <= smallest):
            return None
        else:
            high, slow_latency = trial.keep_macs, trial.latency
        if high - low <= NARROW and fast is not None:
            break
        margin = MARGIN * (high - low)
        if fast is None:
            share = min(_on_line(slower, (high, slow_latency), aim), high - margin)
            share = share if share > smallest + NARROW else smallest
            continue
        if fast.latency >= (1 - tolerance) * target:
            break
        line = _on_line((high, slow_latency), (fast.keep_macs, fast.latency), aim)
        share = min(max(line, low + margin), high - margin)
    return fast


def _on_line(first: tuple[float, float], second: tuple[float, float], latency: float) -> float:
    """The share at which the line through two (share, latency) has this latency; 0 where it does not rise."""
    slope = (first[1] - second[1]) / (first[0] - second[0]) if first[0] != second[0] else 0.0
    return first[0] + (latency - first[1]) / slope if slope > 0 else 0.0
