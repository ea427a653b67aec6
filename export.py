"""Write a checkpoint, dense or pruned or published, as a file for other runtimes, proven equal to torch on images of --data."""

from __future__ import annotations

import sys

from detection.command import run_script
from detection.flags import ExportFlags


def act(flags: ExportFlags) -> None:
    """Do what the command line says."""
    from detection.export import export  # and with it torch: the command line was read before

    export(flags)


def cli(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    return run_script(ExportFlags, act, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
