"""Detect in images, videos, webcams and streams, with a checkpoint or an exported file, and draw what is found."""

from __future__ import annotations

import sys

from detection.command import run_script
from detection.flags import DetectFlags


def act(flags: DetectFlags) -> None:
    """Do what the command line says."""
    from detection.video.job import detect  # and with it torch: the command line was read before

    detect(flags)


def cli(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    return run_script(DetectFlags, act, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
