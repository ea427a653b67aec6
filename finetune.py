"""Train a dense or pruned YOLOv5 without the pull: fine-tuning after a cut, or the dense baseline."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from engine import World
from engine.command import flag, run_on_all_ranks
from train_sparse import TrainFlags, train


@dataclass(frozen=True)
class FinetuneFlags(TrainFlags):
    """Plain training."""

    project: str = flag("runs/finetune", "folder that holds the run folders")
    keep_gates: bool = flag(False, "train on with the gates of the checkpoint instead of folding them first")


def main(flags: FinetuneFlags, world: World) -> None:
    train(flags, keep_gates=flags.keep_gates, world=world)


def cli(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    return run_on_all_ranks(FinetuneFlags, main, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
