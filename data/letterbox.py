"""Box arithmetic shared by models, data and engine; depends on torch alone.

Formats are in the names: ``xyxy`` is (x1, y1, x2, y2), ``cxcywh`` is (centre x, centre y, width, height).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torchvision.ops import box_convert, clip_boxes_to_image


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """[..., 4] -> [..., 4]; units are kept."""
    boxes_xyxy: Tensor = box_convert(boxes_cxcywh, "cxcywh", "xyxy")
    return boxes_xyxy


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """[..., 4] -> [..., 4]; units are kept."""
    boxes_cxcywh: Tensor = box_convert(boxes_xyxy, "xyxy", "cxcywh")
    return boxes_cxcywh


@dataclass(frozen=True)
class Letterbox:
    """How an image was resized and padded: ``x_letterboxed = x_original * ratio_x + left_px`` (y likewise).

    The two ratios differ by less than one pixel over the image, because resized sides are whole pixels.
    """

    ratio_x: float
    ratio_y: float
    left_px: int
    top_px: int
    original_hw: tuple[int, int]

    def to_letterboxed(self, boxes_xyxy: Tensor) -> Tensor:
        """[n, 4] pixels of the original image -> [n, 4] pixels of the letterboxed one."""
        scale = boxes_xyxy.new_tensor([self.ratio_x, self.ratio_y] * 2)
        shift = boxes_xyxy.new_tensor([self.left_px, self.top_px] * 2)
        return boxes_xyxy * scale + shift

    def to_original(self, boxes_xyxy: Tensor) -> Tensor:
        """[n, 4] pixels of the letterboxed image -> [n, 4] pixels of the original, clipped to it."""
        scale = boxes_xyxy.new_tensor([self.ratio_x, self.ratio_y] * 2)
        shift = boxes_xyxy.new_tensor([self.left_px, self.top_px] * 2)
        clipped: Tensor = clip_boxes_to_image((boxes_xyxy - shift) / scale, self.original_hw)
        return clipped
