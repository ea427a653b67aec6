"""Write a checkpoint, dense or pruned or published, as a file for other runtimes, proven equal to torch on real images."""

from __future__ import annotations

import sys

from detection.command import run_script
from detection.export import ExportFlags, main


def cli(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    return run_script(ExportFlags, main, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
