"""Evaluate a checkpoint, dense or pruned or published, or an exported file under any engine, by pycocotools."""

from __future__ import annotations

import sys

from detection.command import run_script
from detection.flags import ValFlags


def act(flags: ValFlags) -> None:
    """Do what the command line says."""
    from detection.evaluation import evaluate_weights  # and with it torch: the command line was read before

    evaluate_weights(flags)


def cli(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    return run_script(ValFlags, act, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
