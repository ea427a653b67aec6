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


@pytest.mark.parametrize("file", ["phase.json", "weights/last.pt"])
@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_a_file_of_a_phase_that_is_no_longer_what_it_was_is_not_given(tmp_path: Path, file: str, damage: str) -> None:
    def act(work: Path) -> dict[str, Any]:
        (work / "weights").mkdir()
        (work / "weights" / "last.pt").write_bytes(b"weights")
        return {"ap": 0.5, "macs": 7}

    journal = Journal(tmp_path, {})
    journal.phase("first", act)
    path = tmp_path / "first" / file
    assert journal.made("first", file) == path
    if damage == "gone":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[3] ^= 1
        path.write_bytes(content)
    said = "is missing from a finished phase" if damage == "gone" else "is not what the phase wrote, by its SHA-256"
    with pytest.raises(SlimError, match=rf"first/{file}: {said}.*; remove the folder .*first to run it again$"):
        journal.made("first", file)
    if file == "phase.json":
        with pytest.raises(SlimError, match=said):
            journal.phase("first", act)


def test_a_phase_from_before_digests_were_kept_is_taken_as_it_is(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {})
    journal.phase("first", lambda work: {"ap": 0.5})
    (tmp_path / "first" / "digests.json").unlink()
    assert journal.result("first") == {"ap": 0.5}
