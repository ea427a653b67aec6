"""What the script tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("circle", "square", "triangle", "cross")
SMALL = ("--img", 64, "--batch-size", 8, "--workers", 0)


class Done(NamedTuple):
    """How a script ended."""

    code: int
    out: str
    err: str


Runner = Callable[..., Done]
