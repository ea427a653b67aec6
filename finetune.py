"""Train a dense or pruned YOLOv5 without the L1 step: fine-tuning after a cut, or the dense baseline."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from detection.command import run_on_all_ranks
from detection.flags import FinetuneFlags

if TYPE_CHECKING:
    from detection.command import World


def act(flags: FinetuneFlags, world: World) -> None:
    """Do what the command line says."""
    from detection.training import train  # and with it torch: the command line was read before

    train(flags, world)


def cli(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    return run_on_all_ranks(FinetuneFlags, act, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
