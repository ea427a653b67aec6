"""Milliseconds an image of checkpoints and exported files under any engine, measured in turns so that drift cancels."""

from __future__ import annotations

import sys

from detection.benchmark import BenchmarkFlags, main
from detection.command import run_script


def cli(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    return run_script(BenchmarkFlags, main, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
