"""Random small networks out of every operator that slim knows: a recipe is a list of steps, and plain data."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torchvision.ops import DeformConv2d

MOST_CHANNELS = 24
"""Wider values are narrowed by a 1 x 1 convolution before a step takes them."""
MOST_POSITIONS = 8
"""Of one axis: no step enlarges maps beyond; none shrinks them to a single one, of which norms make nothing."""
MOST_STEPS = 10

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVERAGE_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
ADAPTIVE_POOL = {
    "average": {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d},
    "maximum": {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d},
}
SMOOTH = {1: "linear", 2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True)
class Step:
    """One operator; ``source`` and ``other`` count back from the latest value, ``variant`` encodes its further choices."""

    op: str
    source: int = 0
    other: int = 0
    width: int = 4
    variant: int = 0


@dataclass(frozen=True)
class Recipe:
    """A network: ``dims`` axes of positions, the inputs' channels, the steps, how loose ends leave it, and the weights."""

    dims: int
    inputs: tuple[int, ...]
    steps: tuple[Step, ...]
    heads: int = 0
    seed: int = 0

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(plain: Mapping[str, Any]) -> Recipe:
        steps = tuple(Step(**step) for step in plain["steps"])
        return Recipe(plain["dims"], tuple(plain["inputs"]), steps, plain["heads"], plain["seed"])


class Part(nn.Module):
    """Named modules, parameters, buffers and numbers, and a forward given as a function of itself and its inputs."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *values: Tensor) -> Any:
        return self.run(self, *values)


class Network(nn.Module):
    """Parts in order; each takes some of the values so far and adds one or several; ``overwrites`` counts those that write
    into what they take."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        self.sources: list[tuple[int, ...]] = []
        self.results: list[int] = []
        self.style = 0
        self.overwrites = 0

    def forward(self, *inputs: Tensor) -> Any:
        # In-place parts must not write into the caller's tensors.
        values = [tensor.clone() for tensor in inputs]
        for part, sources in zip(self.parts, self.sources, strict=True):
            values += as_list(part(*[values[n] for n in sources]))
        outputs = [values[n] for n in self.results]
        if self.style == 1:
            return {"first": outputs[0], "rest": outputs[1:]}
        if self.style == 2:
            return [tuple(outputs), {"count": len(outputs)}]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def as_list(found: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


class Choices:
    """What a step's builder may ask for: its width, the number of position axes, and choices out of its variant."""

    def __init__(self, dims: int, width: int, variant: int) -> None:
        self.dims, self.width, self.variant = dims, width, variant

    def of(self, *options: Any) -> Any:
        """One of the options; the first for variant 0."""
        self.variant, chosen = divmod(self.variant, len(options))
        return options[chosen]

    def conv(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, **options: Any) -> nn.Module:
        return CONV[self.dims](inputs, outputs, kernel, stride, kernel // 2, **options)

    def block(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, **options: Any) -> nn.Sequential:
        """A convolution, a norm and an activation."""
        conv = self.conv(inputs, outputs, kernel, stride, **options)
        return nn.Sequential(conv, self.norm(outputs), self.activation(outputs))

    def norm(self, channels: int) -> nn.Module:
        return NORMS[self.of(*NORMS)](self, channels)

    def activation(self, channels: int) -> nn.Module:
        return ACTIVATIONS[self.of(*ACTIVATIONS)](channels)

    def multiple(self, of: int) -> int:
        """The step's width, rounded up to a multiple."""
        return -(-self.width // of) * of


ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "silu": lambda c: nn.SiLU(),
    "relu": lambda c: nn.ReLU(),
    "prelu": lambda c: nn.PReLU(c),
    "silu in place": lambda c: nn.SiLU(inplace=True),
    "leaky in place": lambda c: nn.LeakyReLU(0.2, inplace=True),
    "identity": lambda c: nn.Identity(),
    "one prelu": lambda c: nn.PReLU(),
    "hardswish": lambda c: nn.Hardswish(),
    "gelu": lambda c: nn.GELU(),
    "tanh": lambda c: nn.Tanh(),
    "elu in place": lambda c: nn.ELU(inplace=True),
    "mish": lambda c: nn.Mish(),
}


def group_count(choices: Choices, channels: int) -> int:
    """A divisor of the channels."""
    return choices.of(*[n for n in range(1, channels + 1) if channels % n == 0][::-1])


def without_bias(norm: nn.Module) -> nn.Module:
    norm.register_parameter("bias", None)
    return norm


NORMS: dict[str, Callable[[Choices, int], nn.Module]] = {
    "batch": lambda k, c: BATCH_NORM[k.dims](c),
    "none": lambda k, c: nn.Identity(),
    "group": lambda k, c: nn.GroupNorm(group_count(k, c), c, affine=k.of(True, False)),
    "instance": lambda k, c: INSTANCE_NORM[k.dims](c, affine=k.of(True, False), track_running_stats=k.of(False, True)),
    "plain batch": lambda k, c: BATCH_NORM[k.dims](c, affine=False),
    "batch without shift": lambda k, c: without_bias(BATCH_NORM[k.dims](c)),
    "untracked batch": lambda k, c: BATCH_NORM[k.dims](c, affine=k.of(True, False), track_running_stats=False),
}

Builder = Callable[..., Part]
OPS: dict[str, tuple[str, Builder]] = {}
"""By name: the kinds of values that it takes (m: a map, v: a vector of each image), and what builds it."""


def op(name: str, takes: str = "m") -> Callable[[Builder], Builder]:
    def enter(builder: Builder) -> Builder:
        OPS[name] = takes, builder
        return builder

    return enter


def positions(x: Tensor) -> list[int]:
    """The axes behind the channels."""
    return list(range(2, x.ndim))


def fitted(x: Tensor, like: Tensor) -> Tensor:
    """Brought to the other's size."""
    return x if x.shape[2:] == like.shape[2:] else F.interpolate(x, like.shape[2:])


def column(v: Tensor, like: Tensor) -> Tensor:
    """[N, C] to [N, C, 1, ...]."""
    return v.reshape(*v.shape, *[1] * (like.ndim - 2))


# -- convolutions ---------------------------------------------------------------------------------------------------


@op("conv")
def convolution(k: Choices, x: Tensor) -> Part:
    stride = k.of(1, 2) if min(x.shape[2:]) >= 4 else 1
    kernel = k.of(3, 1)
    mode = k.of("zeros", "reflect", "circular", "replicate") if kernel == 3 and min(x.shape[2:]) > 1 else "zeros"
    bias = k.of(True, False)
    return Part(lambda m, x: m.b(x), b=k.block(x.shape[1], k.width, kernel, stride, padding_mode=mode, bias=bias))


@op("grouped conv")
def grouped(k: Choices, x: Tensor) -> Part:
    groups = k.of(2, 3, 4)
    inner = k.multiple(groups)
    outer = inner * k.of(1, 2)
    return Part(
        lambda m, x: m.b(m.a(x)), a=k.block(x.shape[1], inner), b=k.block(inner, outer, k.of(3, 1), groups=groups)
    )


@op("grouped conv as it comes")
def grouped_bare(k: Choices, x: Tensor) -> Part:
    groups = group_count(k, x.shape[1])
    return Part(lambda m, x: m.b(x), b=k.block(x.shape[1], groups * k.of(2, 1, 3), k.of(3, 1), groups=groups))


@op("depthwise conv")
def depthwise(k: Choices, x: Tensor) -> Part:
    c = x.shape[1]
    return Part(lambda m, x: m.b(x), b=k.block(c, c * k.of(1, 2, 3), 3, groups=c))


@op("transposed conv")
def transposed(k: Choices, x: Tensor) -> Part:
    stride = 2 if max(x.shape[2:]) * 2 <= MOST_POSITIONS else 1
    c, kind = x.shape[1], k.of("plain", "grouped", "depthwise")
    groups = {"plain": 1, "grouped": group_count(k, c) if kind == "grouped" else 1, "depthwise": c}[kind]
    out = {"plain": k.width, "grouped": groups * k.of(1, 2), "depthwise": c * k.of(1, 2)}[kind]
    layer = TRANSPOSED[k.dims](c, out, stride, stride, groups=groups, bias=k.of(True, False))
    return Part(lambda m, x: m.b(x), b=nn.Sequential(layer, k.norm(out), k.activation(out)))


@op("twice")
def twice(k: Choices, x: Tensor) -> Part:
    """One layer, called twice in a row."""
    return Part(lambda m, x: m.b(m.b(m.a(x))), a=k.block(x.shape[1], k.width), b=k.block(k.width, k.width, k.of(3, 1)))


@op("shared head", "mm")
def shared(k: Choices, x: Tensor, y: Tensor) -> Part:
    """One layer on two maps, as in RetinaNet."""
    return Part(
        lambda m, x, y: (m.c(m.a(x)), m.c(m.b(y))),
        a=k.block(x.shape[1], k.width),
        b=k.block(y.shape[1], k.width),
        c=k.block(k.width, k.width, k.of(3, 1)),
    )


@op("tied weights")
def tied(k: Choices, x: Tensor) -> Part:
    """Two layers with one weight."""
    first, second = k.conv(k.width, k.width, 3), k.conv(k.width, k.width, 3, bias=False)
    second.weight = first.weight
    return Part(
        lambda m, x: m.c(m.second(m.b(m.first(m.a(x))))),
        a=k.block(x.shape[1], k.width),
        first=first,
        b=k.activation(k.width),
        second=second,
        c=k.activation(k.width),
    )


@op("computed weight")
def computed_weight(k: Choices, x: Tensor) -> Part:
    """Weight standardisation: nothing that is read so can be cut."""

    def run(m: Part, x: Tensor) -> Tensor:
        weight = m.b.weight - m.b.weight.mean((1, *positions(m.b.weight)), keepdim=True)
        return m.c(m.b._conv_forward(m.a(x), weight, m.b.bias))

    return Part(run, a=k.block(x.shape[1], k.width), b=k.conv(k.width, k.width, 3), c=k.activation(k.width))


# -- norms, activations, bare parameters ------------------------------------------------------------------------------


@op("norm")
def norm(k: Choices, x: Tensor) -> Part:
    return Part(lambda m, x: m.n(x), n=k.norm(x.shape[1]))


@op("functional norm")
def functional_norm(k: Choices, x: Tensor) -> Part:
    """Norms that no module holds; the group count is a constant."""
    c, kind = x.shape[1], k.of("instance", "group", "batch")
    if kind == "instance":
        return Part(lambda m, x: F.instance_norm(x))
    if kind == "group":
        groups = group_count(k, c)
        return Part(lambda m, x: F.group_norm(x, groups, m.w), w=nn.Parameter(torch.ones(c)))
    return Part(lambda m, x: F.batch_norm(x, m.mean, m.var), mean=torch.rand(c), var=torch.rand(c) + 0.5)


@op("layer norm over positions")
def position_norm(k: Choices, x: Tensor) -> Part:
    if k.of(True, False):
        return Part(lambda m, x: m.n(x), n=nn.LayerNorm(x.shape[2:], elementwise_affine=k.of(True, False)))
    return Part(lambda m, x: F.layer_norm(x, x.shape[2:]))


@op("layer norm over channels")
def channel_norm(k: Choices, x: Tensor) -> Part:
    return Part(lambda m, x: m.n(x.movedim(1, -1)).movedim(-1, 1), n=nn.LayerNorm(x.shape[1]))


@op("activation")
def activation(k: Choices, x: Tensor) -> Part:
    return Part(lambda m, x: m.f(x), f=k.activation(x.shape[1]))


@op("in place")
def in_place(k: Choices, x: Tensor) -> Part:
    """On a value that others may read too."""
    return Part(k.of(lambda m, x: x.mul_(1.5).add_(0.25), lambda m, x: F.leaky_relu_(x, 0.3), lambda m, x: x.tanh_()))


@op("layer scale")
def layer_scale(k: Choices, x: Tensor) -> Part:
    c, ones = x.shape[1], [1] * k.dims
    return Part(
        lambda m, x: x + m.scale * m.b(x) + m.shift,
        b=k.block(c, c, k.of(1, 3)),
        scale=nn.Parameter(torch.rand(c, *ones)),
        shift=nn.Parameter(torch.rand(1, c, *ones)),
    )


@op("buffer")
def buffer(k: Choices, x: Tensor) -> Part:
    return Part(lambda m, x: x * m.factors, factors=torch.rand(x.shape[1], *[1] * k.dims) + 0.5)


@op("positional map")
def positional_map(k: Choices, x: Tensor) -> Part:
    kind = k.of("of every channel", "without batch axis", "of positions alone", "of rows")
    shapes = {
        "of every channel": (1, *x.shape[1:]),
        "without batch axis": x.shape[1:],
        "of positions alone": x.shape[2:],
        "of rows": (x.shape[2], *[1] * (k.dims - 1)),
    }
    return Part(lambda m, x: x + m.position, position=nn.Parameter(torch.rand(shapes[kind])))


# -- sums, concatenations, parts ----------------------------------------------------------------------------------------


@op("residual")
def residual(k: Choices, x: Tensor) -> Part:
    c = x.shape[1]
    blocks = nn.Sequential(k.block(c, k.width), k.block(k.width, c, k.of(3, 1)))
    return Part(k.of(lambda m, x: x + m.b(x), lambda m, x: m.b(x).add_(x), lambda m, x: x.add_(m.b(x))), b=blocks)


@op("bare weights")
def bare_weights(k: Choices, x: Tensor) -> Part:
    """Layers whose weights no module of torch holds."""
    c, ones = x.shape[1], [1] * k.dims
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[k.dims]
    back = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[k.dims]
    shape = {"conv": (k.width, c, *ones), "autoencoder": (k.width, c, *ones), "matmul": (c, k.width)}
    kind = k.of(*shape)
    runs = {
        "conv": lambda m, x: m.f(conv(x, m.w)),
        "autoencoder": lambda m, x: back(m.f(conv(x, m.w)), m.w),
        "matmul": lambda m, x: m.f((x.movedim(1, -1) @ m.w).movedim(-1, 1)),
    }
    w = nn.Parameter(torch.randn(shape[kind]) / c**0.5)
    return Part(runs[kind], w=w, f=k.activation(k.width))


@op("sum", "mm")
def add(k: Choices, x: Tensor, y: Tensor) -> Part:
    run = k.of(
        lambda m, x, y: x + m.a(fitted(y, x)),
        lambda m, x, y: torch.maximum(x, m.a(fitted(y, x))),
        lambda m, x, y: x * m.a(fitted(y, x)).sigmoid(),
        lambda m, x, y: torch.where(x > 0, x, m.a(fitted(y, x))),
        lambda m, x, y: torch.lerp(x, m.a(fitted(y, x)), 0.3),
        lambda m, x, y: torch.stack([x, m.a(fitted(y, x))]).sum(0),
    )
    same = x.shape[1] == y.shape[1]
    return Part(run, a=k.of(nn.Identity(), k.conv(y.shape[1], x.shape[1])) if same else k.conv(y.shape[1], x.shape[1]))


@op("concatenation", "mm")
def concatenation(k: Choices, x: Tensor, y: Tensor) -> Part:
    return Part(lambda m, x, y: torch.cat([x, fitted(y, x)], 1))


@op("dense")
def dense(k: Choices, x: Tensor) -> Part:
    c = x.shape[1]

    def run(m: Part, x: Tensor) -> Tensor:
        y = torch.cat([x, m.a(x)], 1)
        return torch.cat([y, m.b(y)], 1)

    return Part(run, a=k.block(c, k.width), b=k.block(c + k.width, k.width, 3))


@op("concatenation inside a sum", "mm")
def cat_in_sum(k: Choices, x: Tensor, y: Tensor) -> Part:
    total = x.shape[1] + y.shape[1]
    return Part(lambda m, x, y: torch.cat([x, fitted(y, x)], 1) + m.c(x), c=k.block(x.shape[1], total))


@op("constant channel padding", "mm")
def channel_padding(k: Choices, x: Tensor, y: Tensor) -> Part:
    """ResNet's option A."""
    more, value = k.of(2, 3), k.of(0.0, 0.5)
    pads = [0, 0] * k.dims + [more, k.of(0, more)]
    total = x.shape[1] + sum(pads)
    return Part(lambda m, x, y: F.pad(x, pads, value=value) + m.b(fitted(y, x)), b=k.block(y.shape[1], total))


@op("split, one part goes on (C2f)")
def c2f(k: Choices, x: Tensor) -> Part:
    half = k.multiple(2) // 2
    parts = k.of(lambda y: y.chunk(2, 1), lambda y: y.split(y.shape[1] // 2, 1))

    def run(m: Part, x: Tensor) -> Tensor:
        first, second = parts(m.a(x))
        return torch.cat([first, second, second + m.b(second)], 1)

    return Part(run, a=k.block(x.shape[1], 2 * half), b=k.block(half, half, 3))


@op("parts")
def parts(k: Choices, x: Tensor) -> Part:
    """Equal parts of the channels as values of their own."""
    c, count = x.shape[1], k.of(2, 3)
    a = nn.Identity() if c % count == 0 else k.block(c, k.multiple(count))
    return Part(k.of(lambda m, x: m.a(x).chunk(count, 1), lambda m, x: m.a(x).unflatten(1, (count, -1)).unbind(1)), a=a)


@op("slices by computed counts")
def slices(k: Choices, x: Tensor) -> Part:
    c = k.multiple(2)
    return Part(
        k.of(
            lambda m, x: (lambda y: y[:, : y.shape[1] // 2] * y[:, y.shape[1] // 2 :])(m.a(x)),
            lambda m, x: (lambda y: y[:, ::2] + y[:, 1::2])(m.a(x)),
        ),
        a=k.block(x.shape[1], c),
    )


@op("slices by constants")
def constant_slices(k: Choices, x: Tensor) -> Part:
    """Counts of channels that do not follow a cut."""
    c, first = k.width + 2, k.of(1, k.width // 2 + 1)
    run = k.of(
        lambda m, x: (lambda y: torch.cat([m.b(y[:, :first]), y[:, first:]], 1))(m.a(x)),
        lambda m, x: (lambda y: torch.cat([m.b(y[:, -first:]), y[:, :-first]], 1))(m.a(x)),
        lambda m, x: (lambda y: torch.cat([m.b(y[:, :first]), y], 1))(m.a(x)),
        lambda m, x: (lambda y: torch.cat([m.b(y.narrow(1, c - first, first)), y], 1))(m.a(x)),
    )
    return Part(run, a=k.block(x.shape[1], c), b=k.block(first, first))


@op("parts of computed sizes that go separate ways")
def loose_parts(k: Choices, x: Tensor) -> Part:
    c = 2 * k.width + k.of(0, 1)
    first, second = c // 2, c - c // 2

    def by_chunk(y: Tensor) -> tuple[Tensor, ...]:
        return y.chunk(2, 1)[::-1]

    halves: Callable[[Tensor], tuple[Tensor, ...]] = k.of(
        lambda y: (y[:, : y.shape[1] // 2], y[:, y.shape[1] // 2 :]),
        lambda y: y.split([y.shape[1] // 2, y.shape[1] - y.shape[1] // 2], 1),
        lambda y: y.tensor_split([y.shape[1] // 2], 1),
        lambda y: (y[:, 1::2], y[:, ::2]),
        by_chunk,
    )
    run = k.of(
        lambda m, x: (lambda y: torch.cat([m.b(y[0]), m.c(y[1])], 1))(halves(m.a(x))),
        lambda m, x: (lambda y: torch.cat([y[0], m.c(y[1])], 1))(halves(m.a(x))),
        lambda m, x: halves(m.a(x)),
        lambda m, x: halves(m.a(x))[0],
    )
    return Part(run, a=k.block(x.shape[1], c), b=k.block(first, first), c=k.block(second, second))


@op("a part treated alone")
def part_alone(k: Choices, x: Tensor) -> Part:
    """By an operator without weights."""
    count = k.of(1, 2)

    def in_place(m: Part, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, :count] *= 2
        return y

    def every_other(m: Part, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, ::2] += 1
        return y

    return Part(
        k.of(
            lambda m, x: torch.cat([x[:, : x.shape[1] // 2].tanh(), x[:, x.shape[1] // 2 :]], 1),
            lambda m, x: torch.cat([x[:, :count].tanh(), x[:, count:]], 1),
            lambda m, x: torch.cat([F.instance_norm(x[:, :count]), x[:, count:]], 1),
            lambda m, x: torch.roll(x, x.shape[1] // 2, 1),
            in_place,
            every_other,
        )
    )


@op("channel count as a number")
def count_as_number(k: Choices, x: Tensor) -> Part:
    return Part(lambda m, x: x / x.shape[1] ** 0.5)


@op("written in place")
def written(k: Choices, x: Tensor) -> Part:
    """Piece by piece, along the positions and by halves of the channels that swap."""

    def border(m: Part, x: Tensor) -> Tensor:
        y = x.clone()
        y[..., 0] = 0.5
        return y

    def swap(m: Part, x: Tensor) -> Tensor:
        y = m.a(x)
        z, half = torch.empty_like(y), y.shape[1] // 2
        z[:, :half] = y[:, half:]
        z[:, half:] = y[:, :half]
        return z

    def frame(m: Part, x: Tensor) -> Tensor:
        y = torch.zeros_like(x).repeat(1, 2, *[1] * (x.ndim - 2))
        y[:, : x.shape[1]] = x
        return y

    return Part(k.of(border, swap, frame), a=k.block(x.shape[1], k.multiple(2)))


@op("coordinates")
def coordinates(k: Choices, x: Tensor) -> Part:
    """CoordConv: channels of constants beside the others."""

    def run(m: Part, x: Tensor) -> Tensor:
        ramp = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype).expand(x.shape[0], 2, *x.shape[2:])
        return torch.cat([x, ramp], 1)

    return Part(run)


@op("maxout")
def maxout(k: Choices, x: Tensor) -> Part:
    """The largest of the parts' channels at the same place."""
    return Part(lambda m, x: m.a(x).unflatten(1, (2, -1)).amax(1), a=k.block(x.shape[1], k.multiple(2)))


@op("stack that is summed")
def stacked(k: Choices, x: Tensor) -> Part:
    """Maps beside each other along a new axis, and a summary over it."""
    axis = k.of(0, 1, 2, -1)
    summary = k.of(torch.sum, torch.mean, torch.amax, torch.amin)
    parts = {"a": k.block(x.shape[1], k.width), "b": k.block(x.shape[1], k.width, 3)}
    return Part(lambda m, x: summary(torch.stack([m.a(x), m.b(x)], axis), dim=axis), **parts)


@op("focus")
def focus(k: Choices, x: Tensor) -> Part:
    def run(m: Part, x: Tensor) -> Tensor:
        if x.shape[-1] % 2 or x.shape[-1] < 4:
            x = F.interpolate(x, [2 * n for n in x.shape[2:]])
        return torch.cat([x[..., ::2], x[..., 1::2]], 1)

    return Part(run)


@op("pixel shuffle")
def pixel_shuffle(k: Choices, x: Tensor) -> Part:
    """Of two dimensions, and the same by views: along one axis."""
    if k.dims == 2 and max(x.shape[2:]) * 2 <= MOST_POSITIONS:
        return Part(lambda m, x: F.pixel_shuffle(m.a(x), 2), a=k.block(x.shape[1], k.multiple(4)))
    r = k.of(2, 4)
    run = k.of(
        lambda m, x: m.a(x).unflatten(1, (-1, r)).movedim(2, -1).flatten(-2),
        lambda m, x: (lambda y: y.unflatten(1, (y.shape[1] // r, r)).movedim(2, -1).flatten(-2))(m.a(x)),
        lambda m, x: m.a(x).unflatten(1, (r, -1)).movedim(1, -1).flatten(-2),
    )
    return Part(run, a=k.block(x.shape[1], k.multiple(r)))


@op("pixel unshuffle")
def pixel_unshuffle(k: Choices, x: Tensor) -> Part:
    if k.dims == 2 and all(n % 2 == 0 and n >= 4 for n in x.shape[2:]):
        return Part(lambda m, x: F.pixel_unshuffle(x, 2))
    if x.shape[-1] % 2 or x.shape[-1] < 4:
        return Part(lambda m, x: torch.cat([x, x.flip(-1)], 1))
    return Part(lambda m, x: x.unflatten(-1, (-1, 2)).movedim(-1, 2).flatten(1, 2))


@op("channel shuffle")
def channel_shuffle(k: Choices, x: Tensor) -> Part:
    groups, module = k.of(2, 3), k.of(True, False)
    c = k.multiple(groups)
    if module:
        blocks = nn.Sequential(k.block(x.shape[1], c), k.block(c, c, groups=groups))
        return Part(lambda m, x: m.s(m.a(x)), a=blocks, s=nn.ChannelShuffle(groups))

    def run(m: Part, x: Tensor) -> Tensor:
        y = m.a(x)
        n, c, *sizes = y.shape
        return y.view(n, groups, c // groups, *sizes).transpose(1, 2).reshape(n, -1, *sizes)

    return Part(run, a=k.block(x.shape[1], c))


@op("channel shuffle alone")
def bare_shuffle(k: Choices, x: Tensor) -> Part:
    """Without grouped convolutions around it."""
    groups, module = k.of(2, 3), k.of(True, False)
    shuffle = nn.ChannelShuffle(groups) if module else Part(lambda m, y: transposed_view(y, (-1, groups)))
    return Part(lambda m, x: m.s(m.a(x)), a=k.block(x.shape[1], k.multiple(groups)), s=shuffle)


def transposed_view(y: Tensor, parts: tuple[int, int]) -> Tensor:
    return y.unflatten(1, parts).transpose(1, 2).flatten(1, 2)


@op("rearranged channels")
def rearranged(k: Choices, x: Tensor) -> Part:
    n = k.of(1, 2, 3)
    return Part(
        k.of(
            lambda m, x: x.flip(1),
            lambda m, x: x.repeat(1, 2, *[1] * (x.ndim - 2)),
            lambda m, x: x.repeat_interleave(2, 1),
            lambda m, x: torch.stack([x, x.tanh()], 2).flatten(1, 2),
            lambda m, x: torch.roll(x, n, 1),
        )
    )


@op("split by the width")
def split_by_width(k: Choices, x: Tensor) -> Part:
    """Into a half or a third and the rest, with sizes computed from the number of channels."""
    parts = k.of(2, 3)
    cut = k.of(torch.split, torch.unsafe_split, lambda x, sizes, axis: [x[:, : sizes[0]], x[:, sizes[0] :]])

    def run(m: Part, x: Tensor) -> Tensor:
        y = m.a(x)
        first = y.shape[1] // parts
        sizes = first if cut is torch.unsafe_split else [first, y.shape[1] - first]
        return torch.cat([z.tanh() if n else z for n, z in enumerate(cut(y, sizes, 1))][::-1], 1)

    return Part(run, a=k.block(x.shape[1], k.multiple(parts)))


@op("count in an attribute")
def counted(k: Choices, x: Tensor) -> Part:
    """Parts whose widths are numbers that the module holds."""
    first, rest = k.of(2, 3, 4), k.of(2, 4, 5)
    run = k.of(
        lambda m, x: torch.cat([y.tanh() if n else y for n, y in enumerate(m.a(x).split(m.sizes, 1))][::-1], 1),
        lambda m, x: torch.cat([(y := m.a(x))[:, m.first :], y[:, : m.first].tanh()], 1),
        lambda m, x: (y := m.a(x))[:, : m.first].mean(1, keepdim=True) + y[:, m.first :],
    )
    return Part(run, a=k.block(x.shape[1], first + rest), first=first, sizes=[first, rest])


@op("border")
def border(k: Choices, x: Tensor) -> Part:
    """Put around a map before what reads it."""
    value, wide = k.of(0.0, -1.0, 0.5), [n for _ in range(k.dims) for n in (1, 0)]
    padded = k.of(
        lambda x: F.pad(x, wide, value=value),
        lambda x: F.pad(x, wide, mode="circular"),
        lambda x: F.pad(x, wide, mode="reflect" if k.dims > 1 else "replicate"),
        lambda x: larger(x, wide),
    )
    reader = k.of(k.conv(x.shape[1], k.width, 2), BATCH_NORM[k.dims](x.shape[1]), nn.SiLU())
    return Part(lambda m, x: m.a(padded(x))[(..., *[slice(n) for n in x.shape[2:]])], a=reader)


def larger(x: Tensor, wide: list[int]) -> Tensor:
    """The map copied into a larger one of zeros."""
    out = x.new_zeros(*x.shape[:2], *[n + 1 for n in x.shape[2:]])
    out[(..., *[slice(1, None)] * (x.ndim - 2))] = x
    return out


@op("columns")
def columns(k: Choices, x: Tensor) -> Part:
    """Windows as columns, read by a matrix, and put together again; of two dimensions."""
    if k.dims != 2 or min(x.shape[2:]) < 4:
        return Part(lambda m, x: m.a(x.unfold(-1, 2, 1)[..., 0]), a=k.block(x.shape[1], k.width))
    size = k.of(2, 3)
    if k.of(True, False):
        layer = nn.Conv1d(x.shape[1] * size * size, k.width, 1)
        return Part(
            lambda m, x: m.a(F.unfold(x, size, padding=1)).mean(-1)[..., None, None].repeat(1, 1, 4, 4), a=layer
        )
    layer = nn.Conv1d(x.shape[1] * size * size, k.width * size * size, 1)
    return Part(lambda m, x: F.fold(m.a(F.unfold(x, size)), x.shape[2:], size), a=layer)


@op("unpooling")
def unpooling(k: Choices, x: Tensor) -> Part:
    if k.dims == 1 or any(n % 2 or n < 4 for n in x.shape[2:]):
        return Part(lambda m, x: m.a(x), a=k.block(x.shape[1], k.width))
    pool, back = (F.max_pool2d, F.max_unpool2d) if k.dims == 2 else (F.max_pool3d, F.max_unpool3d)
    return Part(lambda m, x: back(*pool(m.a(x), 2, return_indices=True), 2), a=k.block(x.shape[1], k.width))


@op("deformable convolution")
def deformable(k: Choices, x: Tensor) -> Part:
    if k.dims != 2:
        return Part(lambda m, x: m.a(x), a=k.block(x.shape[1], k.width))
    c = k.multiple(2)
    return Part(
        lambda m, x: (lambda y: m.c(y, 0.1 * m.o(y)))(m.a(x)),
        a=k.block(x.shape[1], c),
        o=nn.Conv2d(c, 18 * k.of(1, 2), 3, padding=1),
        c=DeformConv2d(c, k.width, 3, padding=1),
    )


@op("fixed filter")
def fixed_filter(k: Choices, x: Tensor) -> Part:
    """A buffer in place of a weight: one filter for each channel, or one that mixes them."""
    c, apply = x.shape[1], {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[k.dims]
    if k.of(True, False):
        filters = torch.rand(c, 1, *[3] * k.dims) + 0.1
        return Part(lambda m, x: apply(x, m.filters, padding=1, groups=x.shape[1]), filters=filters)
    filters = torch.rand(k.width, c, *[1] * k.dims)
    return Part(lambda m, x: apply(x, m.filters), filters=filters)


@op("parametrised convolution")
def parametrised(k: Choices, x: Tensor) -> Part:
    layer = k.of(weight_norm, spectral_norm)(k.conv(x.shape[1], k.width, 3))
    return Part(lambda m, x: m.b(m.a(x)), a=layer, b=k.block(k.width, k.width))


@op("product with a parameter")
def parameter_product(k: Choices, x: Tensor) -> Part:
    """A linear layer in other words."""
    matrix = nn.Parameter(torch.randn(k.width, x.shape[1]) / x.shape[1] ** 0.5)
    return Part(
        k.of(
            lambda m, x: torch.einsum("bcn,oc->bon", x.flatten(2), m.matrix).unflatten(2, x.shape[2:]),
            lambda m, x: torch.einsum("oc,bcn->bon", m.matrix, x.flatten(2)).unflatten(2, x.shape[2:]),
            lambda m, x: (m.matrix @ x.flatten(2)).unflatten(2, x.shape[2:]),
            lambda m, x: (x.flatten(2).transpose(1, 2) @ m.matrix.t()).transpose(1, 2).unflatten(2, x.shape[2:]),
        ),
        matrix=matrix,
    )


@op("product over positions")
def position_product(k: Choices, x: Tensor) -> Part:
    """Places are mixed, channels are not: by a fixed matrix, by a map of weights, by how alike two places are."""
    n = prod(x.shape[2:])
    if k.of(True, False):
        return Part(lambda m, x: (x.flatten(2) @ m.places).unflatten(2, x.shape[2:]), places=torch.rand(n, n) / n)

    def run(m: Part, x: Tensor) -> Tensor:
        query, key = m.q(x).flatten(2), m.k(x).flatten(2)
        weights = (8 * query.transpose(1, 2) @ key).softmax(-1)
        return (m.v(x).flatten(2) @ weights.transpose(1, 2)).unflatten(2, x.shape[2:])

    c = x.shape[1]
    return Part(run, q=k.conv(c, 2), k=k.conv(c, 2), v=k.conv(c, k.width))


@op("rearranged positions")
def rearranged_positions(k: Choices, x: Tensor) -> Part:
    return Part(
        k.of(
            lambda m, x: x.flip(-1),
            lambda m, x: torch.roll(x, 1, -1),
            lambda m, x: x.transpose(2, -1),
            lambda m, x: F.pad(x, (1, 0), value=0.5),
            lambda m, x: x[..., : x.shape[-1] // 2 + 1],
            lambda m, x: x.cumsum(-1),
            lambda m, x: x.sort(-1).values,
        )
    )


@op("gated linear unit")
def gated_linear_unit(k: Choices, x: Tensor) -> Part:
    return Part(lambda m, x: F.glu(m.a(x), 1), a=k.block(x.shape[1], k.multiple(2)))


# -- factors out of the maps --------------------------------------------------------------------------------------------


@op("squeeze and excitation")
def squeeze_excite(k: Choices, x: Tensor) -> Part:
    c = x.shape[1]
    if k.of(True, False):
        return Part(
            lambda m, x: x * m.e(m.f(m.s(x.mean(positions(x), keepdim=True)))).sigmoid(),
            s=k.conv(c, k.width),
            f=k.activation(k.width),
            e=k.conv(k.width, c),
        )
    return Part(
        lambda m, x: x * column(m.e(m.f(m.s(x.mean(positions(x))))).sigmoid(), x),
        s=nn.Linear(c, k.width),
        f=k.activation(k.width),
        e=nn.Linear(k.width, c),
    )


@op("spatial attention")
def spatial_attention(k: Choices, x: Tensor) -> Part:
    """A single map of factors for all channels, made by a layer or out of the channels' mean."""
    if k.of(True, False):
        return Part(lambda m, x: x * m.b(x).sigmoid(), b=k.conv(x.shape[1], 1, 3))
    return Part(lambda m, x: x * m.b(x.mean(1, keepdim=True)).sigmoid(), b=k.conv(1, 1, 3))


@op("modulation", "mv")
def modulation(k: Choices, x: Tensor, v: Tensor) -> Part:
    """Factors for each channel out of a vector."""
    return Part(lambda m, x, v: x * column(m.fc(v).tanh() + 1, x), fc=nn.Linear(v.shape[1], x.shape[1]))


@op("softmax over positions")
def position_softmax(k: Choices, x: Tensor) -> Part:
    return Part(lambda m, x: x.flatten(2).softmax(2).reshape(x.shape) * prod(x.shape[2:]))


@op("softmax over channels")
def channel_softmax(k: Choices, x: Tensor) -> Part:
    return Part(lambda m, x: x.softmax(1) * 4)


@op("selective kernel")
def selective_kernel(k: Choices, x: Tensor) -> Part:
    """Two branches weighed against each other, channel by channel."""
    c = x.shape[1]

    def run(m: Part, x: Tensor) -> Tensor:
        branches = torch.stack([m.a(x), m.b(x)], 1)
        weights = m.fc(branches.sum(1).mean(positions(x))).unflatten(1, (2, -1)).softmax(1)
        return (branches * weights.reshape(*weights.shape, *[1] * (x.ndim - 2))).sum(1)

    return Part(run, a=k.block(c, k.width), b=k.block(c, k.width, 3), fc=nn.Linear(k.width, 2 * k.width))


@op("recurrent")
def recurrent(k: Choices, x: Tensor) -> Part:
    """Along the first axis of the positions, over the mean of the others."""

    def run(m: Part, x: Tensor) -> Tensor:
        rows = m.g(x.flatten(2).unflatten(2, (x.shape[2], -1)).mean(3).transpose(1, 2))[0].transpose(1, 2)
        return rows.reshape(*rows.shape, *[1] * (x.ndim - 3)).repeat(1, 1, 1, *x.shape[3:])

    return Part(run, g=nn.GRU(x.shape[1], k.width, batch_first=True))


@op("attention")
def attention(k: Choices, x: Tensor) -> Part:
    """Activations times each other."""

    def run(m: Part, x: Tensor) -> Tensor:
        query, key = m.q(x).flatten(2), m.k(x).flatten(2)
        weights = (query.transpose(1, 2) @ key).softmax(-1)
        return x + (x.flatten(2) @ weights).reshape(x.shape)

    return Part(run, q=k.conv(x.shape[1], k.width), k=k.conv(x.shape[1], k.width))


@op("unknown operator")
def unknown_operator(k: Choices, x: Tensor) -> Part:
    return Part(
        k.of(
            lambda m, x: torch.cumprod(x.sigmoid() + 0.5, 1),
            lambda m, x: torch.fft.fft(x, dim=-1).real,
            lambda m, x: torch.fft.fft(x, dim=1).imag,
            lambda m, x: x.sort(1).values,
            lambda m, x: x.cumsum(1),
            lambda m, x: x * F.cosine_similarity(x, x.tanh(), 1).unsqueeze(1),
            lambda m, x: F.normalize(x, dim=1),
        )
    )


# -- sizes and axes ------------------------------------------------------------------------------------------------------


@op("pooling")
def pooling(k: Choices, x: Tensor) -> Part:
    small = min(x.shape[2:]) < 4
    kind = k.of("maximum", "average", "same size", "adaptive average", "adaptive maximum")
    if kind.startswith("adaptive"):
        pool = ADAPTIVE_POOL[kind.removeprefix("adaptive ")][k.dims]
        return Part(lambda m, x: pool(x, 2))
    if kind == "same size" or small:
        return Part(lambda m, x: MAX_POOL[k.dims](x, 3, 1, 1))
    return Part(lambda m, x: (MAX_POOL if kind == "maximum" else AVERAGE_POOL)[k.dims](x, 2))


@op("upsampling")
def upsampling(k: Choices, x: Tensor) -> Part:
    size = [min(2 * n, MOST_POSITIONS) for n in x.shape[2:]]
    mode = k.of("nearest", SMOOTH[k.dims])
    return Part(lambda m, x: F.interpolate(x, size, mode=mode))


@op("linear on the last axis")
def channels_last(k: Choices, x: Tensor) -> Part:
    """NHWC."""
    layers = nn.Sequential(nn.Linear(x.shape[1], k.width, bias=k.of(True, False)), nn.SiLU())
    return Part(lambda m, x: m.b(x.movedim(1, -1)).movedim(-1, 1), b=layers)


@op("global pooling")
def global_pooling(k: Choices, x: Tensor) -> Part:
    return Part(
        k.of(
            lambda m, x: x.mean(positions(x)),
            lambda m, x: x.amax(positions(x)),
            lambda m, x: ADAPTIVE_POOL["average"][x.ndim - 2](x, 1).flatten(1),
        )
    )


@op("flatten")
def flatten(k: Choices, x: Tensor) -> Part:
    pool = ADAPTIVE_POOL[k.of("average", "maximum")][k.dims]
    linear, norm = nn.Linear(x.shape[1] * 2**k.dims, k.width), k.of(nn.BatchNorm1d(k.width), nn.Identity())
    return Part(lambda m, x: m.b(pool(x, 2).flatten(1)), b=nn.Sequential(linear, norm, k.activation(k.width)))


@op("bare flatten")
def bare_flatten(k: Choices, x: Tensor) -> Part:
    """One channel is several entries of the vector."""
    return Part(lambda m, x: ADAPTIVE_POOL["maximum"][k.dims](x, (2, *[1] * (k.dims - 1))).flatten(1))


@op("linear", "v")
def linear(k: Choices, v: Tensor) -> Part:
    layers = nn.Sequential(nn.Linear(v.shape[1], k.width), k.of(nn.BatchNorm1d(k.width), nn.Identity()))
    return Part(lambda m, v: m.b(v), b=layers.append(k.activation(k.width)))


@op("vector norm", "v")
def vector_norm(k: Choices, v: Tensor) -> Part:
    return Part(lambda m, v: m.n(v), n=k.of(nn.BatchNorm1d, nn.LayerNorm)(v.shape[1]))


@op("vector sum", "vv")
def vector_sum(k: Choices, v: Tensor, w: Tensor) -> Part:
    return Part(lambda m, v, w: v + m.fc(w), fc=nn.Linear(w.shape[1], v.shape[1]))


@op("vector concatenation", "vv")
def vector_concatenation(k: Choices, v: Tensor, w: Tensor) -> Part:
    return Part(lambda m, v, w: torch.cat([v, w], 1))


@op("map from vector", "v")
def map_from_vector(k: Choices, v: Tensor) -> Part:
    """A linear layer whose output is viewed as maps."""
    sizes = (k.width, *[2] * k.dims)
    return Part(lambda m, v: m.fc(v).unflatten(1, sizes), fc=nn.Linear(v.shape[1], prod(sizes)))


@op("view with constant inner sizes", "v")
def inner_sizes(k: Choices, v: Tensor) -> Part:
    """As many parts as there are."""
    size = k.of(2, 4)
    c = k.multiple(size)
    return Part(
        lambda m, v: m.fc(m.a(v).unflatten(1, (-1, size)).tanh().flatten(1)),
        a=nn.Linear(v.shape[1], c),
        fc=nn.Linear(c, k.width),
    )


# -- the network ------------------------------------------------------------------------------------------------------------


def head(k: Choices, x: Tensor) -> Part:
    """How a loose end becomes an output of three channels."""
    c = x.shape[1]
    if x.ndim == 2:
        return Part(lambda m, v: m.fc(v), fc=nn.Linear(c, 3))
    return k.of(
        lambda: Part(lambda m, x: m.head(x), head=k.conv(c, 3)),
        lambda: Part(lambda m, x: m.fc(x.mean(positions(x))), fc=nn.Linear(c, 3)),
        lambda: Part(lambda m, x: m.fc(x.flatten(1)), fc=nn.Linear(c * prod(x.shape[2:]), 3)),
        lambda: Part(lambda m, x: m.fc(x.movedim(1, -1)), fc=nn.Linear(c, 3)),
    )()


class Assembly:
    """Builds a network step by step, running each part on examples to know what it makes."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.network = Network()
        self.values = list(example_inputs(recipe, 2, recipe.seed))
        self.read: set[int] = set()

    def place(self, part: Part, sources: tuple[int, ...]) -> None:
        enliven(part)
        self.network.parts.append(part.double().eval())
        self.network.sources.append(sources)
        self.read.update(sources)
        versions = [self.values[n]._version for n in sources]
        self.values += as_list(part(*[self.values[n] for n in sources]))
        self.network.overwrites += versions != [self.values[n]._version for n in sources]

    def pick(self, kind: str, back: int) -> int:
        """The number of a value of this kind; one is made where there is none, and narrowed where it is wide."""
        wanted = [n for n, v in enumerate(self.values) if (v.ndim == 2) == (kind == "v")]
        if not wanted:
            self.place(Part(lambda m, x: x.mean(positions(x))), (self.pick("m", back),))
            return len(self.values) - 1
        number = wanted[-1 - back % len(wanted)]
        channels = self.values[number].shape[1]
        if channels > MOST_CHANNELS:
            layer = nn.Linear(channels, 8) if kind == "v" else CONV[self.recipe.dims](channels, 8, 1)
            self.place(Part(lambda m, x: m.b(x), b=layer), (number,))
            return len(self.values) - 1
        return number

    def step(self, step: Step) -> None:
        takes, builder = OPS[step.op]
        sources = tuple(self.pick(kind, back) for kind, back in zip(takes, (step.source, step.other), strict=False))
        choices = Choices(self.recipe.dims, step.width, step.variant)
        self.place(builder(choices, *[self.values[n] for n in sources]), sources)

    def finish(self) -> Network:
        """Every loose end gets a head, leaves as it is, or is dead code; the last one always gets a head."""
        loose = [n for n in range(len(self.recipe.inputs), len(self.values)) if n not in self.read]
        choices = Choices(self.recipe.dims, 3, self.recipe.heads)
        self.network.style = choices.of(0, 1, 2)
        for number in loose:
            fate = choices.of("head", "head", "head", "bare", "dead") if number != loose[-1] else "head"
            if fate == "head":
                self.place(head(choices, self.values[number]), (number,))
                self.network.results.append(len(self.values) - 1)
            elif fate == "bare":
                self.network.results.append(number)
        return self.network


def build(recipe: Recipe) -> Network:
    """The network of a recipe, in double precision (rounding is no excuse for a difference) and evaluation mode."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(recipe.seed)
        assembly = Assembly(recipe)
        for step in recipe.steps:
            assembly.step(step)
        return assembly.finish()


def example_inputs(recipe: Recipe, batch: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [4 if recipe.dims == 3 else 8] * recipe.dims
    return tuple(torch.randn(batch, c, *sizes, generator=generator, dtype=torch.float64) for c in recipe.inputs)


def enliven(part: nn.Module) -> None:
    """Weights that keep the signal's size, and norms and slopes that are not trivial; in place."""
    for module in part.modules():
        for name, tensor in module.named_parameters(recurse=False):
            if isinstance(module, nn.PReLU):
                tensor.uniform_(0.1, 0.6)
            elif name == "weight" and tensor.ndim > 1 and not isinstance(module, nn.LayerNorm):
                rows = tensor.shape[0] if isinstance(module, nn.modules.conv._ConvTransposeNd) else tensor[0].numel()
                tensor.normal_(0, 1.4 / rows**0.5)
            elif name == "weight" or name == "scale":
                tensor.uniform_(0.5, 1.5)
            elif name != "w":
                tensor.normal_(0, 0.3)
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(0, 0.3)  # type: ignore[operator,union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[operator,union-attr]


def random_recipe(seed: int, most_steps: int = MOST_STEPS) -> Recipe:
    chance = random.Random(seed)
    names = list(OPS)
    steps = tuple(
        Step(
            chance.choice(names),
            chance.randrange(4),
            chance.randrange(4),
            chance.randint(2, 16),
            chance.randrange(2**20),
        )
        for _ in range(chance.randint(1, most_steps))
    )
    inputs = tuple(chance.randint(2, 4) for _ in range(chance.choice([1, 1, 2])))
    return Recipe(chance.choice([1, 2, 2, 3]), inputs, steps, chance.randrange(2**12), chance.randrange(2**16))


RECIPE_BYTES = MOST_STEPS + 5


def recipe_of(data: bytes) -> Recipe:
    """The recipe of ``RECIPE_BYTES`` random bytes. What shrinks them leaves steps out (a byte of 0) or makes them plain (1)."""
    fates, plain, seed = data[:MOST_STEPS], data[MOST_STEPS], data[MOST_STEPS + 1 :]
    recipe = random_recipe(int.from_bytes(seed, "big"))
    pairs = zip(recipe.steps, fates, strict=False)
    kept = tuple(Step(step.op, width=step.width) if fate == 1 else step for step, fate in pairs if fate)
    if plain == 0:
        recipe = replace(recipe, dims=2, inputs=recipe.inputs[:1], heads=0)
    return replace(recipe, steps=kept or recipe.steps[:1])
