"""Colour jitter in hue, saturation and value, without a detour over 8-bit HSV."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_PIXELS_AT_ONCE = 65536
"""What is worked on should stay in a core's cache, and large buffers cost more page faults than arithmetic."""


def jitter_hsv(image: Tensor, hue_turn: float, saturation: float, value: float) -> Tensor:
    """Turn the hue by ``hue_turn`` circles, multiply saturation and value (both saturate at 1).

    uint8 [3, H, W] in, uint8 [3, H, W] channels last out.
    """
    pixels = image.permute(1, 2, 0).contiguous()
    result = torch.empty_like(pixels)
    source, target = pixels.view(-1, 3), result.view(-1, 3)
    for first in range(0, len(source), _PIXELS_AT_ONCE):
        last = first + _PIXELS_AT_ONCE
        _jitter(source[first:last], target[first:last], hue_turn, saturation, value)
    return result.permute(2, 0, 1)


def _jitter(pixels: Tensor, target: Tensor, hue_turn: float, saturation: float, value: float) -> None:
    """Pixels and target are uint8 [n, 3].

    With V = max and C = max - min, saturation and value scale each channel's depth V - channel: by how much saturation
    really grows (until the lowest channel is 0) and value really grows (until the highest is 255).
    """
    # numpy gathers and scatters strided bytes faster than torch, which is faster at the arithmetic.
    planes = np.empty((3, len(pixels)), np.uint8)
    for channel in range(3):
        planes[channel] = pixels.numpy()[:, channel]
    rgb = torch.from_numpy(planes)
    top = torch.maximum(torch.maximum(rgb[0], rgb[1]), rgb[2])
    chroma = top - torch.minimum(torch.minimum(rgb[0], rgb[1]), rgb[2])
    v, c = top.float(), chroma.float()
    depth = _turn_hue((top - rgb).float(), c, 6 * hue_turn)
    growth = (v / c.clamp_(min=1)).clamp_(max=saturation) if saturation > 1 else torch.tensor(saturation)
    gain = (255 / v.clamp(min=1)).clamp_(max=value) if value > 1 else torch.tensor(value)
    # 0.5: the conversion to bytes cuts off.
    torch.addcmul(v.mul_(gain).add_(0.5), depth, growth * gain, value=-1, out=depth)
    np.copyto(planes, depth.numpy(), casting="unsafe")
    for channel in range(3):
        target.numpy()[:, channel] = planes[channel]


def _turn_hue(depth: Tensor, chroma: Tensor, sixths: float) -> Tensor:
    """Depths [3, n] below the highest channel, after turning the hue by so many sixths of the circle; changes ``depth``.

    Around the circle a channel's depth rests at 0 for two sixths, rises to C in one, rests for two and falls in one. A
    turn by two sixths therefore swaps channels, one by three replaces depth by C - depth, and what is left, at most half
    a sixth, moves a channel that rises or falls; the next channel's depth tells how far it is from doing so.
    """
    whole = round(sixths)
    rest = sixths - whole
    if whole % 2:
        depth = chroma - depth
        whole -= 3
    if whole:
        depth = depth.roll(whole // 2, 0)
    if rest:
        step = abs(rest) * chroma
        neighbour = depth.roll(-1 if rest > 0 else 1, 0)
        change = torch.clamp(neighbour, step, chroma - step).sub_(neighbour)
        depth = torch.clamp(depth.add_(change), torch.zeros(1), chroma, out=depth)
    return depth
