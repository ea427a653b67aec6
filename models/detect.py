"""The detection head: one 1x1 convolution per level, anchors, and decoding."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .errors import ModelError

_logger = logging.getLogger(__name__)


class Detect(nn.Module):
    """Maps of L levels to boxes.

    ``anchors`` [L, A, 2] (width, height) are pixels until ``calibrate`` is told the strides, then grid units, as
    published checkpoints store them. All counts are read from tensors, so the head may be narrowed in place.
    """

    anchors: Tensor

    def __init__(self, num_classes: int, anchors_px: Sequence[Sequence[float]], in_channels: Sequence[int]) -> None:
        super().__init__()
        anchors = torch.tensor(anchors_px, dtype=torch.float32).view(len(in_channels), -1, 2)
        self.register_buffer("anchors", anchors)
        outputs = anchors.shape[1] * (num_classes + 5)
        self.m = nn.ModuleList(nn.Conv2d(width, outputs, 1) for width in in_channels)
        self.stride_px: tuple[int, ...] = ()

    @property
    def num_classes(self) -> int:
        bias = self.m[0].bias
        assert isinstance(bias, Tensor)
        return bias.numel() // self.anchors.shape[1] - 5

    @property
    def anchors_px(self) -> Tensor:
        """[L, A, 2] width and height in pixels."""
        return self.anchors * self.anchors.new_tensor(self.stride_px).view(-1, 1, 1)

    def calibrate(self, stride_px: Sequence[int]) -> None:
        """Set the strides, turn the anchors into grid units and give the biases their prior. Once, after building.

        The prior expects 8 objects in a 640 pixel image and 0.6 objects' worth of each class
        (after Lin et al. 2017, arXiv:1708.02002, section 3.3).
        Anchors listed in the opposite order of the strides are reversed, with a warning in the log.
        """
        assert not self.stride_px, "calibrate is called once"
        self.stride_px = tuple(stride_px)
        areas = self.anchors.prod(-1).mean(-1)
        if len(stride_px) > 1 and (areas[-1] - areas[0]) * (stride_px[-1] - stride_px[0]) < 0:
            _logger.warning("anchors are listed against the order of the strides %s: taken in reverse", stride_px)
            self.anchors.copy_(self.anchors.flip(0))
        self.anchors /= self.anchors.new_tensor(self.stride_px).view(-1, 1, 1)
        self.add_prior()

    @torch.no_grad()
    def add_prior(self) -> None:
        """Add the prior to biases that were just drawn, in place; see ``calibrate``."""
        for conv, stride in zip(self.m, self.stride_px, strict=True):
            assert isinstance(conv, nn.Conv2d) and conv.bias is not None
            bias = conv.bias.view(self.anchors.shape[1], -1)
            bias[:, 4] += math.log(8 / (640 / stride) ** 2)
            bias[:, 5:] += math.log(0.6 / (self.num_classes - 0.99999))

    def set_anchors(self, anchors_px: Tensor) -> None:
        """Replace the anchors, in place: as many as there are, [..., 2] in pixels, the smallest to the finest level.

        A trained head has learnt its sizes relative to the old ones. ModelError for another number or sides not above 0.
        """
        assert self.stride_px, "calibrate comes first"
        wanted = anchors_px.detach().to(self.anchors).reshape(-1, 2) if anchors_px.shape[-1:] == (2,) else anchors_px
        right = tuple(wanted.shape) == (self.anchors.shape[0] * self.anchors.shape[1], 2)
        if not right or not bool((torch.isfinite(wanted) & (wanted > 0)).all()):
            raise ModelError(
                f"anchors of the shape {tuple(anchors_px.shape)}, expected {tuple(self.anchors.shape)} with all sides above 0"
            )
        levels = wanted[wanted.prod(1).argsort(stable=True)].view_as(self.anchors)
        for level, anchors in zip(sorted(range(len(levels)), key=lambda i: self.stride_px[i]), levels, strict=True):
            self.anchors[level] = anchors / self.stride_px[level]

    def forward(self, xs: list[Tensor]) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """L maps [B, C, h, w] -> raw maps [B, A, h, w, 5 + classes]; in eval mode (decoded, raw), see ``decode``."""
        num_anchors = self.anchors.shape[1]
        raw = []
        for conv, x in zip(self.m, xs, strict=True):
            y = conv(x)
            batch, _, height, width = y.shape
            raw.append(y.view(batch, num_anchors, -1, height, width).permute(0, 1, 3, 4, 2).contiguous())
        return raw if self.training else (self.decode(raw), raw)

    def decode(self, raw: list[Tensor]) -> Tensor:
        """Decode raw maps to [B, N, 5 + classes] float32: centre x, centre y, width, height in pixels, then probabilities.

        N runs over levels, then anchors, then rows, then columns. Always float32: half precision has only
        half a pixel left at 1000 pixels.
        """
        decoded = []
        for level, stride, anchors in zip(raw, self.stride_px, self.anchors_px.float(), strict=True):
            batch, num_anchors, height, width, outputs = level.shape
            p = level.float().sigmoid()
            rows = torch.arange(height, device=p.device, dtype=p.dtype)
            columns = torch.arange(width, device=p.device, dtype=p.dtype)
            grid = torch.stack((columns.expand(height, width), rows[:, None].expand(height, width)), -1)
            centres = (p[..., :2] * 2 - 0.5 + grid) * stride
            sizes = (p[..., 2:4] * 2) ** 2 * anchors.view(1, num_anchors, 1, 1, 2)
            boxes = torch.cat((centres, sizes, p[..., 4:]), -1)
            decoded.append(boxes.view(batch, num_anchors * height * width, outputs))
        return torch.cat(decoded, 1)
