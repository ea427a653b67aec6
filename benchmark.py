"""Measure the milliseconds an image of checkpoints and exported files under any engine, interleaved so that drift cancels.

With --data their AP is measured, too. Of engines, sizes, cores, batch sizes and precisions all combinations are measured.
"""

from __future__ import annotations

import sys

from detection.command import run_script
from detection.flags import BenchmarkFlags


def act(flags: BenchmarkFlags) -> None:
    """Do what the command line says."""
    from detection.benchmark import benchmark  # and with it torch: the command line was read before

    benchmark(flags)


def cli(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    return run_script(BenchmarkFlags, act, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
