"""Groups found by propagation, on networks whose groups are known by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import slim
from tests.slim.networks import Chain, Residual, conv


def occupied(graph: slim.ChannelGraph, name: str) -> dict[tuple[str, int], list[int]]:
    return {(m.param, m.axis): list(m.index) for m in graph.by_name[name].members}


def test_chain_groups_hold_producer_norm_and_consumer() -> None:
    graph = slim.trace(Chain(), torch.rand(1, 3, 8, 8))
    assert [(g.name, g.size, g.prunable) for g in graph.groups] == [
        ("first.0", 4, True),
        ("second.0", 6, True),
        ("head", 2, False),
    ]
    four = list(range(4))
    assert occupied(graph, "first.0") == {
        ("first.0.weight", 0): four,
        ("first.1.weight", 0): four,
        ("first.1.bias", 0): four,
        ("first.1.running_mean", 0): four,
        ("first.1.running_var", 0): four,
        ("second.0.weight", 1): four,
    }
    assert graph.by_name["head"].frozen_reason == "a model output"


def test_residual_is_one_group_and_concatenation_offsets_follow() -> None:
    graph = slim.trace(Residual(), torch.rand(1, 3, 8, 8))
    assert [(g.name, g.size) for g in graph.groups] == [("stem.0", 8), ("branch.0.0", 12), ("side.0", 8), ("head", 5)]
    stem, side = occupied(graph, "stem.0"), occupied(graph, "side.0")
    assert ("branch.1.0.weight", 0) in stem and ("branch.0.0.weight", 1) in stem
    assert stem["head.weight", 1] == list(range(8)) and side["head.weight", 1] == list(range(8, 16))
    assert side["depthwise.0.weight", 0] == list(range(8, 16))


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = conv(3, 4), nn.Linear(4 * 9, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.conv(x).flatten(1))
        return out


def test_flatten_gives_each_channel_its_block_of_inputs() -> None:
    graph = slim.trace(Flattened(), torch.rand(1, 3, 3, 3))
    assert occupied(graph, "conv.0")["fc.weight", 1] == list(range(36))


class Shuffled(nn.Module):
    """Grouped convolution and channel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 8, 1, groups=2), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        n, c, h, w = x.shape
        out: Tensor = self.head(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))
        return out


def test_grouped_convolution_ties_the_same_position_of_every_group() -> None:
    graph = slim.trace(Shuffled(), torch.rand(1, 3, 4, 4))
    a, b = graph.by_name["a.0"], graph.by_name["b.0"]
    assert (a.size, b.size) == (4, 4)
    assert occupied(graph, "a.0")["a.0.weight", 0] == [0, 4, 1, 5, 2, 6, 3, 7]
    assert occupied(graph, "a.0")["b.0.weight", 1] == [0, 1, 2, 3]
    assert occupied(graph, "b.0")["head.weight", 1] == [0, 1, 2, 3, 4, 5, 6, 7]


class Attended(nn.Module):
    """A one-channel map of weights over all channels, and a squeeze-excite vector of one weight a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.spot, self.squeeze, self.head = (
            conv(3, 8),
            nn.Conv2d(3, 1, 1),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = y * self.squeeze(y.mean((2, 3), keepdim=True)).sigmoid()
        out: Tensor = self.head(y * self.spot(x).sigmoid())
        return out


def test_spatial_attention_does_not_tie_the_channels_that_it_weighs() -> None:
    model = Attended()
    graph = slim.trace(model, torch.rand(1, 3, 4, 4))
    assert [(g.name, g.size) for g in graph.groups if g.prunable] == [("a.0", 8)]
    assert "only channel" in (graph.by_name["spot"].frozen_reason or "")
    assert occupied(graph, "a.0")["squeeze.weight", 0] == occupied(graph, "a.0")["squeeze.weight", 1] == list(range(8))
    plan = slim.make_plan(graph, slim.score(model, graph, "l1"), channels=0.5, round_to=1, min_channels=1)
    assert slim.max_difference(slim.mask(model, plan), slim.apply_plan(model, plan), torch.rand(2, 3, 4, 4)) < 1e-5


class Softmaxed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(3, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.a(x) * self.b(x).softmax(1) if self.training else self.b(x).softmax(1) + self.a(x))
        return out


def test_op_that_mixes_channels_freezes_them_and_is_reported() -> None:
    graph = slim.trace(Softmaxed(), torch.rand(1, 3, 4, 4))
    assert "_softmax in the model mixes channels" in (graph.by_name["b.0"].frozen_reason or "")
    assert any("softmax" in op.op and op.groups == ("b.0",) for op in graph.freezing_ops)
    assert "mixes channels, so no cut is exact: froze 75.0% of the MACs (b.0)" in graph.report()


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.twice, self.head = conv(3, 6), conv(6, 6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.twice(self.twice(self.a(x))))
        return out


def test_layer_that_runs_twice_ties_its_input_to_its_output() -> None:
    graph = slim.trace(Reused(), torch.rand(1, 3, 4, 4))
    assert [(g.name, g.size) for g in graph.groups] == [("a.0", 6), ("head", 2)]


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = Residual().train()
    model.side.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    slim.trace(model, torch.rand(1, 3, 8, 8, generator=torch.Generator()))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_cost_agrees_with_flop_counter_and_thop() -> None:
    from thop import profile
    from torch.utils.flop_counter import FlopCounterMode

    model, x = Residual().eval(), torch.rand(1, 3, 16, 16)
    found, graph = slim.cost(model, x), slim.trace(model, x)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert found.macs == graph.macs == counter.get_total_flops() // 2
    assert found.params == graph.params == sum(p.numel() for p in model.parameters())
    convolutions_alone = {nn.BatchNorm2d: None, nn.SiLU: None}
    macs, _ = profile(model, (x,), custom_ops=convolutions_alone, verbose=False)
    assert found.macs <= macs <= 1.2 * found.macs


@pytest.mark.parametrize("batch", [1, 3])
def test_cost_is_for_one_image(batch: int) -> None:
    assert slim.cost(Flattened(), torch.rand(batch, 3, 3, 3)).macs == 3 * 4 * 9 + 36 * 2
