"""Cut a checkpoint to a share of its MACs, parameters, channels or milliseconds, prove the cut, and save the narrow network.

With --data the cut is proven on real images, and masked and pruned network are evaluated. With --unstructured single
weights are set to zero instead, for comparison.
"""

from __future__ import annotations

import sys

from detection.command import run_script
from detection.flags import PruneFlags


def act(flags: PruneFlags) -> None:
    """Do what the command line says."""
    from detection.pruning import prune, zero_weights  # and with it torch: the command line was read before

    prune(flags) if flags.unstructured is None else zero_weights(flags)


def cli(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    return run_script(PruneFlags, act, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
