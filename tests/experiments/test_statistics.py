"""Intervals, p values and corrections that can be computed by hand: with 2 degrees of freedom t has a closed form."""

from __future__ import annotations

from math import sqrt

import pytest

from experiments.statistics import equivalence, holm, paired_difference

T_975 = 4.302652729911275  # of 2 degrees of freedom


def upper_tail(t: float) -> float:
    """P(T > t) with 2 degrees of freedom."""
    return (1 - t / sqrt(t * t + 2)) / 2


def test_mean_interval_and_p_of_paired_differences() -> None:
    found = paired_difference([0.51, 0.42, 0.63], [0.50, 0.40, 0.60])  # differences 0.01, 0.02, 0.03
    assert (found.n, found.mean) == (3, pytest.approx(0.02))
    standard_error = 0.01 / sqrt(3)
    assert (found.low, found.high) == pytest.approx((0.02 - T_975 * standard_error, 0.02 + T_975 * standard_error))
    assert found.p == pytest.approx(2 * upper_tail(0.02 / standard_error))


def test_the_confidence_is_that_of_the_interval() -> None:
    found = paired_difference([0.01, 0.02, 0.03], [0.0, 0.0, 0.0], confidence=0.9)
    assert found.low == pytest.approx(0.02 - 2.919985580355516 * 0.01 / sqrt(3))


@pytest.mark.parametrize("sample", [[0.5], [0.5, 0.6, 0.7]])
def test_without_spread_there_is_a_mean_and_no_interval(sample: list[float]) -> None:
    """One pair, and pairs whose differences are equal up to rounding."""
    reference = [value - 0.1 for value in sample]
    found = paired_difference(sample, reference)
    assert (found.n, found.mean) == (len(sample), pytest.approx(0.1))
    assert (found.low, found.high, found.p) == (None, None, None)
    assert equivalence(sample, reference) is None


def test_equivalence_is_two_one_sided_tests() -> None:
    found = equivalence([0.498, 0.5, 0.502], [0.5, 0.5, 0.5], margin=0.01)
    assert found is not None
    assert found.p == found.not_worse_p == pytest.approx(found.not_better_p) == pytest.approx(upper_tail(sqrt(75)))


def test_a_better_sample_is_not_worse_but_not_equivalent() -> None:
    found = equivalence([0.508, 0.51, 0.512], [0.5, 0.5, 0.5], margin=0.01)
    assert found is not None
    assert found.not_worse_p == pytest.approx(upper_tail(sqrt(300)))
    assert found.p == found.not_better_p == pytest.approx(0.5)


def test_holm_steps_down_in_any_order() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_leaves_out_what_was_not_tested_and_ends_at_one() -> None:
    assert holm([0.6, None, 0.01, 0.7]) == [1.0, None, pytest.approx(0.03), 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("sample", "reference"), [([], []), ([0.1, 0.2], [0.1]), ([0.1, float("nan")], [0.1, 0.2])], ids=str
)
def test_samples_that_are_no_pairs_are_refused(sample: list[float], reference: list[float]) -> None:
    with pytest.raises(ValueError, match="paired samples"):
        paired_difference(sample, reference)


def test_a_margin_is_above_zero() -> None:
    with pytest.raises(ValueError, match="margin 0"):
        equivalence([0.1, 0.2], [0.1, 0.1], margin=0.0)
