"""Batch norms taken up by the convolutions before them, for inference."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from .blocks import Conv
from .yolo import YOLO


def fuse_norms(model: YOLO) -> YOLO:
    """Multiplies every Conv block's batch norm into its convolution, in place; evaluation mode only, equal but for rounding."""
    for block in model.modules():
        if isinstance(block, Conv) and isinstance(block.bn, nn.BatchNorm2d):
            block.conv = fuse_conv_bn_eval(block.conv.eval(), block.bn.eval())
            block.bn = nn.Identity()  # type: ignore[assignment]
    return model
