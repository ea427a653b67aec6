"""Detect in images, videos, webcams and streams, with a checkpoint or an exported file, and draw what is found."""

from __future__ import annotations

import sys

from detection.command import run_script
from detection.video.job import DetectFlags, main


def cli(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    return run_script(DetectFlags, main, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
