"""Blocks against the same arithmetic written out."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.blocks import (
    C3,
    SPP,
    SPPF,
    Bottleneck,
    BottleneckCSP,
    C3Ghost,
    Concat,
    Conv,
    DWConv,
    Focus,
    GhostBottleneck,
    GhostConv,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def settled(block):
    """In evaluation mode, with batch norms that do something."""
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
    return block.eval()


def norm(x, bn):
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=1e-3)


@torch.no_grad()
def test_conv():
    block, x = settled(Conv(4, 6, 3, 2, groups=2)), torch.rand(2, 4, 8, 8)
    expected = F.silu(norm(F.conv2d(x, block.conv.weight, stride=2, padding=1, groups=2), block.bn))
    torch.testing.assert_close(block(x), expected)
    assert block.conv.bias is None
    assert (block.bn.eps, block.bn.momentum) == (1e-3, 0.03)


def test_conv_padding_and_activation():
    assert Conv(1, 1, 5).conv.padding == (2, 2)
    assert Conv(1, 1, 3, dilation=2).conv.padding == (2, 2)
    assert Conv(1, 1, 6, 2, 2).conv.padding == (2, 2)
    assert type(Conv(1, 1, act=False).act) is nn.Identity
    assert type(Conv(1, 1, act="relu", activation="silu").act) is nn.ReLU
    assert type(Conv(1, 1, activation="relu").act) is nn.ReLU


def test_depthwise_groups():
    assert DWConv(12, 18, 3).conv.groups == 6


@torch.no_grad()
@pytest.mark.parametrize(("out", "shortcut", "added"), [(4, True, True), (4, False, False), (6, True, False)])
def test_bottleneck(out, shortcut, added):
    block, x = settled(Bottleneck(4, out, shortcut)), torch.rand(1, 4, 5, 5)
    inner = block.cv2(block.cv1(x))
    torch.testing.assert_close(block(x), x + inner if added else inner)


@torch.no_grad()
def test_bottleneck_csp():
    block = settled(BottleneckCSP(4, 6, 2, csp_activation="nn.LeakyReLU(0.1)"))
    x = torch.rand(1, 4, 5, 5)
    deep = block.cv3(block.m[1](block.m[0](block.cv1(x))))
    joined = F.leaky_relu(norm(torch.cat((deep, block.cv2(x)), 1), block.bn), 0.1)
    torch.testing.assert_close(block(x), block.cv4(joined))


@torch.no_grad()
@pytest.mark.parametrize("kind", [C3, C3Ghost])
def test_c3(kind):
    block, x = settled(kind(4, 8, 2)), torch.rand(1, 4, 5, 5)
    deep = block.m[1](block.m[0](block.cv1(x)))
    torch.testing.assert_close(block(x), block.cv3(torch.cat((deep, block.cv2(x)), 1)))
    assert type(block.m[0]) is (GhostBottleneck if kind is C3Ghost else Bottleneck)


@torch.no_grad()
def test_fast_pyramid_equals_the_pyramid():
    slow, fast = settled(SPP(4, 6)), SPPF(4, 6).eval()
    fast.load_state_dict(slow.state_dict())
    x = torch.randn(1, 4, 20, 20)
    y = slow.cv1(x)
    pools = [F.max_pool2d(y, k, 1, k // 2) for k in (5, 9, 13)]
    torch.testing.assert_close(slow(x), slow.cv2(torch.cat((y, *pools), 1)))
    torch.testing.assert_close(fast(x), slow(x))


@torch.no_grad()
def test_focus_order():
    """The four pixels of a 2x2 patch become channels: top left, bottom left, top right, bottom right."""
    block = Focus(1, 4, act=False).eval()
    block.conv.conv.weight.copy_(torch.eye(4).view(4, 4, 1, 1))
    found = block(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])) * (1 + 1e-3) ** 0.5
    torch.testing.assert_close(found.flatten(), torch.tensor([1.0, 3.0, 2.0, 4.0]))


@torch.no_grad()
def test_ghost_conv():
    block, x = settled(GhostConv(4, 6, 3, 2)), torch.rand(1, 4, 8, 8)
    primary = block.cv1(x)
    assert primary.shape == (1, 3, 4, 4)
    assert (block.cv2.conv.groups, block.cv2.conv.kernel_size) == (3, (5, 5))
    torch.testing.assert_close(block(x), torch.cat((primary, block.cv2(primary)), 1))


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2])
def test_ghost_bottleneck(stride):
    block, x = settled(GhostBottleneck(8, 8, 3, stride)), torch.rand(1, 8, 8, 8)
    y = block.conv[0](x)
    shortcut = x
    if stride == 2:
        y = norm(F.conv2d(y, block.conv[1].conv.weight, stride=2, padding=1, groups=4), block.conv[1].bn)
        first, second = block.shortcut
        shortcut = norm(F.conv2d(x, first.conv.weight, stride=2, padding=1, groups=8), first.bn)
        shortcut = norm(F.conv2d(shortcut, second.conv.weight), second.bn)
    torch.testing.assert_close(block(x), block.conv[2](y) + shortcut)
    assert type(block.conv[2].cv1.act) is nn.Identity


def test_concat_axis():
    parts = [torch.ones(1, 2, 3, 4), torch.zeros(1, 1, 3, 4)]
    assert Concat(1)(parts).shape == (1, 3, 3, 4)
