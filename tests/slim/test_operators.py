"""Every operator that slim knows: the groups that it makes, and a proven cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.ops import DeformConv2d

import slim
from tests.slim.networks import conv, prove, randomise

Forward = Callable[["Net", Tensor], Any]


class Net(nn.Module):
    """Named modules and parameters, and a forward given as a function: one operator per test in a few lines."""

    def __init__(self, forward: Forward, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


class Fixed(nn.Module):
    """A filter that does not learn."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("filter", torch.rand(shape, generator=torch.Generator().manual_seed(2)))


def head(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, 3, 1)


def in_the_middle(x: Tensor) -> Tensor:
    larger = x.new_zeros(x.shape[0], x.shape[1], x.shape[2] + 2, x.shape[3] + 2)
    larger[:, :, 1:-1, 1:-1] = x
    return larger


def quarters(x: Tensor) -> tuple[Tensor, ...]:
    return x.split([x.shape[1] // 4, x.shape[1] - x.shape[1] // 4], 1)  # type: ignore[no-any-return]


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every place is a mean over all places, by how alike they are."""
    weights = (q.flatten(2).transpose(1, 2) @ k.flatten(2)).softmax(-1)
    return (v.flatten(2) @ weights.transpose(1, 2)).view_as(v)


X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))

# name: (network, prunable groups {name: (size, physical channels for each)})
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, tuple[int, int]]]] = {
    "concatenation inside a sum": (
        lambda: Net(
            lambda m, x: m.head(torch.cat([m.a(x), m.b(x)], 1) + m.c(x)),
            a=conv(3, 4),
            b=conv(3, 6),
            c=conv(3, 10),
            head=head(10),
        ),
        X,
        {"a.0": (4, 1), "b.0": (6, 1)},
    ),
    "dense concatenation": (
        lambda: Net(
            lambda m, x: (lambda y: (lambda z: m.head(torch.cat([y, z, m.c(torch.cat([y, z], 1))], 1)))(m.b(y)))(
                m.a(x)
            ),
            a=conv(3, 4),
            b=conv(4, 6),
            c=conv(10, 5),
            head=head(15),
        ),
        X,
        {"a.0": (4, 1), "b.0": (6, 1), "c.0": (5, 1)},
    ),
    "chunk, one half goes on (C2f)": (
        lambda: Net(
            lambda m, x: (lambda a, b: m.head(torch.cat([a, b, m.b(b) + b], 1)))(*m.a(x).chunk(2, 1)),
            a=conv(3, 8),
            b=conv(4, 4, 3),
            head=head(12),
        ),
        X,
        {"a.0": (4, 2)},
    ),
    "slices by the channel count": (
        lambda: Net(
            lambda m, x: (lambda y: m.head(y[:, : y.shape[1] // 2] * y[:, y.shape[1] // 2 :]))(m.a(x)),
            a=conv(3, 8),
            head=head(4),
        ),
        X,
        {"a.0": (4, 2)},
    ),
    "halves by the channel count that go separate ways": (
        lambda: Net(
            lambda m, x: (lambda y: m.head(m.b(y[:, : y.shape[1] // 2]) + m.c(y[:, y.shape[1] // 2 :])))(m.a(x)),
            a=conv(3, 8),
            b=conv(4, 6),
            c=conv(4, 6),
            head=head(6),
        ),
        X,
        {"a.0": (4, 2), "b.0": (6, 1)},
    ),
    "channel shuffle between dense layers": (
        lambda: Net(lambda m, x: m.head(m.shuffle(m.a(x))), a=conv(3, 9), shuffle=nn.ChannelShuffle(3), head=head(9)),
        X,
        {"a.0": (3, 3)},
    ),
    "focus": (
        lambda: Net(
            lambda m, x: (
                lambda y: m.head(
                    torch.cat([y[..., ::2, ::2], y[..., 1::2, ::2], y[..., ::2, 1::2], y[..., 1::2, 1::2]], 1)
                )
            )(m.a(x)),
            a=conv(3, 5),
            head=head(20),
        ),
        X,
        {"a.0": (5, 1)},
    ),
    "pixel shuffle": (
        lambda: Net(lambda m, x: m.head(F.pixel_shuffle(m.a(x), 2)), a=conv(3, 12), head=head(3)),
        X,
        {"a.0": (3, 4)},
    ),
    "pixel unshuffle": (
        lambda: Net(lambda m, x: m.head(F.pixel_unshuffle(m.a(x), 2)), a=conv(3, 5), head=head(20)),
        X,
        {"a.0": (5, 1)},
    ),
    "channel shuffle": (
        lambda: Net(
            lambda m, x: m.head(m.shuffle(m.b(m.a(x)))),
            a=conv(3, 8),
            b=conv(8, 8, 1, groups=2),
            shuffle=nn.ChannelShuffle(2),
            head=head(8),
        ),
        X,
        {"a.0": (4, 2), "b.0": (4, 2)},
    ),
    "depthwise, with a multiplier": (
        lambda: Net(lambda m, x: m.head(m.b(m.a(x))), a=conv(3, 6), b=conv(6, 12, 3, groups=6), head=head(12)),
        X,
        {"a.0": (6, 1)},
    ),
    "transposed": (
        lambda: Net(
            lambda m, x: m.head(m.b(m.a(x)).relu()), a=conv(3, 6), b=nn.ConvTranspose2d(6, 4, 2, 2), head=head(4)
        ),
        X,
        {"a.0": (6, 1), "b": (4, 1)},
    ),
    "transposed, grouped and depthwise": (
        lambda: Net(
            lambda m, x: m.head(m.c(m.b(m.a(x)))),
            a=conv(3, 8),
            b=nn.ConvTranspose2d(8, 6, 2, 2, groups=2),
            c=nn.ConvTranspose2d(6, 12, 2, groups=6),
            head=head(12),
        ),
        X,
        {"a.0": (4, 2), "b": (3, 1)},
    ),
    "squeeze and excitation": (
        lambda: Net(
            lambda m, x: (lambda y: m.head(y * m.e(m.s(y.mean((2, 3), keepdim=True)).relu()).sigmoid()))(m.a(x)),
            a=conv(3, 8),
            s=nn.Conv2d(8, 4, 1),
            e=nn.Conv2d(4, 8, 1),
            head=head(8),
        ),
        X,
        {"a.0": (8, 1), "s": (4, 1)},
    ),
    "flatten before a linear layer": (
        lambda: Net(
            lambda m, x: m.fc(m.b(F.adaptive_max_pool2d(m.a(x), 2).flatten(1)).relu()),
            a=conv(3, 6),
            b=nn.Linear(24, 8),
            fc=nn.Linear(8, 2),
        ),
        X,
        {"a.0": (6, 1), "b": (8, 1)},
    ),
    "instance norm": (
        lambda: Net(
            lambda m, x: m.head(m.n(m.a(x))),
            a=nn.Conv2d(3, 6, 3),
            n=nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
            head=head(6),
        ),
        X,
        {"a": (6, 1)},
    ),
    "instance norm without parameters": (
        lambda: Net(lambda m, x: m.head(m.n(m.a(x))), a=nn.Conv2d(3, 6, 3), n=nn.InstanceNorm2d(6), head=head(6)),
        X,
        {"a": (6, 1)},
    ),
    "group norm: whole groups of it": (
        lambda: Net(lambda m, x: m.head(m.n(m.a(x))), a=nn.Conv2d(3, 12, 3), n=nn.GroupNorm(4, 12), head=head(12)),
        X,
        {"a": (4, 3)},
    ),
    "group norm without parameters": (
        lambda: Net(
            lambda m, x: m.head(m.n(m.a(x))), a=nn.Conv2d(3, 12, 3), n=nn.GroupNorm(6, 12, affine=False), head=head(12)
        ),
        X,
        {"a": (6, 2)},
    ),
    "layer norm over one map": (
        lambda: Net(lambda m, x: m.head(F.layer_norm(m.a(x), (8, 8))), a=conv(3, 6), head=head(6)),
        X,
        {"a.0": (6, 1)},
    ),
    "PReLU": (
        lambda: Net(lambda m, x: m.head(m.p(m.a(x))), a=nn.Conv2d(3, 6, 1), p=nn.PReLU(6), head=head(6)),
        X,
        {"a": (6, 1)},
    ),
    "layer scale and shift": (
        lambda: Net(
            lambda m, x: (lambda y: m.head(y + m.scale * m.b(y) + m.shift))(m.a(x)),
            a=conv(3, 6),
            b=conv(6, 6),
            scale=nn.Parameter(torch.rand(6, 1, 1)),
            shift=nn.Parameter(torch.rand(1, 6, 1, 1)),
            head=head(6),
        ),
        X,
        {"a.0": (6, 1)},
    ),
    "positional map of every channel": (
        lambda: Net(
            lambda m, x: m.head(m.a(x) + m.position),
            a=conv(3, 6),
            position=nn.Parameter(torch.rand(1, 6, 8, 8)),
            head=head(6),
        ),
        X,
        {"a.0": (6, 1)},
    ),
    "a weight for each row, whatever the channel": (
        lambda: Net(
            lambda m, x: m.head(m.a(x) * m.rows), a=conv(3, 6), rows=nn.Parameter(torch.rand(8, 1)), head=head(6)
        ),
        X,
        {"a.0": (6, 1)},
    ),
    "in place": (
        lambda: Net(lambda m, x: m.head(m.a(x).mul_(2).add_(m.b(x)).relu_()), a=conv(3, 6), b=conv(3, 6), head=head(6)),
        X,
        {"a.0": (6, 1)},
    ),
    "gated linear unit": (
        lambda: Net(lambda m, x: m.head(F.glu(m.a(x), 1)), a=conv(3, 8), head=head(4)),
        X,
        {"a.0": (4, 2)},
    ),
    "one dimension": (
        lambda: Net(
            lambda m, x: m.head(m.b(m.a(x.flatten(2))).relu()),
            a=nn.Conv1d(3, 6, 3),
            b=nn.Conv1d(6, 4, 3, groups=2),
            head=nn.Conv1d(4, 2, 1),
        ),
        X,
        {"a": (3, 2), "b": (2, 2)},
    ),
    "three dimensions": (
        lambda: Net(
            lambda m, x: m.fc(F.max_pool3d(m.n(m.a(x.unsqueeze(2).repeat(1, 1, 4, 1, 1))), 2).mean((2, 3, 4))),
            a=nn.Conv3d(3, 6, 3, padding=1),
            n=nn.BatchNorm3d(6),
            fc=nn.Linear(6, 2),
        ),
        X,
        {"a": (6, 1)},
    ),
    "linear layer on the last axis": (
        lambda: Net(
            lambda m, x: m.fc(m.b(m.a(x).permute(0, 2, 3, 1)).relu()),
            a=conv(3, 6),
            b=nn.Linear(6, 5),
            fc=nn.Linear(5, 2, bias=False),
        ),
        X,
        {"a.0": (6, 1), "b": (5, 1)},
    ),
    "softmax over positions": (
        lambda: Net(lambda m, x: m.head(m.a(x).flatten(2).softmax(2).unflatten(2, (8, 8))), a=conv(3, 6), head=head(6)),
        X,
        {"a.0": (6, 1)},
    ),
    "constant padding of channels (ResNet's option A)": (
        lambda: Net(
            lambda m, x: m.head(m.b(m.a(x)) + F.pad(m.a(x), (0, 0, 0, 0, 2, 2))),
            a=conv(3, 6),
            b=conv(6, 10),
            head=head(10),
        ),
        X,
        {"a.0": (6, 1)},
    ),
    "sum over the parts of a split (split attention)": (
        lambda: Net(
            lambda m, x: m.head(m.a(x).unflatten(1, (2, -1)).softmax(1).sum(1)), a=conv(3, 8, 1, groups=1), head=head(4)
        ),
        X,
        {"a.0": (4, 2)},
    ),
    "fresh zeros of the same shape": (
        lambda: Net(
            lambda m, x: (lambda y: m.head(torch.where(y > 0.1, y, torch.zeros_like(y))))(m.a(x)),
            a=conv(3, 6),
            head=head(6),
        ),
        X,
        {"a.0": (6, 1)},
    ),
    "zero padding before a convolution": (
        lambda: Net(lambda m, x: m.head(nn.ZeroPad2d((0, 1, 0, 1))(m.a(x))), a=conv(3, 6), head=head(6)),
        X,
        {"a.0": (6, 1)},
    ),
    "padding before a pool and a norm": (
        lambda: Net(
            lambda m, x: m.head(
                F.pad(m.n(F.pad(F.max_pool2d(F.pad(m.a(x), (1, 1, 1, 1), value=-9.0), 3), (1, 2))), (0, 1))
            ),
            a=conv(3, 6),
            n=nn.BatchNorm2d(6),
            head=head(6),
        ),
        X,
        {"a.0": (6, 1)},
    ),
    "zero padding of a part before a sum": (
        lambda: Net(
            lambda m, x: m.head(F.pad(m.a(x)[:, :, 1:], (0, 0, 1, 0)) + m.b(x)),
            a=conv(3, 6),
            b=conv(3, 6),
            head=head(6),
        ),
        X,
        {"a.0": (6, 1)},
    ),
    "circular padding": (
        lambda: Net(
            lambda m, x: m.last(m.head(m.a(x))),
            a=conv(3, 6),
            head=nn.Conv2d(6, 5, 3, padding=1, padding_mode="circular"),
            last=head(5),
        ),
        X,
        {"a.0": (6, 1), "head": (5, 1)},
    ),
    "a map copied into the middle of another": (
        lambda: Net(lambda m, x: m.head(in_the_middle(m.a(x))), a=conv(3, 6), head=head(6)),
        X,
        {"a.0": (6, 1)},
    ),
    "sum of a stack": (
        lambda: Net(
            lambda m, x: m.head(torch.stack([m.a(x), m.b(x)]).sum(0)), a=conv(3, 6), b=conv(3, 6), head=head(6)
        ),
        X,
        {"a.0": (6, 1)},
    ),
    "mean and maximum of a stack in the middle": (
        lambda: Net(
            lambda m, x: m.head(
                (lambda s: s.mean(2) + s.amax(2, keepdim=True).squeeze(2))(torch.stack([m.a(x), m.b(x)], 2))
            ),
            a=conv(3, 6),
            b=conv(3, 6),
            head=head(6),
        ),
        X,
        {"a.0": (6, 1)},
    ),
    "layer behind an input that cannot be followed": (
        lambda: Net(
            lambda m, x: m.head(m.c(m.b(m.a(x).mean((2, 3))).view(-1, 4, 3, 3))),
            a=conv(3, 6),
            b=nn.Linear(6, 36),
            c=nn.ConvTranspose2d(4, 8, 2),
            head=head(8),
        ),
        X,
        {"a.0": (6, 1), "c": (8, 1)},
    ),
    "split with sizes from the width": (
        lambda: Net(
            lambda m, x: m.head(torch.cat([y.relu() for y in quarters(m.a(x))[::-1]], 1)), a=conv(3, 16), head=head(16)
        ),
        X,
        {"a.0": (4, 4)},
    ),
    "unsafe chunk": (
        lambda: Net(lambda m, x: m.head(torch.mul(*m.a(x).unsafe_chunk(2, 1))), a=conv(3, 12), head=head(6)),
        X,
        {"a.0": (6, 2)},
    ),
    "unfold and a linear layer": (
        lambda: Net(
            lambda m, x: m.last(m.b(F.unfold(m.a(x), 3).transpose(1, 2)).relu().mean(1)),
            a=conv(3, 6),
            b=nn.Linear(54, 5),
            last=nn.Linear(5, 2),
        ),
        X,
        {"a.0": (6, 1), "b": (5, 1)},
    ),
    "fold": (
        lambda: Net(
            lambda m, x: m.head(F.fold(m.b(F.unfold(m.a(x), 2)), (8, 8), 2)),
            a=conv(3, 6),
            b=nn.Conv1d(24, 20, 1),
            head=head(5),
        ),
        X,
        {"a.0": (6, 1), "b": (5, 4)},
    ),
    "unpooling": (
        lambda: Net(
            lambda m, x: m.head(F.max_unpool2d(*F.max_pool2d(m.a(x), 2, return_indices=True), 2)),
            a=conv(3, 6),
            head=head(6),
        ),
        X,
        {"a.0": (6, 1)},
    ),
    "deformable convolution": (
        lambda: Net(
            lambda m, x: (lambda y: m.head(m.c(y, m.b(y), m.e(y).sigmoid())))(m.a(x)),
            a=conv(3, 6),
            b=nn.Conv2d(6, 2 * 2 * 9, 3, padding=1),
            e=nn.Conv2d(6, 2 * 9, 3, padding=1),
            c=DeformConv2d(6, 8, 3, padding=1),
            head=head(8),
        ),
        X,
        {"a.0": (3, 2), "c": (8, 1)},
    ),
    "einsum with a parameter": (
        lambda: Net(
            lambda m, x: m.head(torch.einsum("oc,bchw->bohw", m.v, torch.einsum("bchw,oc->bohw", m.a(x), m.w))),
            a=conv(3, 6),
            w=nn.Parameter(torch.rand(5, 6)),
            v=nn.Parameter(torch.rand(7, 5)),
            head=head(7),
        ),
        X,
        {"a.0": (6, 1), "w": (5, 1), "v": (7, 1)},
    ),
    "einsum over space": (
        lambda: Net(
            lambda m, x: m.head(torch.einsum("bchw,bwv->bchv", m.a(x), m.b(x).squeeze(1).softmax(1))),
            a=conv(3, 6),
            b=conv(3, 1),
            head=head(6),
        ),
        X,
        {"a.0": (6, 1)},
    ),
    "values of a spatial attention": (
        lambda: Net(
            lambda m, x: m.head(attended(m.q(x), m.k(x), m.a(x))),
            q=conv(3, 4),
            k=conv(3, 4),
            a=conv(3, 6),
            head=head(6),
        ),
        X,
        {"a.0": (6, 1)},
    ),
    "matrix with an axis of size 1": (
        lambda: Net(
            lambda m, x: m.last(F.conv2d(m.a(x), m.b.weight[:, :, None, None]).relu()),
            a=conv(3, 6),
            b=nn.Linear(6, 5, bias=False),
            last=head(5),
        ),
        X,
        {"a.0": (6, 1), "b": (5, 1)},
    ),
    "convolution's weight as a matrix": (
        lambda: Net(
            lambda m, x: m.last(F.linear(m.a(x).mean((2, 3)), m.b.weight.view(5, -1)).relu()),
            a=conv(3, 6),
            b=nn.Conv2d(6, 5, 1, bias=False),
            last=nn.Linear(5, 2),
        ),
        X,
        {"a.0": (6, 1)},
    ),
    "weight norm": (
        lambda: Net(
            lambda m, x: m.head(m.b(m.a(x)).relu()), a=conv(3, 6), b=weight_norm(nn.Conv2d(6, 5, 1)), head=head(5)
        ),
        X,
        {"b.parametrizations.weight": (5, 1)},
    ),
    "fixed depthwise filter (blur pooling)": (
        lambda: Net(
            lambda m, x: m.head(F.conv2d(m.a(x), m.blur.filter, stride=2, groups=m.blur.filter.shape[0])),
            a=conv(3, 6),
            blur=Fixed(6, 1, 3, 3),
            head=head(6),
        ),
        X,
        {"a.0": (6, 1)},
    ),
    "fixed filter that mixes channels": (
        lambda: Net(
            lambda m, x: m.head(F.conv2d(m.a(x), m.mix.filter)), a=conv(3, 6), mix=Fixed(5, 6, 1, 1), head=head(5)
        ),
        X,
        {"a.0": (6, 1), "mix": (5, 1)},
    ),
    "fixed matrix": (
        lambda: Net(
            lambda m, x: m.last(F.linear(m.a(x).mean((2, 3)), m.mix.filter)),
            a=conv(3, 6),
            mix=Fixed(5, 6),
            last=nn.Linear(5, 2),
        ),
        X,
        {"a.0": (6, 1), "mix": (5, 1)},
    ),
    "cast weights (autocast inside)": (
        lambda: Net(
            lambda m, x: F.conv2d(m.a(x).bfloat16(), m.head.weight.bfloat16()).float(), a=conv(3, 6), head=head(6)
        ),
        X,
        {"a.0": (6, 1)},
    ),
}


def prunable(graph: slim.ChannelGraph) -> dict[str, tuple[int, int]]:
    return {g.name: (g.size, g.per_channel) for g in graph.groups if g.prunable}


@pytest.mark.parametrize("name", CASES)
def test_groups_and_a_proven_cut(name: str) -> None:
    build, x, expected = CASES[name]
    torch.manual_seed(0)
    model = randomise(build())
    assert prunable(slim.trace(model, x)) == expected
    assert prunable(slim.trace(model, x[:1])) == expected
    _, plan = prove(model, x)
    assert any(len(g.keep) < g.size for g in plan.groups)
    cut = slim.apply_plan(model, plan)
    cost = slim.cost(cut, x)
    assert (cost.macs, cost.params) == (plan.macs[1], plan.params[1])
    assert slim.trace(cut, x).report()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("order", ["bcn,oc->bon", "oc,bcn->bon"])
def test_products_of_a_parameter_count_down_to_one_channel(order: str, width: int, batch: int) -> None:
    """Of one channel the matrix is a vector to torch, and its view one without axes of its own."""

    def forward(m: Net, x: Tensor) -> Tensor:
        factors = (x.flatten(2), m.w) if order.startswith("b") else (m.w, x.flatten(2))
        return m.head(torch.einsum(order, *factors).unflatten(2, x.shape[2:]))  # type: ignore[no-any-return]

    model = Net(forward, w=nn.Parameter(torch.rand(width, 3)), head=head(width))
    x = torch.rand(batch, 3, 8, 8)
    expected = 64 * (3 * width + model.head.weight.numel())
    assert slim.cost(model, x).macs == slim.trace(model, x).macs == expected
