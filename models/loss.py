"""YOLOv5's training loss: boxes by complete IoU, objectness and classes by binary cross-entropy.

Box loss: Zheng et al. 2020, arXiv:1911.08287 (by torchvision). Assignment: every anchor whose shape is within a ratio
of the object's, in the object's cell and the two cells nearest to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert, complete_box_iou_loss

from .detect import Detect
from .errors import ModelError
from .settings import LossGains

# Weight of each level's objectness: fine maps have many more cells, most of them empty.
_BALANCE_OF_THREE = (4.0, 1.0, 0.4)
_BALANCE = (4.0, 1.0, 0.25, 0.06, 0.02)
# The object's own cell, then its left, upper, right and lower neighbour, as shifts (x, y) of the centre.
_SHIFTS = ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (-0.5, 0.0), (0.0, -0.5))
# In grid units. Smaller boxes are no object's, and their CIoU would divide 0 by 0.
_MIN_SIDE = 1e-3


@dataclass(frozen=True)
class _Matches:
    """K predictions of one level that an object was assigned to; boxes in grid units relative to their cell."""

    image: Tensor
    anchor: Tensor
    row: Tensor
    column: Tensor
    boxes_cxcywh: Tensor
    anchors: Tensor
    classes: Tensor


class DetectionLoss:
    """Call with the raw maps of a model in training mode and the targets of its batch. Computed in FP32, under AMP too.

    ``gains`` are used as they are: see ``LossGains.scaled``.

    Where several processes have a share of the batch each, ``reduce`` adds a tensor of counts up over all of them, on
    the CPU and possibly in place. Box and class losses are then means over the matches of all processes: the sum of
    their totals is the total of the whole batch, and the mean of a part (for equal shares) its part.
    """

    def __init__(
        self, model_or_detect: nn.Module, gains: LossGains, reduce: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        detect = getattr(model_or_detect, "detect", model_or_detect)
        if not isinstance(detect, Detect):
            raise ModelError(f"{type(model_or_detect).__name__} has no detection head; pass a YOLO or its detect")
        self.detect = detect
        self.gains = gains
        self.reduce = reduce

    def __call__(
        self, raw: Sequence[Tensor], targets: Tensor, images: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Raw maps [B, A, h, w, 5 + classes] per level; targets [M, 6]: image, class, cx, cy, w, h in 0..1.

        A loss of the training loop gets the images too; this one has no need of them.

        Returns the scalar to differentiate, which is B times the sum of the parts, and the weighted, detached parts
        ``box``, ``obj`` and ``cls``. Raises ModelError for targets of another form or with unknown classes.
        """
        self._check(raw, targets)
        targets = targets.to(raw[0].device, torch.float32)
        sums = raw[0].new_zeros(3, dtype=torch.float32)
        levels = [
            self._level(level.float(), anchors, targets, weight)
            for level, anchors, weight in zip(raw, self.detect.anchors.float(), level_balance(len(raw)), strict=True)
        ]
        shares = self._shares(raw[0].shape[0], [matches for _, matches in levels])
        for (parts, _), share in zip(levels, shares, strict=True):
            sums = sums + (parts if share == 1 else parts * parts.new_tensor((share, 1.0, share)))
        box, obj, cls = sums * sums.new_tensor((self.gains.box, self.gains.obj, self.gains.cls))
        total = (box + obj + cls) * raw[0].shape[0]
        return total, {"box": box.detach(), "obj": obj.detach(), "cls": cls.detach()}

    def _check(self, raw: Sequence[Tensor], targets: Tensor) -> None:
        levels = len(self.detect.anchors)
        if len(raw) != levels or levels > len(_BALANCE):
            raise ModelError(f"loss: {len(raw)} raw maps for {levels} levels; pass the output of training mode")
        if targets.ndim != 2 or targets.shape[1] != 6:
            raise ModelError(f"loss: targets have the shape {tuple(targets.shape)}, expected [M, 6]")
        num_classes = raw[0].shape[-1] - 5
        if len(targets) and not 0 <= targets[:, 1].min() <= targets[:, 1].max() < num_classes:
            worst = int(targets[:, 1].abs().max())
            raise ModelError(f"loss: a target is of class {worst}, the model has {num_classes} classes")

    def _shares(self, images: int, matches: Sequence[int]) -> list[float]:
        """For each level what a mean over this process's matches has to be multiplied by.

        A mean over all K matches, times all B images, is the sum over processes of their own b, times their own mean,
        times (k / K) / (b / B).
        """
        if self.reduce is None:
            return [1.0] * len(matches)
        all_images, *totals = self.reduce(torch.tensor([images, *matches], dtype=torch.float64)).tolist()
        return [own / max(total, 1.0) * all_images / images for own, total in zip(matches, totals, strict=True)]

    def _level(self, raw: Tensor, anchors: Tensor, targets: Tensor, weight: float) -> tuple[Tensor, int]:
        """Unweighted box, balanced objectness and class loss of one level: [3]; and the number of its matches."""
        gains = self.gains
        box = cls = raw.new_zeros(())
        objectness = raw[..., 4]
        wanted = torch.zeros_like(objectness)
        matches = _match(raw.shape[2:4], anchors, targets, gains.anchor_t)
        if len(matches.image):
            predicted = raw[matches.image, matches.anchor, matches.row, matches.column]
            boxes_xyxy = cell_boxes_xyxy(predicted[:, :4], matches.anchors)
            iou = complete_iou(boxes_xyxy, box_convert(matches.boxes_cxcywh, "cxcywh", "xyxy"))
            box = (1 - iou).mean()
            _write_last(wanted, matches, iou.detach().clamp(min=0))
            num_classes = predicted.shape[1] - 5
            if num_classes > 1:
                smooth = gains.label_smoothing / 2
                one_hot = torch.full_like(predicted[:, 5:], smooth)
                one_hot.scatter_(1, matches.classes[:, None], 1 - smooth)
                cls = _cross_entropy(predicted[:, 5:], one_hot, gains.cls_pw)
        losses = torch.stack((box, _cross_entropy(objectness, wanted, gains.obj_pw) * weight, cls))
        return losses, len(matches.image)


def _match(size_hw: Sequence[int], anchors: Tensor, targets: Tensor, anchor_t: float) -> _Matches:
    """``anchors`` [A, 2] in grid units."""
    height, width = size_hw
    side = targets.new_tensor((width, height))
    centres, sizes = targets[:, 2:4] * side, targets[:, 4:6] * side
    ratios = sizes[None] / anchors[:, None]
    anchor, target = (torch.maximum(ratios, 1 / ratios).amax(-1) < anchor_t).nonzero(as_tuple=True)

    centre = centres[target]
    from_end = side - centre
    # The nearer half of the cell, unless the neighbour on that side lies outside of the map.
    near_start = (centre % 1 < 0.5) & (centre > 1)
    near_end = (from_end % 1 < 0.5) & (from_end > 1)
    own = torch.ones_like(near_start[:, :1])
    neighbour, chosen = torch.cat((own, near_start, near_end), 1).T.nonzero(as_tuple=True)
    anchor, target, centre = anchor[chosen], target[chosen], centre[chosen]

    cell = (centre - centre.new_tensor(_SHIFTS)[neighbour]).long()
    column, row = cell[:, 0].clamp(0, width - 1), cell[:, 1].clamp(0, height - 1)
    relative = centre - torch.stack((column, row), 1)
    return _Matches(
        image=targets[target, 0].long(),
        anchor=anchor,
        row=row,
        column=column,
        boxes_cxcywh=torch.cat((relative, sizes[target]), 1),
        anchors=anchors[anchor],
        classes=targets[target, 1].long(),
    )


def cell_boxes_xyxy(logits: Tensor, anchors: Tensor) -> Tensor:
    """Raw box outputs [K, 4] and anchors [K, 2] -> [K, 4] in grid units, relative to the cell's upper left corner."""
    p = logits.sigmoid()
    sizes = ((p[:, 2:] * 2) ** 2 * anchors).clamp(min=_MIN_SIDE)
    return box_convert(torch.cat((p[:, :2] * 2 - 0.5, sizes), 1), "cxcywh", "xyxy")


def complete_iou(boxes_xyxy: Tensor, others_xyxy: Tensor) -> Tensor:
    """Of each pair, [K, 4] twice -> [K]; at most 1, below 0 for boxes that lie apart."""
    loss: Tensor = complete_box_iou_loss(boxes_xyxy, others_xyxy, reduction="none")
    return 1 - loss


def level_balance(levels: int) -> tuple[float, ...]:
    """The weight of each level's objectness."""
    return _BALANCE_OF_THREE if levels == 3 else _BALANCE[:levels]


def _write_last(wanted: Tensor, matches: _Matches, values: Tensor) -> None:
    """``wanted[image, anchor, row, column] = values`` where the last of several writers wins, on every device."""
    _, num_anchors, height, width = wanted.shape
    flat = ((matches.image * num_anchors + matches.anchor) * height + matches.row) * width + matches.column
    order = torch.arange(len(flat), device=flat.device)
    last = order.new_full((wanted.numel(),), -1).scatter_reduce(0, flat, order, "amax")
    written = last >= 0
    wanted.view(-1)[written] = values[last[written]]


def _cross_entropy(logits: Tensor, wanted: Tensor, positive_weight: float) -> Tensor:
    weight = None if positive_weight == 1 else logits.new_tensor(positive_weight)
    return F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weight)
