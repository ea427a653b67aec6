"""Numbers of channels that modules hold as attributes are cut along, where a dry run says that the code goes by them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slim
from tests.slim.networks import conv, prove, randomise
from tests.slim.test_operators import X, prunable


class Res2(nn.Module):
    """Parts of a width, each convolved with the sum of those before (Gao et al., Res2Net)."""

    def __init__(self, channels: int = 12, parts: int = 3) -> None:
        super().__init__()
        self.width, self.parts = channels // parts, parts
        self.up, self.down = conv(3, channels), conv(channels, 6)
        self.convs = nn.ModuleList(conv(self.width, self.width) for _ in range(parts - 1))

    def forward(self, x: Tensor) -> Tensor:
        first, *others = torch.split(self.up(x), self.width, 1)
        done = [first]
        for layer, part in zip(self.convs, others, strict=True):
            done.append(layer(part + done[-1]))
        return self.down(torch.cat(done, 1))  # type: ignore[no-any-return]


class Partial(nn.Module):
    """A quarter of the channels is convolved (Chen et al., FasterNet); two attributes have to fit each other."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.dim, self.untouched = channels // 4, channels - channels // 4
        self.up, self.mix, self.down = conv(3, channels), nn.Conv2d(self.dim, self.dim, 3, padding=1), conv(channels, 6)

    def forward(self, x: Tensor) -> Tensor:
        first, rest = torch.split(self.up(x), [self.dim, self.untouched], 1)
        return self.down(torch.cat([self.mix(first), rest], 1))  # type: ignore[no-any-return]


class Mixed(nn.Module):
    """Depthwise kernels of several sizes over unequal parts (Tan and Le, MixNet); a list, or a tuple."""

    def __init__(self, kind: type = list, splits: tuple[int, ...] = (6, 5, 4)) -> None:
        super().__init__()
        self.splits, self.up, self.down = kind(splits), conv(3, sum(splits)), conv(sum(splits), 6)
        kernels = range(1, 2 * len(splits), 2)
        self.convs = nn.ModuleList(
            nn.Conv2d(n, n, k, 1, k // 2, groups=n) for n, k in zip(splits, kernels, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.up(x), self.splits, 1)
        return self.down(torch.cat([layer(part) for layer, part in zip(self.convs, parts, strict=True)], 1))  # type: ignore[no-any-return]


class CrossStage(nn.Module):
    """Half of an attribute, computed as the code runs (Wang et al., CSPNet); another attribute has the same value."""

    def __init__(self) -> None:
        super().__init__()
        self.expand_chs, self.resolution = 12, 12
        self.up, self.one, self.down = conv(3, 12), conv(6, 6), conv(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.up(x).split(self.expand_chs // 2, 1)
        scaled = first * (self.resolution / 12)
        return self.down(torch.cat([scaled, self.one(second)], 1))  # type: ignore[no-any-return]


class PartialShortcut(nn.Module):
    """The first channels have a shortcut (Han et al., ReXNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.in_channels = 6
        self.stem, self.wider, self.down = conv(3, 6), conv(6, 10), conv(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.wider(x)
        return self.down(torch.cat([y[:, : self.in_channels] + x, y[:, self.in_channels :]], 1))  # type: ignore[no-any-return]


KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, int]]]] = {
    "res2": (Res2, {"0.up.0": (4, 3), "0.convs.1.0": (4, 1), "0.down.0": (6, 1)}),
    "partial": (Partial, {"0.up.0": (4, 4), "0.mix": (4, 1), "0.down.0": (6, 1)}),
    "mixed": (Mixed, {"0.up.0": (6, 1), "0.up.0#2": (5, 1), "0.up.0#3": (4, 1), "0.down.0": (6, 1)}),
    "mixed, a tuple": (
        lambda: Mixed(tuple),
        {"0.up.0": (6, 1), "0.up.0#2": (5, 1), "0.up.0#3": (4, 1), "0.down.0": (6, 1)},
    ),
    "mixed, some alike": (
        lambda: Mixed(list, (5, 4, 4)),
        {"0.up.0": (5, 1), "0.up.0#2": (4, 1), "0.up.0#3": (4, 1), "0.down.0": (6, 1)},
    ),
    "cross stage": (CrossStage, {"0.up.0": (6, 2), "0.one.0": (6, 1), "0.down.0": (6, 1)}),
    "partial shortcut": (PartialShortcut, {"0.stem.0": (6, 1), "0.wider.0": (4, 1), "0.down.0": (6, 1)}),
}


def network(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    return randomise(nn.Sequential(KINDS[name][0](), nn.Conv2d(6, 3, 1)))  # type: ignore[return-value]


@pytest.mark.parametrize("name", KINDS)
def test_counts_are_cut_along(name: str, tmp_path: Path) -> None:
    model, expected = network(name), KINDS[name][1]
    graph, plan = prove(model, X)
    assert prunable(graph) == expected
    pruned = slim.apply_plan(model, plan)
    assert slim.cost(pruned, X).macs == plan.macs[1]
    # The file knows the attributes; a plan's JSON cuts them; and what was cut can be cut again.
    slim.save(pruned, tmp_path / "pruned.pt", {})
    loaded = slim.load(tmp_path / "pruned.pt", lambda build: network(name))
    assert slim.max_difference(pruned, loaded, X) == 0
    again = slim.apply_plan(model, slim.Plan.from_json(plan.to_json()))
    assert slim.max_difference(pruned, again, X) == 0
    prove(loaded, X, keep=0.7)
    slim.add_gates(model, graph)
    assert prunable(prove(model, X)[0]) == expected


def test_values_follow_the_channels() -> None:
    model = network("mixed")
    keep = {"0.up.0": (0, 5), "0.up.0#2": (1, 2, 3), "0.up.0#3": (3,)}
    plan = prove(model, X)[1]
    by_hand = replace(plan, groups=tuple(replace(g, keep=keep.get(g.name, g.keep)) for g in plan.groups))
    pruned: Any = slim.apply_plan(model, by_hand)
    assert slim.prove(slim.mask(model, by_hand), pruned, X)
    assert pruned[0].splits == [2, 3, 1] and model[0].splits == [6, 5, 4]  # type: ignore[union-attr]
    number: Any = slim.apply_plan(network("cross stage"), prove(network("cross stage"), X)[1])
    assert number[0].expand_chs == 2 * number[0].one[0].in_channels and number[0].resolution == 12


def test_a_number_that_is_no_count_stays_and_its_channels_too() -> None:
    class Scaled(nn.Module):
        """Divides by the width, whose value changes the result: nothing can be cut along."""

        def __init__(self) -> None:
            super().__init__()
            self.width, self.a, self.b = 8, conv(3, 8), conv(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            assert y.shape[1] == self.width
            return self.b(y / self.width)  # type: ignore[no-any-return]

    graph, _ = prove(randomise(nn.Sequential(Scaled(), nn.Conv2d(6, 3, 1))), X)
    assert prunable(graph) == {"0.b.0": (6, 1)}
