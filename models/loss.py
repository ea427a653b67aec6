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
    """K predictions of one level that an object was assigned to; boxes in grid units relative to their cell.

    Everything here is found out on the CPU, so that a GPU never has to be waited for.
    """

    indices: Tensor
    """int64 [4, K]: image, anchor, row, column"""
    classes: Tensor
    """int64 [K]"""
    boxes_cxcywh: Tensor
    anchors: Tensor
    """[K, 2]"""
    last: Tensor
    """int64 [L]: for each cell and anchor with matches, which of 0..K-1 was written last"""

    def to(self, device: torch.device) -> _Matches:
        return _Matches(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))


class DetectionLoss:
    """YOLOv5's loss of the raw maps of a model in training mode and the targets of its batch; in FP32, under AMP too.

    >>> from models import LossGains, build_model, load_description
    >>> model = build_model(load_description("models/yolov5n.yaml"), num_classes=3)
    >>> loss = DetectionLoss(model, LossGains().scaled(num_classes=3, image_size_px=64, num_levels=3))
    >>> total, parts = loss(model(torch.zeros(2, 3, 64, 64)), torch.tensor([[0, 1, 0.5, 0.5, 0.2, 0.2]]))
    >>> sorted(parts), bool(total > 0)
    (['box', 'cls', 'obj'], True)

    Keep the targets on the CPU, where objects are assigned to predictions; parts come back as detached tensors, since to
    read one waits for a GPU.
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
        self._anchors, self._anchors_version = detect.anchors.float().cpu(), detect.anchors._version

    def __call__(
        self, raw: Sequence[Tensor], targets: Tensor, images: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch.

        Args:
            raw: maps [B, A, h, w, 5 + classes] per level.
            targets: [M, 6]: image, class, cx, cy, w, h in 0..1; best on the CPU.
            images: not needed here; a loss of the training loop gets them too.

        Returns:
            The scalar to differentiate, which is B times the sum of the parts, and the weighted, detached parts ``box``,
            ``obj`` and ``cls``.

        Raises:
            ModelError: the targets have another form or unknown classes.
        """
        targets = targets.to("cpu", torch.float32)
        self._check(raw, targets)
        if self._anchors_version != self.detect.anchors._version:
            self._anchors, self._anchors_version = self.detect.anchors.float().cpu(), self.detect.anchors._version
        levels = [level.float() for level in raw]
        matches = [
            _match(level.shape[1:4], anchors, targets, self.gains.anchor_t).to(level.device)
            for level, anchors in zip(levels, self._anchors, strict=True)
        ]
        predicted = [level[tuple(found.indices)] for level, found in zip(levels, matches, strict=True)]
        # Once for all levels: torchvision waits for a GPU here, as it gathers the pairs that overlap.
        boxes = torch.cat(
            [cell_boxes_xyxy(p[:, :4], found.anchors) for p, found in zip(predicted, matches, strict=True)]
        )
        wanted = box_convert(torch.cat([found.boxes_cxcywh for found in matches]), "cxcywh", "xyxy")
        counts = [len(found.classes) for found in matches]
        ious = complete_iou(boxes, wanted).split(counts)
        sums = [raw[0].new_zeros((), dtype=torch.float32)] * 3
        balance, shares = level_balance(len(raw)), self._shares(raw[0].shape[0], counts)
        for level, found, outputs, iou, weight, share in zip(
            levels, matches, predicted, ious, balance, shares, strict=True
        ):
            box, obj, cls = self._level(level[..., 4], outputs[:, 5:], found, iou)
            sums = [sums[0] + box * share, sums[1] + obj * weight, sums[2] + cls * share]
        box, obj, cls = (
            part * gain for part, gain in zip(sums, (self.gains.box, self.gains.obj, self.gains.cls), strict=True)
        )
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

    def _level(
        self, objectness: Tensor, classes: Tensor, matches: _Matches, iou: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Unweighted box, objectness and class loss of one level; ``classes`` [K, C] logits and ``iou`` [K] of its matches."""
        gains = self.gains
        box = cls = objectness.new_zeros(())
        wanted = torch.zeros_like(objectness)
        if len(iou):
            box = (1 - iou).mean()
            wanted[tuple(matches.indices[:, matches.last])] = iou.detach().clamp(min=0)[matches.last]
            if classes.shape[1] > 1:
                smooth = gains.label_smoothing / 2
                one_hot = torch.full_like(classes, smooth)
                one_hot.scatter_(1, matches.classes[:, None], 1 - smooth)
                cls = _cross_entropy(classes, one_hot, gains.cls_pw)
        return box, _cross_entropy(objectness, wanted, gains.obj_pw), cls


def _match(size_ahw: Sequence[int], anchors: Tensor, targets: Tensor, anchor_t: float) -> _Matches:
    """Assign objects to predictions: ``anchors`` [A, 2] in grid units, ``targets`` [M, 6], both on the CPU."""
    num_anchors, height, width = size_ahw
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
    image = targets[target, 0].long()
    # Several objects may be assigned to one prediction: its objectness is the last one's, on every device.
    place = ((image * num_anchors + anchor) * height + row) * width + column
    _, group = place.unique(return_inverse=True)
    order = torch.arange(len(place))
    last = order.new_zeros(int(group.max()) + 1 if len(group) else 0).scatter_reduce(0, group, order, "amax")
    return _Matches(
        indices=torch.stack((image, anchor, row, column)),
        classes=targets[target, 1].long(),
        boxes_cxcywh=torch.cat((centre - torch.stack((column, row), 1), sizes[target]), 1),
        anchors=anchors[anchor],
        last=last,
    )


def cell_boxes_xyxy(logits: Tensor, anchors: Tensor) -> Tensor:
    """Raw box outputs [K, 4] and anchors [K, 2] -> [K, 4] in grid units, relative to the cell's upper left corner."""
    p = logits.sigmoid()
    sizes = ((p[:, 2:] * 2) ** 2 * anchors).clamp(min=_MIN_SIDE)
    boxes: Tensor = box_convert(torch.cat((p[:, :2] * 2 - 0.5, sizes), 1), "cxcywh", "xyxy")
    return boxes


def complete_iou(boxes_xyxy: Tensor, others_xyxy: Tensor) -> Tensor:
    """Of each pair, [K, 4] twice -> [K]; at most 1, below 0 for boxes that lie apart."""
    loss: Tensor = complete_box_iou_loss(boxes_xyxy, others_xyxy, reduction="none")
    return 1 - loss


def level_balance(levels: int) -> tuple[float, ...]:
    """Return the weight of each level's objectness."""
    return _BALANCE_OF_THREE if levels == 3 else _BALANCE[:levels]


def _cross_entropy(logits: Tensor, wanted: Tensor, positive_weight: float) -> Tensor:
    weight = (
        None if positive_weight == 1 else logits.new_full((), positive_weight)
    )  # a number would be copied and awaited
    loss: Tensor = F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weight)
    return loss
