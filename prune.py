"""Cut a checkpoint to a share of its MACs, parameters, channels or milliseconds, prove the cut, and save the narrow network.

With --unstructured single weights are set to zero instead, for comparison."""

from __future__ import annotations

import sys

from detection.command import run_script
from detection.pruning import PruneFlags, main


def cli(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    return run_script(PruneFlags, main, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
