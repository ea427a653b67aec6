"""Train a dense or pruned YOLOv5 without the pull: fine-tuning after a cut, or the dense baseline."""

from __future__ import annotations

import sys

from detection.command import run_on_all_ranks
from detection.finetuning import FinetuneFlags, main


def cli(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    return run_on_all_ranks(FinetuneFlags, main, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
