"""Where an image lies in the square that the network sees."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torchvision.ops import clip_boxes_to_image


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
