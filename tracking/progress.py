"""Progress of long work: a bar in a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS_PER_LINE = 60.0


class _Lines(tqdm):  # type: ignore[type-arg]
    """Writes lines below one another, none that takes another's place."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if msg is None:  # "" is to clear what stands there
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return False


def progress(iterable: Iterable[Any] | None = None, *, every_s: float = SECONDS_PER_LINE, **options: Any) -> tqdm[Any]:
    """tqdm's bar; where standard error is no terminal a line of it every ``every_s`` seconds, the first after as many."""
    if sys.stderr.isatty():
        return tqdm(iterable, **options)
    return _Lines(iterable, **options | {"leave": False}, mininterval=every_s, maxinterval=every_s, delay=every_s)
