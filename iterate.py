"""The slimming loop as a journal: rounds of sparse training, cut and recovery, then fine-tuning, folding and export.

The same command continues a loop that was interrupted or killed, whatever it was doing."""

from __future__ import annotations

import sys

from detection.command import run_on_all_ranks
from detection.loop import IterateFlags, main


def cli(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    return run_on_all_ranks(IterateFlags, main, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
