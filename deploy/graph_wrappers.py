"""Pre- and post-processing inside the graph of an exported network, so that its user need not write it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, nms

WRAPPED = "network"
"""The attribute by which each of these holds the network."""

CANDIDATES = 10
"""So many times the number of detections enter the suppression."""


def unwrapped(path: str) -> str:
    """A module's path in the network alone; ``WRAPPED`` itself stays."""
    while path.startswith(f"{WRAPPED}."):
        path = path.removeprefix(f"{WRAPPED}.")
    return path


class Decoded(nn.Module):
    """A detector that gives its decoded boxes alone, [B, N, 5 + classes], as YOLOv5's own exports do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        decoded: Tensor = self.network(images)[0]
        return decoded


class FromBytes(nn.Module):
    """A network whose images are uint8 0..255 instead of float 0..1."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        scaled: Tensor = self.network(images.float() / 255)
        return scaled


class WithNms(nn.Module):
    """A detector [B, N, 5 + classes] (centre, size, objectness, probabilities) that ends in its final detections.

    They are [B, max_detections, 6]: x1, y1, x2, y2 in pixels, score, class, the best first; rows of 0 fill up. A box has
    its best class alone, and suppresses boxes of that class.
    """

    def __init__(self, network: nn.Module, conf: float, iou: float, max_detections: int = 300) -> None:
        super().__init__()
        self.network = network
        self.conf, self.iou, self.max_detections = conf, iou, max_detections

    def forward(self, images: Tensor) -> Tensor:
        decoded: Tensor = self.network(images)
        return torch.stack([self.suppress(predictions) for predictions in decoded.unbind(0)])

    def candidates(self, predictions: Tensor) -> Tensor:
        """Boxes that enter the suppression, [N, 5 + classes] -> [K, 6], the best first: x1, y1, x2, y2, score, class.

        Scores below ``conf`` become 0, since a graph has no sizes that depend on the image.
        """
        count = CANDIDATES * self.max_detections
        predictions = torch.cat([predictions, predictions.new_zeros(count, predictions.shape[1])])
        boxes = box_convert(predictions[:, :4], "cxcywh", "xyxy")
        scores, classes = (predictions[:, 5:] * predictions[:, 4:5]).max(1)
        scores = torch.where(scores > self.conf, scores, 0.0)
        best, places = scores.topk(count)
        return torch.cat([boxes[places], best[:, None], classes[places, None].to(best.dtype)], 1)

    def suppress(self, predictions: Tensor) -> Tensor:
        """Detections of one image, [N, 5 + classes] -> [max_detections, 6]."""
        rows = self.candidates(predictions)
        # Boxes of different classes are moved apart: torchvision's batched_nms counts classes, which no graph can.
        apart = rows[:, :4] + rows[:, 5:] * (rows[:, :4].abs().max() * 2 + 1)
        kept = nms(apart, rows[:, 4], self.iou)
        rows = torch.cat([rows[kept], rows.new_zeros(self.max_detections, 6)])[: self.max_detections]
        return rows * (rows[:, 4:5] > 0)
