"""The slimming loop as a journal: rounds of sparse training, cut and recovery, then fine-tuning, folding and export.

The same command continues a loop that was interrupted or killed, whatever it was doing.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from detection.command import run_on_all_ranks
from detection.flags import IterateFlags

if TYPE_CHECKING:
    from detection.command import World


def act(flags: IterateFlags, world: World) -> None:
    """Do what the command line says."""
    from detection.loop import main  # and with it torch: the command line was read before

    main(flags, world)


def cli(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    return run_on_all_ranks(IterateFlags, act, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
