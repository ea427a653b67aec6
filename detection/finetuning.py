"""Train a dense or pruned YOLOv5 without the pull: fine-tuning after a cut, or the dense baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from deploy.qat import with_quantisers
from engine import World
from slim import SlimError

from .command import flag
from .network import head_path
from .training import Rounding, TrainFlags, train


@dataclass(frozen=True)
class FinetuneFlags(TrainFlags):
    """Plain training."""

    project: str = flag("runs/finetune", "folder that holds the run folders")
    keep_gates: bool = flag(False, "train on with the gates of the checkpoint instead of folding them first")
    qat: bool = flag(False, "round weights and maps to 8 bits while training, for an INT8 export that loses less")
    keep_float: list[str] = flag([], "with --qat: patterns of modules beside the head that are not rounded")  # noqa: RUF009
    calibration_images: int = flag(64, "with --qat: training images on which the ranges are found")

    def rounding(self) -> Rounding | None:
        """Of --qat: the network with quantisers everywhere but in the head."""
        if not self.qat:
            if self.keep_float:
                raise SlimError("--keep-float: says what --qat leaves alone; add --qat, or leave it out")
            return None
        if self.keep_gates:
            raise SlimError("--qat and --keep-gates: gates are folded before a network is quantised; leave one out")
        if self.calibration_images < 1:
            raise SlimError(f"--calibration-images {self.calibration_images}: expected at least 1")

        def make(model: nn.Module, images: Sequence[Tensor]) -> nn.Module:
            return with_quantisers(model, images, head=head_path(model), keep_float=self.keep_float)

        return Rounding(make, self.calibration_images)


def main(flags: FinetuneFlags, world: World) -> None:
    flags.rounding()  # whose refusals come before anything is read or written
    train(flags, keep_gates=flags.keep_gates, world=world)
