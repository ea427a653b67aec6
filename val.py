"""Evaluate a checkpoint, dense or pruned or published, or an exported file under any engine, by pycocotools."""

from __future__ import annotations

import sys

from detection.command import run_script
from detection.evaluation import ValFlags, main


def cli(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    return run_script(ValFlags, main, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
