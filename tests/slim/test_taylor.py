"""Taylor scores against factors put behind every layer, and what the scoring leaves behind: nothing."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slim
from slim.graph import ChannelGroup, Member
from tests.slim.networks import Chain, Residual, conv, randomise
from tests.slim.test_score import Grouped, Upsampled, chain


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def pairs(model: nn.Module, channels: int, number: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets, each batch of another size and scale."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for n in range(1, number + 1):
        x = n * torch.randn(n, channels, 6, 6, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            found.append((x, torch.randn(model(x).shape, generator=generator, dtype=torch.float64)))
    return found


def factor_gradients(model: nn.Module, batches: list[tuple[Tensor, Tensor]], path: str) -> Tensor:
    """dL/d(factor) per batch for factors of 1 behind a layer, [batches, the layer's channels]: by brute force."""
    layer = model.get_submodule(path)
    found = []
    for batch in batches:
        x, _ = batch
        sizes: list[int] = []
        with layer.register_forward_hook(lambda m, a, out, s=sizes: s.append(out.shape[1])), torch.no_grad():
            model(x)
        factors = torch.ones(sizes[0], dtype=torch.float64, requires_grad=True)

        def scaled(m: nn.Module, a: Any, out: Tensor, f: Tensor = factors) -> Tensor:
            return out * f.view(1, -1, *[1] * (out.ndim - 2))

        with layer.register_forward_hook(scaled):
            found.append(torch.autograd.grad(squared_error(model, batch), factors)[0])
    return torch.stack(found)


EIGHT, TWICE = list(range(8)), [[0, 3], [1, 4], [2, 5]]
TAYLOR_LAYERS: list[tuple[type[nn.Module], int, str, dict[str, list[Any]]]] = [
    (Chain, 3, "first.0", {"first.0": [0, 1, 2, 3], "first.1": [0, 1, 2, 3]}),
    (Residual, 3, "stem.0", dict.fromkeys(["stem.0", "branch.1.0", "depthwise.0"], EIGHT)),
    (Residual, 3, "side.0", {"side.0": EIGHT, "depthwise.0": list(range(8, 16))}),
    (Upsampled, 2, "up", {"up": [0, 1, 2]}),
    (Grouped, 3, "first.0", {"first.0": TWICE, "first.1": TWICE}),
    (Grouped, 3, "grouped", {"grouped": TWICE}),
]


@pytest.mark.parametrize(("network", "channels", "group", "layers"), TAYLOR_LAYERS)
def test_taylor_is_the_squared_slope_of_a_factor_behind_each_layer(
    network: type[nn.Module], channels: int, group: str, layers: dict[str, list[Any]]
) -> None:
    torch.manual_seed(0)
    model = randomise(network()).double()
    if network is Residual:
        layers = layers | {path[:-1] + "1": positions for path, positions in layers.items()}  # each one's batch norm
    graph = slim.trace(model, torch.rand(1, channels, 6, 6, dtype=torch.float64))
    batches = pairs(model, channels)
    expected = []
    for path, positions in layers.items():
        slopes = factor_gradients(model, batches, path)
        index = torch.tensor(positions).reshape(len(positions), -1)
        expected.append(slopes[:, index].sum(2).square().mean(0))
    assert all(layer.min() > 0 for layer in expected)
    for reduction, normalise, wanted in (
        ("sum", "none", torch.stack(expected).sum(0)),
        ("max", "none", torch.stack(expected).amax(0)),
        (None, None, torch.stack([layer / layer.mean() for layer in expected]).mean(0)),
    ):
        scores = slim.score(
            model,
            graph,
            "taylor",
            reduction=reduction,  # type: ignore[arg-type]
            normalise=normalise,  # type: ignore[arg-type]
            batches=iter(batches),
            loss=squared_error,
        )[group]
        torch.testing.assert_close(scores, wanted, rtol=1e-9, atol=0)


def test_taylor_by_hand() -> None:
    """y = 2 relu(3 x + 1) + 5 relu(-x); loss = y of x = 2, 4: only the first channel counts, 2 (3 x + 1) = 14 and 26."""
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0], [-1.0]]))
        model[0].bias.copy_(torch.tensor([1.0, 0.0]))
        model[2].weight.copy_(torch.tensor([[2.0, 5.0]]))
    graph = slim.trace(model, torch.ones(1, 1))
    batches = [torch.tensor([[2.0]]), torch.tensor([[4.0]])]
    scores = slim.score(model, graph, "taylor", normalise="none", batches=batches, loss=lambda m, x: m(x).sum())
    assert scores["0"].tolist() == [(14.0**2 + 26.0**2) / 2, 0.0]


def test_taylor_reads_no_attribute_and_counts_group_norms() -> None:
    """A group norm between two layers, its width held as an attribute: what a graph with inexact cuts can hold."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 1, 1)).double()
    randomise(model[1])
    model[1].weight.data.uniform_(0.5, 1.5)
    four = (0, 1, 2, 3)
    members = (
        Member("1.num_channels", 0, "width", four),
        Member("0.weight", 0, "out", four),
        Member("0.bias", 0, "scale", four),
        Member("1.weight", 0, "scale", four),
        Member("1.bias", 0, "scale", four),
        Member("2.weight", 1, "in", four),
    )
    graph = replace(chain()[1], groups=(ChannelGroup("0", 4, members, inexact="group norm"),))
    batches = pairs(model, 2)
    expected = sum(factor_gradients(model, batches, path).square().mean(0) for path in ("0", "1"))
    scores = slim.score(model, graph, "taylor", reduction="sum", normalise="none", batches=batches, loss=squared_error)
    torch.testing.assert_close(scores["0"], expected, rtol=1e-9, atol=0)
    assert slim.score(model, graph, "l1", normalise="none")["0"].shape == (4,)


class Mirrored(nn.Module):
    """One weight that is read along both of its axes."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.weight, self.head = conv(3, 2), nn.Parameter(torch.randn(4, 2, 1, 1)), nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(nn.functional.conv2d(self.into(x), self.weight))
        out: Tensor = self.head(torch.tanh(nn.functional.conv_transpose2d(x, self.weight)))
        return out


def test_taylor_on_a_weight_that_makes_channels_along_two_axes() -> None:
    torch.manual_seed(0)
    model = randomise(Mirrored()).double()
    graph = slim.trace(model, torch.rand(1, 3, 6, 6, dtype=torch.float64))
    assert {m.axis for g in graph.groups if g.prunable for m in g.members if m.param == "weight"} == {0, 1}
    batches = pairs(model, 3, 1)
    model.weight.requires_grad_(False)
    scores = slim.score(model, graph, "taylor", normalise="none", reduction="sum", batches=batches, loss=squared_error)
    assert not model.weight.requires_grad
    model.weight.requires_grad_(True)
    (gradient,) = torch.autograd.grad(squared_error(model, batches[0]), model.weight)
    name = next(
        g.name for g in graph.groups if any(m.param == "weight" and m.role == "out" and m.axis == 0 for m in g.members)
    )
    expected = (gradient * model.weight).detach().sum((1, 2, 3)).square()
    torch.testing.assert_close(scores[name], expected, rtol=1e-9, atol=0)


def test_taylor_needs_no_requires_grad_and_is_the_same_for_tiny_losses() -> None:
    model = randomise(Residual()).double()
    graph = slim.trace(model, torch.rand(1, 3, 6, 6, dtype=torch.float64))
    batches = pairs(model, 3)
    trainable = slim.score(model, graph, "taylor", batches=batches, loss=squared_error)
    model.requires_grad_(False)
    with torch.no_grad():
        fixed = slim.score(model, graph, "taylor", batches=batches, loss=lambda m, b: 2.0**-40 * squared_error(m, b))
    for name, scores in trainable.items():
        torch.testing.assert_close(fixed[name], scores, rtol=1e-12, atol=0)
    assert not any(p.requires_grad for p in model.parameters())


def test_what_the_loss_does_not_reach_counts_nothing() -> None:
    model, graph = chain()
    scores = slim.score(
        model, graph, "taylor", batches=[torch.rand(2, 3, 8, 8)], loss=lambda m, x: m.first(x).square().mean()
    )
    assert scores["first.0"].max() > 0 and scores["second.0"].tolist() == [0.0] * 6


class Counting(Residual):
    """Counts its forward passes in one buffer and replaces another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.last = x.detach().mean()[None]
        return super().forward(x)


def restless(model: nn.Module, batch: Tensor) -> Tensor:
    """A loss that draws random numbers and trains the batch norms' statistics."""
    out: Tensor = model.train()(batch + torch.rand(())).square().mean()
    return out


def failing(model: nn.Module, batch: Tensor) -> Tensor:
    restless(model, batch)
    raise KeyError("labels")


@pytest.mark.parametrize("loss", [restless, failing])
def test_taylor_leaves_the_model_as_it_was(loss: Any) -> None:
    model = Counting().train()
    model.side.eval()
    model.stem.requires_grad_(False)
    for parameter in list(model.parameters())[4:]:
        parameter.grad = torch.full_like(parameter, 7.0)
    graph = slim.trace(model, torch.zeros(1, 3, 8, 8))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    modes, rng = [m.training for m in model.modules()], torch.get_rng_state()
    identities = [id(t) for t in (*model.parameters(), *model.buffers())]

    batches = (torch.rand(2, 3, 8, 8) for _ in range(2))
    with pytest.raises(KeyError, match="labels") if loss is failing else nullcontext():
        slim.score(model, graph, "taylor", batches=batches, loss=loss)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == identities
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert [p.grad is None for p in model.parameters()] == [n < 4 for n in range(len(flags))]
    assert all(p.grad is None or bool((p.grad == 7).all()) for p in model.parameters())


def test_taylor_judges_in_evaluation_mode() -> None:
    """With batch statistics a convolution before a batch norm would score 0."""
    model, graph = chain()
    modes: list[bool] = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        modes.append(any(m.training for m in model.modules()))
        out: Tensor = model(batch).square().mean()
        return out

    slim.score(model.train(), graph, "taylor", batches=[torch.rand(1, 3, 8, 8)] * 2, loss=loss)
    assert modes == [False, False]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, r"needs batches= .* and loss= .*; without data use l1"),
        ({"batches": [torch.ones(1, 3, 8, 8)]}, "needs batches="),
        ({"loss": lambda m, x: m(x).sum()}, "needs batches="),
        ({"batches": [], "loss": lambda m, x: m(x).sum()}, "no batch: batches is empty"),
        ({"loss": lambda m, x: m(x).sum() * float("nan")}, "batch 1 .* is nan"),
        ({"loss": lambda m, x: m(x).sum() / x[0, 0, 0, 0]}, "batch 2 .* is -?inf"),
        ({"loss": lambda m, x: m(x).mean((0, 2, 3))}, r"batch 1 .* has shape \(2,\).*scalar"),
        ({"loss": lambda m, x: m(x).sum().item()}, r"batch 1 .* is a float.*without \.item"),
        ({"loss": lambda m, x: m(x).detach().sum()}, "batch 1 .* has no gradient.*detach"),
    ],
)
def test_taylor_says_what_it_lacks(kwargs: dict[str, Any], message: str) -> None:
    model, graph = chain()
    if "needs" not in message:
        kwargs = {"batches": [torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)], **kwargs}
    with pytest.raises(slim.SlimError, match=message):
        slim.score(model, graph, "taylor", **kwargs)
