"""Progress where there is no terminal."""

from __future__ import annotations

import sys

import pytest

from tracking.progress import progress


def test_a_log_gets_lines_and_no_carriage_returns(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(range(3), desc="epoch 0", every_s=0) as bar:
        for _ in bar:
            bar.set_postfix(box=0.5, refresh=False)
    text = capsys.readouterr().err
    assert "\r" not in text and text.endswith("\n") and "\n\n" not in text
    assert [line.split("|")[-1].split()[0] for line in text.splitlines()] == ["0/3", "1/3", "2/3", "3/3"]
    assert all(line.startswith("epoch 0: ") for line in text.splitlines()) and "box=0.5" in text


def test_what_is_short_says_nothing_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(1000), desc="x")) == list(range(1000))
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress(range(2), desc="x")) == [0, 1]
    assert capsys.readouterr().err.startswith("\rx:")
