"""Ghost blocks: half of the channels come from a cheap depthwise convolution (Han et al. 2020, arXiv:1911.11907)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .activations import DEFAULT_ACTIVATION
from .blocks import C3, Conv, DWConv


class GhostConv(nn.Module):
    """A Conv for half of the output channels, and a 5x5 depthwise Conv of those for the other half."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        act: bool | str = True,
        *,
        activation: str = DEFAULT_ACTIVATION,
    ) -> None:
        super().__init__()
        half = out_channels // 2
        self.cv1 = Conv(in_channels, half, kernel, stride, None, groups, act=act, activation=activation)
        self.cv2 = Conv(half, half, 5, 1, None, half, act=act, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        primary = self.cv1(x)
        return torch.cat((primary, self.cv2(primary)), 1)


class GhostBottleneck(nn.Module):
    """Two GhostConvs with a residual; at stride 2 a depthwise Conv between them and in the shortcut halves the map."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        stride: int = 1,
        *,
        activation: str = DEFAULT_ACTIVATION,
    ) -> None:
        super().__init__()
        hidden = out_channels // 2
        strided = stride == 2
        self.conv = nn.Sequential(
            GhostConv(in_channels, hidden, 1, 1, activation=activation),
            DWConv(hidden, hidden, kernel, stride, act=False) if strided else nn.Identity(),
            GhostConv(hidden, out_channels, 1, 1, act=False),
        )
        self.shortcut: nn.Module = nn.Identity()
        if strided:
            self.shortcut = nn.Sequential(
                DWConv(in_channels, in_channels, kernel, stride, act=False),
                Conv(in_channels, out_channels, 1, 1, act=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.shortcut(x)


class C3Ghost(C3):
    """C3 with GhostBottlenecks inside."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        repeats: int = 1,
        shortcut: bool = True,
        groups: int = 1,
        expansion: float = 0.5,
        *,
        activation: str = DEFAULT_ACTIVATION,
    ) -> None:
        super().__init__(in_channels, out_channels, 0, shortcut, groups, expansion, activation=activation)
        hidden = int(out_channels * expansion)
        self.m = nn.Sequential(*(GhostBottleneck(hidden, hidden, activation=activation) for _ in range(repeats)))
