"""Settings of losses and of non-maximum suppression, free of torch: a command line is read before torch is imported.

An annotated field is a command-line flag of the same name, and the annotation its help (see ``detection.command``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, NoReturn


def _refuse(message: str) -> NoReturn:
    from .errors import ModelError  # which imports torch

    raise ModelError(message)


@dataclass(frozen=True)
class LossGains:
    """Loss.

    Weights of the parts, as in YOLOv5's hyper-parameter files. With ``label_smoothing`` e an object's own class has the
    target 1 - e / 2, each other class e / 2.
    """

    box: Annotated[float, "weight of the box loss"] = 0.05
    obj: Annotated[float, "weight of the objectness loss at 640 pixels; scaled by (img / 640) squared"] = 1.0
    cls: Annotated[float, "weight of the class loss for 80 classes; scaled by their number / 80"] = 0.5
    anchor_t: Annotated[float, "largest ratio of an object's side to the side of an anchor that it is assigned to"] = (
        4.0
    )
    cls_pw: Annotated[float, "weight of the positives in the class loss"] = 1.0
    obj_pw: Annotated[float, "weight of the positives in the objectness loss"] = 1.0
    label_smoothing: Annotated[float, "of the class targets, 0 to 1"] = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing <= 1:
            _refuse(f"loss: label_smoothing is {self.label_smoothing}, expected 0 to 1")

    def scaled(self, num_classes: int, image_size_px: int, num_levels: int) -> LossGains:
        """The gains for a task; those of a hyper-parameter file are meant for 80 classes, 640 pixels and 3 levels."""
        levels = 3 / num_levels
        return replace(
            self,
            box=self.box * levels,
            obj=self.obj * (image_size_px / 640) ** 2 * levels,
            cls=self.cls * num_classes / 80 * levels,
        )


@dataclass(frozen=True)
class DistillGains:
    """Distillation.

    How much a teacher counts: as a whole beside the labels, and its parts on top of the gains that the labels' loss has
    for them. On the command line the names begin with ``distill-``.
    """

    weight: Annotated[float, "with --teacher: weight of its outputs beside the labels"] = 1.0
    box: Annotated[float, "with --teacher: weight of its boxes, on top of --box"] = 1.0
    obj: Annotated[float, "with --teacher: weight of its objectness, on top of --obj"] = 1.0
    cls: Annotated[float, "with --teacher: weight of its classes, on top of --cls"] = 1.0
    min_objectness: Annotated[float, "with --teacher: where it sees less, it teaches objectness alone"] = 0.01

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                _refuse(f"distillation: {name} is {value}, expected a finite number of at least 0")


@dataclass(frozen=True)
class NmsSettings:
    """Detections."""

    conf: Annotated[float, "lowest score of a detection, 0 to 1"] = 0.25
    iou: Annotated[float, "IoU above which a box removes a less confident one, 0 to 1"] = 0.45
    max_det: Annotated[int, "most detections of an image"] = 300

    def __post_init__(self) -> None:
        if not (0 <= self.conf <= 1 and 0 <= self.iou <= 1 and self.max_det > 0):
            _refuse(
                f"--conf {self.conf:g}, --iou {self.iou:g}, --max-det {self.max_det}: expected 0 to 1, 0 to 1 and above 0"
            )
