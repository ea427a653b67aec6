"""Building blocks of YOLOv5.

Attribute names (``conv``, ``bn``, ``cv1``, ``m`` ...) are those of published checkpoints, so state dicts fit by name.
Every block that ends in an activation owns its module as ``act``, which may be replaced, for example by a gated one.
No forward uses a channel count: widths are whatever the tensors have, so blocks may be narrowed in place.

Shapes are [B, C, H, W] throughout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from .activations import DEFAULT_ACTIVATION, make_activation

Network = TypeVar("Network", bound=nn.Module)

BN_EPS = 1e-3
BN_MOMENTUM = 0.03


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Batch norm with the constants that published YOLOv5 weights were trained with."""
    return nn.BatchNorm2d(channels, eps=BN_EPS, momentum=BN_MOMENTUM)


class Conv(nn.Module):
    """Convolution without bias, batch norm, activation.

    ``padding=None`` keeps the size at stride 1. ``act`` is True for the model's ``activation``, False for none, or a
    name.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        dilation: int = 1,
        act: bool | str = True,
        *,
        activation: str = DEFAULT_ACTIVATION,
    ) -> None:
        super().__init__()
        if padding is None:
            padding = dilation * (kernel - 1) // 2
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride, padding, groups=groups, dilation=dilation, bias=False
        )
        self.bn = batch_norm(out_channels)
        if isinstance(act, str):
            self.act = make_activation(act)
        else:
            self.act = make_activation(activation) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class DWConv(Conv):
    """Depthwise Conv: as many groups as both widths allow. ``options`` are Conv's."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, dilation: int = 1, **options: Any
    ) -> None:
        groups = gcd(in_channels, out_channels)
        super().__init__(in_channels, out_channels, kernel, stride, None, groups, dilation, **options)


class Bottleneck(nn.Module):
    """1x1 then 3x3 Conv; adds its input when ``shortcut`` is set and the widths are equal."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        shortcut: bool = True,
        groups: int = 1,
        expansion: float = 0.5,
        *,
        activation: str = DEFAULT_ACTIVATION,
    ) -> None:
        super().__init__()
        hidden = int(out_channels * expansion)
        self.cv1 = Conv(in_channels, hidden, 1, 1, activation=activation)
        self.cv2 = Conv(hidden, out_channels, 3, 1, groups=groups, activation=activation)
        self.add = shortcut and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class BottleneckCSP(nn.Module):
    """Cross-stage-partial block of the early releases (Wang et al. 2019, arXiv:1911.11929).

    The two branches end in plain convolutions; their concatenation is followed by one batch norm and activation.
    """

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
        csp_activation: str | None = None,
    ) -> None:
        super().__init__()
        hidden = int(out_channels * expansion)
        self.cv1 = Conv(in_channels, hidden, 1, 1, activation=activation)
        self.cv2 = nn.Conv2d(in_channels, hidden, 1, 1, bias=False)
        self.cv3 = nn.Conv2d(hidden, hidden, 1, 1, bias=False)
        self.cv4 = Conv(2 * hidden, out_channels, 1, 1, activation=activation)
        self.bn = batch_norm(2 * hidden)
        self.act = make_activation(csp_activation or activation)
        self.m = nn.Sequential(
            *(Bottleneck(hidden, hidden, shortcut, groups, 1.0, activation=activation) for _ in range(repeats))
        )

    def forward(self, x: Tensor) -> Tensor:
        deep = self.cv3(self.m(self.cv1(x)))
        return self.cv4(self.act(self.bn(torch.cat((deep, self.cv2(x)), 1))))


class C3(nn.Module):
    """Cross-stage-partial block with three Convs around a chain of bottlenecks."""

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
        super().__init__()
        hidden = int(out_channels * expansion)
        self.cv1 = Conv(in_channels, hidden, 1, 1, activation=activation)
        self.cv2 = Conv(in_channels, hidden, 1, 1, activation=activation)
        self.cv3 = Conv(2 * hidden, out_channels, 1, 1, activation=activation)
        self.m = nn.Sequential(*(self.make_inner(hidden, shortcut, groups, activation) for _ in range(repeats)))

    @staticmethod
    def make_inner(channels: int, shortcut: bool, groups: int, activation: str) -> nn.Module:
        """One of the blocks that the chain ``m`` is made of."""
        return Bottleneck(channels, channels, shortcut, groups, 1.0, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class SPP(nn.Module):
    """Spatial pyramid pooling: max-pools of several sizes side by side (He et al. 2014, arXiv:1406.4729).

    ``options`` are Conv's.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernels: Sequence[int] = (5, 9, 13), **options: Any
    ) -> None:
        super().__init__()
        hidden = in_channels // 2
        self.cv1 = Conv(in_channels, hidden, 1, 1, **options)
        self.cv2 = Conv(hidden * (len(kernels) + 1), out_channels, 1, 1, **options)
        self.m = nn.ModuleList(nn.MaxPool2d(kernel, 1, kernel // 2) for kernel in kernels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return self.cv2(torch.cat([x, *(pool(x) for pool in self.m)], 1))


class SPPF(nn.Module):
    """SPP with one pool applied three times in a row: equal to kernels 5, 9 and 13 for ``kernel=5``, and faster."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 5, **options: Any) -> None:
        super().__init__()
        hidden = in_channels // 2
        self.cv1 = Conv(in_channels, hidden, 1, 1, **options)
        self.cv2 = Conv(hidden * 4, out_channels, 1, 1, **options)
        self.m = nn.MaxPool2d(kernel, 1, kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        once = self.m(x)
        twice = self.m(once)
        return self.cv2(torch.cat((x, once, twice, self.m(twice)), 1))


class Focus(nn.Module):
    """Moves each 2x2 patch into the channels, then one Conv: [B, C, H, W] -> [B, out, H/2, W/2]. ``options`` are Conv's."""

    def __init__(self, in_channels: int, out_channels: int, *options: Any, **named: Any) -> None:
        super().__init__()
        self.conv = Conv(in_channels * 4, out_channels, *options, **named)

    def forward(self, x: Tensor) -> Tensor:
        top, bottom = x[..., ::2, :], x[..., 1::2, :]
        return self.conv(torch.cat((top[..., ::2], bottom[..., ::2], top[..., 1::2], bottom[..., 1::2]), 1))


class GhostConv(nn.Module):
    """A Conv for half of the output channels, and a 5x5 depthwise Conv of those for the other half.

    Ghost blocks: Han et al. 2020, arXiv:1911.11907. ``options`` are Conv's.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, groups: int = 1, **options: Any
    ) -> None:
        super().__init__()
        half = out_channels // 2
        self.cv1 = Conv(in_channels, half, kernel, stride, None, groups, **options)
        self.cv2 = Conv(half, half, 5, 1, None, half, **options)

    def forward(self, x: Tensor) -> Tensor:
        primary = self.cv1(x)
        return torch.cat((primary, self.cv2(primary)), 1)


class GhostBottleneck(nn.Module):
    """Two GhostConvs with a residual; at stride 2 a depthwise Conv between them and in the shortcut halves the map."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, **options: Any) -> None:
        super().__init__()
        hidden = out_channels // 2
        strided = stride == 2
        self.conv = nn.Sequential(
            GhostConv(in_channels, hidden, 1, 1, **options),
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

    @staticmethod
    def make_inner(channels: int, shortcut: bool, groups: int, activation: str) -> nn.Module:
        return GhostBottleneck(channels, channels, activation=activation)


class Concat(nn.Module):
    """Concatenates its inputs along one axis (1: channels)."""

    def __init__(self, axis: int = 1) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, xs: list[Tensor]) -> Tensor:
        return torch.cat(xs, self.axis)


def fuse_norms(model: Network) -> Network:
    """Multiply every Conv block's batch norm into its convolution, in place; for evaluation only, equal but for rounding."""
    for block in model.modules():
        if isinstance(block, Conv) and isinstance(block.bn, nn.BatchNorm2d):
            block.conv = fuse_conv_bn_eval(block.conv.eval(), block.bn.eval())
            block.bn = nn.Identity()  # type: ignore[assignment]
    return model


def unfused(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a network whose norms were fused, for ``model``, which has them: norms that only add the bias."""
    state = dict(state_dict)
    for path, block in model.named_modules():
        if isinstance(block, Conv) and f"{path}.conv.bias" in state and f"{path}.bn.weight" not in state:
            bias = state[f"{path}.bn.bias"] = state.pop(f"{path}.conv.bias")
            state[f"{path}.bn.weight"], state[f"{path}.bn.running_mean"] = torch.ones_like(bias), torch.zeros_like(bias)
            state[f"{path}.bn.running_var"] = torch.full_like(bias, 1 - block.bn.eps)
            state[f"{path}.bn.num_batches_tracked"] = torch.tensor(0)
    return state
