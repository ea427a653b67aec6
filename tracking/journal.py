"""A journal of phases: each is a folder that appears complete or not at all, so that nothing finished is ever lost."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from slim import SlimError, write_text_atomically

from .run_folder import plain

RESULT = "phase.json"
OPENING = "journal.json"
DIGESTS = "digests.json"
"""{file: SHA-256} of all that a finished phase wrote."""
SECONDS = "seconds.txt"
"""How long the last attempt at a phase took."""


class Journal:
    """The phases of one long run under `folder`.

    A phase works in `.NAME.unfinished`, which is renamed to `NAME` as its last act. A run that was killed at any moment
    therefore finds what it had finished, and of the phase in progress whatever that phase can continue from.
    """

    def __init__(self, folder: Path, opening: Mapping[str, Any]) -> None:
        """Open the journal of `folder`, or begin it; `opening` says what the run is and must not change.

        Raises SlimError when the folder holds the journal of another run.
        """
        self.folder = folder
        self.opening = plain(opening)
        file = folder / OPENING
        known = self.opening_of(folder)
        if known is None:
            write_text_atomically(file, json.dumps(self.opening, indent=2) + "\n")
        elif known != self.opening:
            before, now = known, self.opening
            keys = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
            changed = ", ".join(f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in keys)
            raise SlimError(
                f"{folder}: begun with other settings or data ({changed}); "
                "restore them to continue, or choose another --name"
            )

    @staticmethod
    def opening_of(folder: Path) -> dict[str, Any] | None:
        """What the journal of `folder` says that its run is; None where there is none."""
        return read_json(folder / OPENING) if (folder / OPENING).exists() else None

    def result(self, name: str) -> dict[str, Any] | None:
        """What a finished phase found; None for a phase that is not finished."""
        if not (self.folder / name).is_dir():
            return None
        return read_json(self.made(name, RESULT))

    def made(self, name: str, file: str) -> Path:
        """A file that a finished phase wrote; SlimError where it is no longer what it was.

        Phases of journals from before digests were kept are taken as they are.
        """
        path, known = self.folder / name / file, self.folder / name / DIGESTS
        remedy = f"remove the folder {self.folder / name} to run it again"
        if not path.is_file():
            raise SlimError(f"{path}: is missing from a finished phase; {remedy}")
        if known.exists() and _digest(path) != read_json(known).get(file):
            raise SlimError(f"{path}: is not what the phase wrote, by its SHA-256 in {known.name}; {remedy}")
        return path

    def phase(self, name: str, act: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
        """What phase `name` found: at once where it is finished, else after `act(unfinished folder)` has done its work."""
        finished = self.result(name)
        if finished is not None:
            return finished
        work = self.unfinished(name)
        work.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        found = plain(act(work))
        write_text_atomically(work / SECONDS, f"{time.perf_counter() - started:.3f}\n")
        write_text_atomically(work / RESULT, json.dumps(found, indent=2) + "\n")
        files = sorted(path for path in work.rglob("*") if path.is_file())
        digests = {path.relative_to(work).as_posix(): _digest(path) for path in files if path.name != DIGESTS}
        write_text_atomically(work / DIGESTS, json.dumps(digests, indent=2) + "\n")
        os.rename(work, self.folder / name)
        flush_folder(self.folder)
        return dict(found)

    def unfinished(self, name: str) -> Path:
        """Where a phase works until it is finished."""
        return self.folder / f".{name}.unfinished"


def make_empty(folder: Path) -> None:
    """Remove what an earlier attempt left in a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)


def read_json(file: Path) -> dict[str, Any]:
    """A journal's file; SlimError with the remedy when it is missing or damaged."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise SlimError(
            f"{file}: cannot be read as a JSON object ({type(error).__name__}); remove the folder {file.parent} to run it again"
        ) from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_folder(folder: Path) -> None:
    """A rename is on the disk once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
