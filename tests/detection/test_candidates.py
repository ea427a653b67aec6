from __future__ import annotations

from pathlib import Path

import pytest

from detection.candidates import Candidate, check_drop, round_target, smaller_cut, worst_of, write_pareto

BASELINE = {"ap": 0.5, "per_class": {"a": 0.7, "b": 0.3}}


def test_rounds_cut_by_equal_ratios() -> None:
    first = round_target(1000, 125, 3)
    assert first == pytest.approx(500)
    second = round_target(first, 125, 2)
    assert second == pytest.approx(250) and round_target(second, 125, 1) == pytest.approx(125)


def test_a_second_attempt_goes_half_as_far() -> None:
    assert smaller_cut(1000, 250) == pytest.approx(500)


@pytest.mark.parametrize(
    ("ap", "per_class", "accepted", "words"),
    [
        (0.5, {"a": 0.7, "b": 0.3}, True, "within 0.02"),
        (0.48, {"a": 0.66, "b": 0.28}, True, "within 0.02"),
        (0.47, {"a": 0.66, "b": 0.28}, False, "AP 0.4700 is 0.0300 below the dense network's 0.5000, more than 0.02"),
        (0.5, {"a": 0.75, "b": 0.25}, False, "the worst class's AP 0.2500 is 0.0500 below"),
        (0.4, {"a": 0.27, "b": 0.4}, False, "and the worst class's AP 0.2700"),
        (float("nan"), {"a": 0.7, "b": 0.3}, False, "AP nan"),
    ],
)
def test_ap_and_the_worst_class_must_stay_close(
    ap: float, per_class: dict[str, float], accepted: bool, words: str
) -> None:
    found, reason = check_drop(ap, per_class, BASELINE, 0.02 + 1e-12)
    assert found is accepted and words in reason.replace("0.020000000001", "0.02")


def test_the_worst_class_has_the_lowest_ap() -> None:
    assert worst_of({"a": 0.7, "b": 0.3, "c": 0.31}) == ("b", 0.3)


def test_pareto_has_a_row_a_candidate(tmp_path: Path) -> None:
    dense = Candidate(0, 0, 1.0, 100, 10, 0.5, 0.8, "b", 0.3, 12.5, True, "the dense network", "baseline")
    write_pareto([dense], tmp_path / "pareto.csv")
    assert (tmp_path / "pareto.csv").read_text().splitlines() == [
        "round,attempt,keep_macs,macs,params,ap,ap50,worst_class,worst_class_ap,ms,accepted,reason,folder",
        "0,0,1.0,100,10,0.5,0.8,b,0.3,12.5,True,the dense network,baseline",
    ]
