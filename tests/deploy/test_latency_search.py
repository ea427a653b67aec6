"""The search for the widest network that is fast enough: exact, without a network or a clock."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy import MeasuredCut, search_latency
from deploy.latency_search import NARROW

LEAST = {8: 0.05, 16: 0.2}


class Machine:
    """Networks whose latency is a function of the MACs that they have, of which only some numbers are possible."""

    def __init__(self, latency: Callable[[float, int], float], step: float = 0.0) -> None:
        self.latency, self.step = latency, step
        self.asked: list[tuple[float, int]] = []
        self.trials: list[MeasuredCut] = []

    def __call__(self, share: float, round_to: int) -> MeasuredCut:
        assert LEAST[round_to] <= share <= 1
        keep = share if not self.step else max(LEAST[round_to], share // self.step * self.step)
        self.asked.append((share, round_to))
        self.trials.append(MeasuredCut(round_to, keep, self.latency(keep, round_to), f"{round_to} {keep}"))
        return self.trials[-1]


def test_a_line_is_met_at_the_second_trial() -> None:
    machine = Machine(lambda keep, _: 0.4 + 0.6 * keep)
    found = search_latency(machine, 0.6, {8: 0.05}, tolerance=0.02)
    assert found is not None and found.latency == pytest.approx(0.594) and found.keep_macs == pytest.approx(0.194 / 0.6)
    # The smallest network, then on the line through it and the uncut network.
    assert machine.asked == [(0.05, 8), (pytest.approx(0.194 / 0.6), 8)]


def test_the_rounding_that_measures_faster_keeps_more() -> None:
    for faster in (8, 16):
        machine = Machine(
            lambda keep, round_to, faster=faster: (0.9 if round_to == faster else 1.0) * (0.2 + 0.8 * keep)
        )
        found = search_latency(machine, 0.6, LEAST)
        assert found is not None and found.round_to == faster and 0.95 * 0.6 <= found.latency <= 0.6
    slower = [trial for trial in machine.trials if trial.round_to == 8]
    assert max(trial.keep_macs for trial in slower if trial.latency <= 0.6) < found.keep_macs
    machine = Machine(lambda keep, round_to: (0.9 if round_to == 8 else 1.0) * (0.2 + 0.8 * keep))
    search_latency(machine, 0.6, LEAST)
    assert [round_to for _, round_to in machine.asked].count(16) == 1, "one trial tells that it is slower"


def test_what_even_the_smallest_network_does_not_reach() -> None:
    machine = Machine(lambda keep, _: 0.7 + 0.3 * keep)
    assert search_latency(machine, 0.6, LEAST) is None
    assert [asked for asked in machine.asked if asked[0] == LEAST[asked[1]]] == [(0.05, 8), (0.2, 16)]
    assert len(machine.asked) <= 5


def test_a_latency_that_does_not_fall_at_first_ends_at_the_smallest_network() -> None:
    machine = Machine(lambda keep, _: 1.0 if keep > 0.1 else 0.5)
    found = search_latency(machine, 0.6, {8: 0.05})
    assert found is not None and found.latency == 0.5
    # None in steps so wide that no other network lies between.
    assert search_latency(Machine(lambda keep, _: 1.0), 0.6, {8: 0.05}, most_trials=3) is None


def test_the_smallest_network_is_taken_where_nothing_larger_is_found() -> None:
    """Here every line points below it, and a part of the way is left each time."""
    machine = Machine(lambda keep, _: 0.58 + 0.42 * keep**2)
    found = search_latency(machine, 0.58106, {8: 0.05}, tolerance=0.0, most_trials=4)
    assert found is not None and found.keep_macs == 0.05 and len(machine.asked) == 4


def test_a_network_that_is_no_larger_than_its_floor_is_not_cut() -> None:
    machine = Machine(lambda keep, _: keep)
    assert search_latency(machine, 0.6, {8: 1.0}) is None and not machine.asked


def test_a_later_round_starts_from_a_network_that_is_already_fast() -> None:
    machine = Machine(lambda keep, _: 0.5 * (0.3 + 0.7 * keep))
    found = search_latency(machine, 0.4, {8: 0.05}, whole=0.5)
    assert found is not None and 0.95 * 0.4 <= found.latency <= 0.4 and len(machine.asked) <= 3


@settings(max_examples=300, deadline=None)
@given(
    fixed=st.floats(0.0, 0.9),
    bend=st.floats(0.3, 3.0),
    target=st.floats(0.1, 0.95),
    step=st.sampled_from([0.0, 0.02, 0.05, 0.2]),
)
def test_whatever_rises_with_the_macs_is_found(fixed: float, bend: float, target: float, step: float) -> None:
    """Within the tolerance, or no other network lies between the one found and one that is too slow."""

    def latency(keep: float, _: int) -> float:
        return fixed + (1 - fixed) * keep**bend

    machine = Machine(latency, step)
    found = search_latency(machine, target, {8: 0.05}, most_trials=30)
    if latency(0.05, 8) > target:
        assert found is None
        return
    assert found is not None and found.latency <= target
    slow = min([trial.keep_macs for trial in machine.trials if trial.latency > target], default=1.0)
    last_share = max(share for (share, _), trial in zip(machine.asked, machine.trials, strict=True) if trial == found)
    assert found.latency >= 0.95 * target or slow - last_share <= NARROW
    assert len({trial.widths for trial in machine.trials}) <= 12


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), target=st.floats(0.4, 0.9))
def test_noise_costs_no_more_than_its_size(seed: int, target: float) -> None:
    draw = random.Random(seed)
    machine = Machine(lambda keep, _: (0.2 + 0.8 * keep) * (1 + draw.uniform(-0.02, 0.02)), step=0.02)
    found = search_latency(machine, target, LEAST)
    assert found is not None and found.latency <= target and len(machine.asked) <= 20
    assert 0.2 + 0.8 * found.keep_macs <= target * 1.021
    assert 0.2 + 0.8 * found.keep_macs >= target * 0.9
