"""The search for the widest network that is fast enough, by measurements of few candidates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

NARROW = 0.02
"""A bracket so narrow, as a share of the MACs, is not divided further."""
MARGIN = 0.15
"""The part of a bracket at each of its ends in which nothing is measured: it would hardly narrow it."""


@dataclass(frozen=True)
class MeasuredCut:
    """A candidate and its latency. ``keep_macs`` is the share of the uncut network's MACs that it has (at most what was
    asked for), ``latency`` in the unit of the target, ``widths`` tells equal candidates."""

    round_to: int
    keep_macs: float
    latency: float
    widths: str


MeasureAt = Callable[[float, int], MeasuredCut]
"""The candidate that keeps at most this share of the MACs, in multiples of so many channels."""


def search_latency(
    measure: MeasureAt,
    target: float,
    least: Mapping[int, float],
    *,
    whole: float = 1.0,
    tolerance: float = 0.05,
    most_trials: int = 10,
) -> MeasuredCut | None:
    """The candidate with the most MACs whose latency is at most ``target``; None where even the smallest is slower.

    Each rounding in ``least`` is searched between the smallest share of the MACs that it allows, its value there, which is
    measured first, and the uncut network, whose latency is ``whole``: by the line through the two ends of what is left,
    where a latency from ``1 - tolerance`` of the target up is near enough. A later rounding starts from the MACs of the
    best network so far: it is only of use where it measures faster at them.
    """
    aim = (1 - tolerance / 2) * target
    best: MeasuredCut | None = None
    for round_to, smallest in least.items():
        low, high, slow = max(smallest, best.keep_macs) if best else smallest, 1.0, whole
        if low >= 1:
            continue
        fast = measure(low, round_to)
        if fast.latency > target:
            continue
        for _ in range(most_trials - 1):
            if fast.latency >= (1 - tolerance) * target or high - low <= NARROW:
                break
            slope, margin = (slow - fast.latency) / (high - fast.keep_macs), MARGIN * (high - low)
            share = min(max(high + (aim - slow) / slope, low + margin), high - margin)
            tried = measure(share, round_to)
            if tried.latency <= target:
                fast, low = tried, share
            else:
                high, slow = tried.keep_macs, tried.latency
        if best is None or fast.keep_macs > best.keep_macs:
            best = fast
    return best
