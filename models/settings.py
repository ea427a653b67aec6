"""Settings of losses and of non-maximum suppression, free of torch: a command line is read before torch is imported.

An annotated field is a command-line flag of the same name; the annotation is its help, and what values are expected,
which ``detection.command`` checks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated


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
    label_smoothing: Annotated[float, "of the class targets", "0 to 1"] = 0.0

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

    weight: Annotated[float, "with --teacher: weight of its outputs beside the labels", "at least 0"] = 1.0
    box: Annotated[float, "with --teacher: weight of its boxes, on top of --box", "at least 0"] = 1.0
    obj: Annotated[float, "with --teacher: weight of its objectness, on top of --obj", "at least 0"] = 1.0
    cls: Annotated[float, "with --teacher: weight of its classes, on top of --cls", "at least 0"] = 1.0
    min_objectness: Annotated[
        float, "with --teacher: where it sees less, it teaches objectness alone", "at least 0"
    ] = 0.01


@dataclass(frozen=True)
class NmsSettings:
    """Detections."""

    conf: Annotated[float, "lowest score of a detection", "0 to 1"] = 0.25
    iou: Annotated[float, "IoU above which a box removes a less confident one", "0 to 1"] = 0.45
    max_det: Annotated[int, "most detections of an image", "at least 1"] = 300
