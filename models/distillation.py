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
        """Return the labels' total and parts, the part ``distill`` added; ``images`` are those that gave ``raw``.

        The teacher runs under the caller's autocast; the distance is computed in FP32.
        """
        total, parts = self.labels_loss(raw, targets)
        with torch.no_grad():
            _, wanted = self.teacher(images)
        distill = self.gains.weight * self.distance(raw, wanted)
        return total + distill * raw[0].shape[0], {**parts, "distill": distill.detach()}

    def distance(self, raw: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        """Student's and teacher's maps, [B, A, h, w, 5 + classes] per level -> scalar, without ``weight``.

        All levels' cells are one list here, so that a GPU is waited for once: until it is known which of them teach.
        """
        obj = raw[0].new_zeros((), dtype=torch.float32)
        for level, teacher, weight in zip(raw, wanted, level_balance(len(raw)), strict=True):
            obj = obj + _kl(level[..., 4].float(), teacher[..., 4].float()).mean() * weight
        student, teacher = (torch.cat([level.float().flatten(0, -2) for level in maps]) for maps in (raw, wanted))
        of_cells = [
            (
                own[None, :, None, None].expand(*level.shape[:-1], 2).reshape(-1, 2),
                level.new_full(level.shape[:-1], i).flatten(),
            )
            for i, (level, own) in enumerate(zip(raw, self.labels_loss.detect.anchors.float(), strict=True))
        ]
        anchors, level_of = (torch.cat(parts) for parts in zip(*of_cells, strict=True))

        seen = teacher[:, 4].sigmoid()
        (cells,) = (seen > self.gains.min_objectness).nonzero(as_tuple=True)
        student, teacher, anchors, share = student[cells], teacher[cells], anchors[cells], seen[cells]
        level_of = level_of[cells].long()
        masses = share.new_zeros(len(raw)).index_add(0, level_of, share)
        share = share / self._divisors(masses, len(raw[0]))[level_of]
        iou = complete_iou(cell_boxes_xyxy(student[:, :4], anchors), cell_boxes_xyxy(teacher[:, :4], anchors))
        box = ((1 - iou) * share).sum()
        ours, theirs = self.gains, self.labels_loss.gains
        distance = box * (ours.box * theirs.box) + obj * (ours.obj * theirs.obj)
        # A class alone is implied by objectness, and the labels' loss does not train its output either.
        if student.shape[1] > 6:
            cls = (_kl(student[:, 5:], teacher[:, 5:]).mean(1) * share).sum()
            distance = distance + cls * (ours.cls * theirs.cls)
        return distance

    def _divisors(self, masses: Tensor, images: int) -> Tensor:
        """What each level's sums weighted by objectness are divided by, [levels]; ``masses``: the sums of objectness."""
        if self.labels_loss.reduce is None:
            return masses.clamp(min=1)
        counts = torch.tensor([images, *masses.tolist()], dtype=torch.float64)
        all_images, *totals = self.labels_loss.reduce(counts).tolist()
        return masses.new_tensor([max(total, 1.0) * images / all_images for total in totals])


def check_same_head(student: Detect, teacher: nn.Module) -> None:
    """ModelError where the maps of two heads do not mean the same, cell by cell."""
    head = getattr(teacher, "detect", teacher)
    if not isinstance(head, Detect):
        raise ModelError(f"teacher: {type(teacher).__name__} has no detection head; give a YOLOv5")
    for what, theirs, ours, remedy in (
        ("classes", head.num_classes, student.num_classes, "that was trained on this data set"),
        ("strides", head.stride_px, student.stride_px, "with as many levels (P5 and P6 networks do not go together)"),
    ):
        if theirs != ours:
            raise ModelError(f"teacher: {what} {theirs}, the student's are {ours}; give a teacher {remedy}")
    anchors, own = head.anchors_px.cpu(), student.anchors_px.cpu()
    if anchors.shape != own.shape or not torch.allclose(anchors, own, rtol=1e-3):
        raise ModelError(
            f"teacher: anchors {_shown(anchors)} px, the student's are {_shown(own)}; start the student from weights or "
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
