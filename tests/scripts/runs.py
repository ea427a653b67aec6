"""What the script tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("circle", "square", "triangle", "cross")
SMALL = ("--img", 64, "--batch-size", 8, "--workers", 0)
HALF = ("--fraction", 0.5, "--strength", 2 / 0.0035)
"""The smallest half of each gate vector, closed by the only two sparse steps of a tiny run, whose rates sum to 0.0035: a
travel of 2, where ``auto`` moves no gate by more than 0.1 a step."""
FINE = ("--min-channels", 1, "--round-to", 1)
"""Floors that let a tiny network reach a budget."""
SMALL_ANCHORS = [[6, 6, 9, 9], [14, 14, 20, 20]]
"""Pixels, level by level; they suit the tiny set's boxes."""


def one_round(recovery_epochs: int = 0, finetune_epochs: int = 0) -> tuple[str | int | float, ...]:
    """iterate.py's flags for its shortest loop, without export."""
    epochs = ("--sparse-epochs", 2, "--recovery-epochs", recovery_epochs, "--finetune-epochs", finetune_epochs)
    return ("--rounds", 1, "--macs", 0.6, *epochs, "--export", "none")


class Done(NamedTuple):
    """How a script ended."""

    code: int
    out: str
    err: str


Runner = Callable[..., Done]
