from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slim import SlimError
from tracking.journal import Journal, make_empty


def test_a_phase_runs_once_and_its_result_is_kept(tmp_path: Path) -> None:
    runs = []

    def act(work: Path) -> dict[str, Any]:
        runs.append(work)
        (work / "made").write_text("x")
        assert not (tmp_path / "first").exists(), "a phase that is not finished is not to be seen"
        return {"ap": 0.5, "where": Path("a") / "b"}

    for _ in range(2):
        assert Journal(tmp_path, {"macs": 0.5}).phase("first", act) == {"ap": 0.5, "where": "a/b"}
    assert len(runs) == 1 and (tmp_path / "first" / "made").read_text() == "x"


def test_a_phase_that_fails_leaves_no_folder_and_continues_from_its_own_work(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {})

    def failing(work: Path) -> dict[str, Any]:
        (work / "half").write_text("x")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        journal.phase("first", failing)
    assert journal.result("first") is None and not (tmp_path / "first").exists()
    assert journal.phase("first", lambda work: {"half": (work / "half").read_text()}) == {"half": "x"}
    assert not journal.unfinished("first").exists()


def test_another_run_is_told_apart_by_what_changed(tmp_path: Path) -> None:
    Journal(tmp_path, {"settings": {"macs": 0.5}, "weights": "abc"})
    with pytest.raises(SlimError, match=r"begun with other settings or data \(weights: 'abc' then, 'abd' now\)"):
        Journal(tmp_path, {"settings": {"macs": 0.5}, "weights": "abd"})
    assert Journal.opening_of(tmp_path) == {"settings": {"macs": 0.5}, "weights": "abc"}
    assert Journal.opening_of(tmp_path / "none") is None


@pytest.mark.parametrize("content", ["{half", "[1]", ""])
def test_a_damaged_result_is_an_error_with_a_remedy(tmp_path: Path, content: str) -> None:
    journal = Journal(tmp_path, {})
    journal.phase("first", lambda work: {"ap": 1})
    (tmp_path / "first" / "phase.json").write_text(content)
    with pytest.raises(SlimError, match=r"first/phase\.json: .*remove .*first.* to run it again"):
        journal.result("first")


def test_results_are_plain_json(tmp_path: Path) -> None:
    Journal(tmp_path, {}).phase("first", lambda work: {"per_class": {"a": 1.0}})
    assert json.loads((tmp_path / "first" / "phase.json").read_text()) == {"per_class": {"a": 1.0}}


def test_what_an_attempt_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "w" / "deep").mkdir(parents=True)
    make_empty(tmp_path / "w")
    assert list((tmp_path / "w").iterdir()) == []
