from __future__ import annotations

from pathlib import Path

import pytest

from detection import candidates
from detection.candidates import (
    Candidate,
    check_drop,
    check_max_drop,
    round_target,
    smaller_cut,
    worst_of,
    write_pareto,
)
from detection.timing import Timing
from slim import SlimError

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


@pytest.mark.parametrize(
    ("ap", "per_class", "accepted", "words"),
    [
        (0.46, {"a": 0.6, "b": 0.275}, True, "within 10% of the dense network"),
        (0.44, {"a": 0.6, "b": 0.275}, False, "AP 0.4400 is 0.0600 below the dense network's 0.5000, more than 10%"),
        (0.46, {"a": 0.6, "b": 0.265}, False, "the worst class's AP 0.2650 is 0.0350 below"),
    ],
)
def test_a_drop_may_be_a_share_of_each_ap(ap: float, per_class: dict[str, float], accepted: bool, words: str) -> None:
    found, reason = check_drop(ap, per_class, BASELINE, "10%")
    assert found is accepted and words in reason


def test_what_finds_next_to_nothing_is_never_accepted() -> None:
    assert check_drop(0.009, {"a": 0.7, "b": 0.3}, BASELINE, 1.0) == (
        False,
        "AP 0.0090 is next to nothing (less than 0.01)",
    )
    assert check_drop(0.01, {"a": 0.7, "b": 0.3}, BASELINE, 1.0)[0]


@pytest.mark.parametrize(
    ("ap", "max_drop", "words"),
    [
        (
            0.5,
            0.5,
            "--max-drop 0.5: the dense network's AP is 0.5000, .* expected at most 0.4900, or a share of that AP",
        ),
        (0.5, 1.0, "--max-drop 1.0: the dense network's AP is 0.5000"),
        (0.5, "99%", "--max-drop 99%: the dense network's AP is 0.5000"),
        (0.02, 0.02, "--max-drop 0.02: the dense network's AP is 0.0200"),
        (0.005, 0.0, "w.pt: AP 0.0050 on the val split, expected at least 0.01: nothing to slim; train it"),
        (float("nan"), 0.0, "w.pt: AP nan"),
    ],
)
def test_a_drop_that_accepts_next_to_nothing_is_refused(ap: float, max_drop: float | str, words: str) -> None:
    with pytest.raises(SlimError, match=words):
        check_max_drop(max_drop, ap, "w.pt")


def test_drops_that_can_be_meant() -> None:
    for ap, max_drop in ((0.5, 0.02), (0.5, 0.49), (0.5, "90%"), (0.02, "5%"), (0.02, 0.0)):
        check_max_drop(max_drop, ap, "w.pt")


def test_a_measurement_that_says_little_is_told_and_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    assert candidates._warned([Timing((1.0,)), Timing((1.0,))]) == {} and not capsys.readouterr().out
    found = candidates._warned([Timing((1.0,), "busy"), Timing((1.0,))])
    assert found["timing_warning"].startswith("warning: times that say little (1 of 2 measurements): busy;")
    assert capsys.readouterr().out == found["timing_warning"] + "\n"


def test_the_worst_class_has_the_lowest_ap() -> None:
    assert worst_of({"a": 0.7, "b": 0.3, "c": 0.31}) == ("b", 0.3)


def test_pareto_has_a_row_a_candidate(tmp_path: Path) -> None:
    dense = Candidate(0, 0, 1.0, 100, 10, 0.5, 0.8, "b", 0.3, 12.5, True, "the dense network", "baseline")
    write_pareto([dense], tmp_path / "pareto.csv")
    assert (tmp_path / "pareto.csv").read_text().splitlines() == [
        "round,attempt,keep_macs,macs,params,ap,ap50,worst_class,worst_class_ap,ms,accepted,reason,folder",
        "0,0,1.0,100,10,0.5,0.8,b,0.3,12.5,True,the dense network,baseline",
    ]
