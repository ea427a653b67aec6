"""From decoded predictions to detections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_convert, nms

from .errors import ModelError

_MAX_CANDIDATES = 30000


def non_max_suppression(
    decoded: Tensor,
    conf: float = 0.25,
    iou: float = 0.45,
    max_detections: int = 300,
    multi_label: bool = False,
    classes: Sequence[int] | None = None,
    class_agnostic: bool = False,
) -> list[Tensor]:
    """Turn decoded predictions into detections: the best of boxes that overlap, for each class.

    Args:
        decoded: [B, N, 5 + classes] as ``Detect.decode`` gives it.
        conf: what a detection's score, objectness times class probability, must exceed.
        iou: above this overlap a box suppresses boxes of lower scores.
        max_detections: at most so many for each image.
        multi_label: a box counts for every class whose score exceeds ``conf``; else for its best class alone.
        classes: keep these classes only.
        class_agnostic: boxes of different classes suppress each other, too.

    Returns:
        For each image [n, 6]: x1, y1, x2, y2 in pixels, score, class; best first. At most 30,000 candidates of an image enter
        the suppression.

    Raises:
        ModelError: a threshold outside of 0..1, or an output of another form.

    >>> decoded = torch.tensor([[[10, 10, 8, 8, 0.9, 1.0], [11, 10, 8, 8, 0.6, 1.0], [40, 40, 8, 8, 0.5, 1.0]]])
    >>> [detection.tolist()[:4] for detection in non_max_suppression(decoded)[0]]
    [[6.0, 6.0, 14.0, 14.0], [36.0, 36.0, 44.0, 44.0]]
    """
    if decoded.ndim != 3 or decoded.shape[2] < 6:
        raise ModelError(f"non_max_suppression: found the shape {tuple(decoded.shape)}, expected [B, N, 5 + classes]")
    for name, value in (("conf", conf), ("iou", iou)):
        if not 0 <= value <= 1:
            raise ModelError(f"non_max_suppression: {name} is {value}, expected 0 to 1")
    keep_classes = None if classes is None else torch.as_tensor(list(classes), device=decoded.device)
    detections = []
    with torch.no_grad():
        for predictions in decoded.detach().float():
            boxes, scores, labels = _candidates(predictions, conf, multi_label, keep_classes)
            one_class = class_agnostic or decoded.shape[2] == 6
            kept = nms(boxes, scores, iou) if one_class else batched_nms(boxes, scores, labels, iou)
            kept = kept[:max_detections]
            detections.append(torch.cat((boxes[kept], scores[kept, None], labels[kept, None].float()), 1))
    return detections


def _candidates(
    predictions: Tensor, conf: float, multi_label: bool, keep_classes: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes [K, 4] xyxy, scores [K], labels [K] above ``conf``, best first if there were too many."""
    predictions = predictions[predictions[:, 4] > conf]
    scores = predictions[:, 5:] * predictions[:, 4:5]
    if multi_label:
        rows, labels = (scores > conf).nonzero(as_tuple=True)
        scores = scores[rows, labels]
    else:
        scores, labels = scores.max(1)
        rows = (scores > conf).nonzero(as_tuple=True)[0]
        scores, labels = scores[rows], labels[rows]
    if keep_classes is not None:
        wanted = torch.isin(labels, keep_classes).nonzero(as_tuple=True)[0]
        rows, scores, labels = rows[wanted], scores[wanted], labels[wanted]
    if len(scores) > _MAX_CANDIDATES:
        scores, best = scores.topk(_MAX_CANDIDATES)
        rows, labels = rows[best], labels[best]
    return box_convert(predictions[rows, :4], "cxcywh", "xyxy"), scores, labels
