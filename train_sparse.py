"""Train a YOLOv5 with gates under the smallest-half pull, so that half of its channels close."""

from __future__ import annotations

import sys

from detection.command import run_on_all_ranks
from detection.training import SparseFlags, main


def cli(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    return run_on_all_ranks(SparseFlags, main, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
