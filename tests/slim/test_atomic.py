"""A crash or a full disk leaves the old file."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from slim import SlimError, write_atomically, write_text_atomically


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_full_disk_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "metrics.json"
    write_text_atomically(path, "old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing != "write":
        monkeypatch.setattr(os, failing, full)
    with pytest.raises(SlimError, match=r"metrics\.json: cannot be written \(No space left on device\)"):
        write_atomically(path, full if failing == "write" else lambda temporary: temporary.touch())
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "last.pt"
    write_text_atomically(path, "old")

    def interrupted(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
