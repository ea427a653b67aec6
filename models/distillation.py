"""Knowledge distillation: a trained detector's outputs as soft targets beside the labels.

Objectness scaled distillation (Mehta and Ozturk 2018, arXiv:1809.05792), for YOLOv5's head: objectness is learned from
the teacher everywhere, boxes and classes only in proportion to the teacher's objectness, so that its background teaches
nothing. Distances are those of the labels' loss. Their suppression of all but the teacher's best cells is left out:
a YOLOv5 is trained to find an object in several cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .detect import Detect
from .errors import ModelError
from .loss import DetectionLoss, cell_boxes_xyxy, complete_iou, level_balance
from .settings import DistillGains


class DistillationLoss:
    """The labels' loss plus ``weight`` times the distance to a teacher's raw maps; called like the labels' loss.

    The distance is 0 where the student's maps are the teacher's. It has the labels' loss's form and gains:

    - objectness: mean over all cells of a level, balanced as there, of KL(teacher, student);
    - classes: mean of KL(teacher, student) over cells and classes, cells weighted by the teacher's objectness;
    - boxes: mean of 1 - complete IoU with the teacher's box, cells weighted alike.

    KL of two Bernoulli distributions is binary cross-entropy less the teacher's entropy: its gradient is the
    cross-entropy's. Means by objectness divide by its sum or by 1, whichever is more, so that a level without objects
    teaches little. Each student's width is its own affair: only maps are compared. Where the labels' loss reduces over
    processes, those sums are over all of them.

    ``teacher`` is changed: no gradients, evaluation mode. Keep it off the student, or it would be saved with it.
    """

    def __init__(self, loss: DetectionLoss, teacher: nn.Module, gains: DistillGains) -> None:
        """Raises ModelError when the heads' classes, strides or anchors differ."""
        self.labels_loss, self.gains = loss, gains
        self.teacher = teacher.requires_grad_(False).eval()
        check_same_head(loss.detect, teacher)

    def __call__(self, raw: Sequence[Tensor], targets: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The labels' total and parts, the part ``distill`` added; ``images`` are those that gave ``raw``.

        The teacher runs under the caller's autocast; the distance is computed in FP32.
        """
        total, parts = self.labels_loss(raw, targets)
        with torch.no_grad():
            _, wanted = self.teacher(images)
        distill = self.gains.weight * self.distance(raw, wanted)
        return total + distill * raw[0].shape[0], {**parts, "distill": distill.detach()}

    def distance(self, raw: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        """Student's and teacher's maps, [B, A, h, w, 5 + classes] per level -> scalar, without ``weight``."""
        sums = raw[0].new_zeros(3, dtype=torch.float32)
        anchors = self.labels_loss.detect.anchors.float()
        balance, divisors = level_balance(len(raw)), self._divisors(wanted)
        for level, teacher, of_level, weight, divisor in zip(raw, wanted, anchors, balance, divisors, strict=True):
            box, obj, cls = self._level(level.float(), teacher.float(), of_level, divisor)
            sums = sums + torch.stack((box, obj * weight, cls))
        ours, theirs = self.gains, self.labels_loss.gains
        distance: Tensor = (
            sums * sums.new_tensor((ours.box * theirs.box, ours.obj * theirs.obj, ours.cls * theirs.cls))
        ).sum()
        return distance

    def _divisors(self, wanted: Sequence[Tensor]) -> list[float | None]:
        """What each level's sums weighted by objectness are divided by in a process of several; None where it is alone."""
        if self.labels_loss.reduce is None:
            return [None] * len(wanted)
        objectness = [level[..., 4].float().sigmoid() for level in wanted]
        masses = [float(seen[seen > self.gains.min_objectness].sum()) for seen in objectness]
        images = len(wanted[0])
        all_images, *totals = self.labels_loss.reduce(torch.tensor([images, *masses], dtype=torch.float64)).tolist()
        return [max(total, 1.0) * images / all_images for total in totals]

    def _level(
        self, raw: Tensor, wanted: Tensor, anchors: Tensor, divisor: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        objectness = wanted[..., 4].sigmoid()
        obj = _kl(raw[..., 4], wanted[..., 4]).mean()
        cells = (objectness > self.gains.min_objectness).nonzero(as_tuple=True)
        share = objectness[cells]
        share = share / (share.sum().clamp(min=1) if divisor is None else divisor)
        student, teacher, anchors = raw[cells], wanted[cells], anchors[cells[1]]
        iou = complete_iou(cell_boxes_xyxy(student[:, :4], anchors), cell_boxes_xyxy(teacher[:, :4], anchors))
        box = ((1 - iou) * share).sum()
        # A class alone is implied by objectness, and the labels' loss does not train its output either.
        cls = (_kl(student[:, 5:], teacher[:, 5:]).mean(1) * share).sum() if student.shape[1] > 6 else raw.new_zeros(())
        return box, obj, cls


def check_same_head(student: Detect, teacher: nn.Module) -> None:
    """ModelError where the maps of two heads do not mean the same, cell by cell."""
    head = getattr(teacher, "detect", teacher)
    if not isinstance(head, Detect):
        raise ModelError(f"teacher: {type(teacher).__name__} has no detection head; give a YOLOv5")
    if head.num_classes != student.num_classes:
        raise ModelError(
            f"teacher: {head.num_classes} classes, the student has {student.num_classes}; "
            "give a teacher that was trained on this data set"
        )
    if head.stride_px != student.stride_px:
        raise ModelError(
            f"teacher: strides {head.stride_px}, the student's are {student.stride_px}; "
            "give a teacher with as many levels (P5 and P6 networks do not go together)"
        )
    theirs, ours = head.anchors_px.cpu(), student.anchors_px.cpu()
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=1e-3):
        raise ModelError(
            f"teacher: anchors {_shown(theirs)} px, the student's are {_shown(ours)}; start the student from weights or "
            "a model description with the teacher's anchors"
        )


def _shown(anchors_px: Tensor) -> str:
    return " ".join(f"{width:g}x{height:g}" for width, height in anchors_px.flatten(0, 1).tolist())


def _kl(logits: Tensor, wanted: Tensor) -> Tensor:
    """KL divergence of Bernoulli distributions given as logits, element by element."""
    soft = wanted.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, soft, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(wanted, soft, reduction="none")
    return cross_entropy - entropy
