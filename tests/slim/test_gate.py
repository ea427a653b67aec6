"""Gates and the smallest-half sparsity, with hand-set values."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import slim
from tests.slim.networks import Chain, Residual, randomise


def gated_chain() -> tuple[Chain, dict[str, torch.nn.Parameter]]:
    model = Chain()
    return model, slim.add_gates(model, slim.trace(model, torch.rand(1, 3, 8, 8)))


def set_gates(gates: dict[str, torch.nn.Parameter], **values: list[float]) -> None:
    with torch.no_grad():
        for name, entries in values.items():
            gates[f"{name}.0"].copy_(torch.tensor(entries))


def test_new_gates_are_one_fp32_and_change_nothing() -> None:
    model = Chain().eval()
    x = torch.rand(2, 3, 8, 8)
    before = model(x)
    gates = slim.add_gates(model, slim.trace(model, x))
    assert {k: v.tolist() for k, v in gates.items()} == {"first.0": [1.0] * 4, "second.0": [1.0] * 6}
    assert all(v.dtype is torch.float32 for v in gates.values())
    assert torch.equal(model(x), before)


def test_adding_gates_twice_gives_the_same_gates() -> None:
    model, gates = gated_chain()
    again = slim.add_gates(model, slim.trace(model, torch.rand(1, 3, 8, 8)))
    assert [id(v) for v in again.values()] == [id(v) for v in gates.values()]
    assert sum(isinstance(m, slim.Gate) for m in model.modules()) == 2


def test_tied_group_shares_one_vector_and_layer_tie_does_not() -> None:
    tied, free = Residual(), Residual()
    graph = slim.trace(tied, torch.rand(1, 3, 8, 8))
    assert list(slim.add_gates(tied, graph, tie="group")) == ["stem.0", "branch.0.0", "side.0"]
    names = list(slim.add_gates(free, graph, tie="layer"))
    assert names == [
        "stem.0@stem.2",
        "stem.0@branch.1.2",
        "stem.0@depthwise.2",
        "branch.0.0",
        "side.0@side.2",
        "side.0@depthwise.2",
    ]


def test_a_channel_is_open_while_one_of_its_gates_is() -> None:
    model = Residual()
    graph = slim.trace(model, torch.rand(1, 3, 8, 8))
    whole = slim.open_channels(graph, {})
    assert whole == {path: widths[1] for path, widths in slim.layer_widths(model).items()}
    assert list(whole) == list(dict.fromkeys(call.path for call in graph.layers)), "in the order in which they run"
    gates = slim.add_gates(model, graph, tie="layer")
    with torch.no_grad():
        gates["stem.0@stem.2"][:3] = 0.0
        gates["stem.0@branch.1.2"][:2] = -0.009
        gates["stem.0@depthwise.2"][1:] = 0.0
        gates["branch.0.0"][0] = 0.0
    found = slim.open_channels(graph, gates)
    tied = {member.layer for member in graph.by_name["stem.0"].members if member.produces}
    closed = {path: 1 if path in tied or path == "branch.0.0" else 0 for path in whole}
    assert found == {path: width - closed[path] for path, width in whole.items()} and len(tied) > 1


def test_open_channels_of_norm_weights() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    graph = slim.trace(model, torch.rand(1, 3, 8, 8))
    assert slim.open_channels(graph, {"1": torch.tensor([-0.5, 0.001, 0.0, 0.2])}) == {"0": 2, "3": 2}


def test_l1_step_moves_exactly_the_smallest_half() -> None:
    model, gates = gated_chain()
    set_gates(gates, first=[0.5, 0.2, 0.9, 0.1], second=[1.0, 0.3, 0.8, 0.05, 0.7, 0.6])
    slim.SmallestHalfL1(model, strength=2.0).step(lr=0.05)
    assert torch.allclose(gates["first.0"], torch.tensor([0.5, 0.1, 0.9, 0.0]), atol=1e-7)
    assert torch.allclose(gates["second.0"], torch.tensor([1.0, 0.2, 0.8, 0.0, 0.7, 0.5]), atol=1e-7)


def test_of_equal_gates_the_lower_indices_are_shrunk() -> None:
    model, gates = gated_chain()
    slim.SmallestHalfL1(model, strength=1.0).step(lr=0.25)
    assert gates["first.0"].tolist() == [0.75, 0.75, 1.0, 1.0]
    assert gates["second.0"].tolist() == [0.75, 0.75, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("fraction", "shrunk"), [(0.0, 0), (0.25, 1), (0.5, 3), (0.99, 5), (1.0, 6)])
def test_fraction_is_honoured_exactly(fraction: float, shrunk: int) -> None:
    model, gates = gated_chain()
    slim.SmallestHalfL1(model, strength=1.0, fraction=fraction).step(lr=0.5)
    assert gates["second.0"].tolist() == [0.5] * shrunk + [1.0] * (6 - shrunk)


def test_ranking_is_fresh_at_each_step() -> None:
    model, gates = gated_chain()
    sparsity = slim.SmallestHalfL1(model, strength=1.0)
    set_gates(gates, first=[0.4, 0.5, 0.9, 1.0])
    sparsity.step(lr=0.1)
    set_gates(gates, first=[2.0, 0.5, 0.9, 1.0])
    sparsity.step(lr=0.1)
    assert torch.allclose(gates["first.0"], torch.tensor([2.0, 0.4, 0.8, 1.0]))


def test_negative_gates_come_back_to_zero_whether_shrunk_or_not() -> None:
    model, gates = gated_chain()
    set_gates(gates, first=[-0.5, 0.2, -0.9, 0.1])
    sparsity = slim.SmallestHalfL1(model, strength=0.0)
    sparsity.step(lr=1.0)
    assert gates["first.0"].tolist() == pytest.approx([0.0, 0.2, 0.0, 0.1])
    assert sparsity.closed_share() == pytest.approx(0.2)


def train_steps(model: torch.nn.Module, sparsity: slim.SmallestHalfL1 | None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.rand(4, 3, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        if sparsity:
            sparsity.step(0.05)
    return [p.detach() for p in model.parameters()]


def test_strength_zero_trains_bit_identically_to_no_l1_step() -> None:
    model, _ = gated_chain()
    other = copy.deepcopy(model)
    without, zero = train_steps(model, None), train_steps(other, slim.SmallestHalfL1(other, strength=0.0))
    assert all(torch.equal(a, b) for a, b in zip(without, zero, strict=True))


def test_strength_for_a_travel() -> None:
    assert slim.strength_for(0.5, travel=2.0) == 4.0
    with pytest.raises(slim.SlimError, match="sum to 0"):
        slim.strength_for(0.0)


def test_an_unopposed_gate_travels_as_far_as_asked() -> None:
    model, gates = gated_chain()
    rates = [0.1, 0.08, 0.06, 0.02]
    sparsity = slim.SmallestHalfL1(model, strength=slim.strength_for(sum(rates), travel=0.5))
    for lr in rates:
        sparsity.step(lr)
    assert torch.allclose(gates["first.0"], torch.tensor([0.5, 0.5, 1.0, 1.0]))


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"strength": -1.0}, "strength is -1"), ({"strength": 1.0, "fraction": 1.5}, "fraction")]
)
def test_bad_settings_are_named(kwargs: dict[str, float], message: str) -> None:
    model, _ = gated_chain()
    with pytest.raises(slim.SlimError, match=message):
        slim.SmallestHalfL1(model, **kwargs)  # type: ignore[arg-type]


def test_l1_step_without_gates_says_so() -> None:
    with pytest.raises(slim.SlimError, match="no gates"):
        slim.SmallestHalfL1(Chain(), strength=1.0)


class Block(nn.Module):
    """A ResNet block as torchvision writes it: one ReLU module for all three calls, the last behind the sum; with a
    squeeze-excite whose factors are no maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1)
        self.relu, self.prelu = nn.ReLU(inplace=True), nn.PReLU(4)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem_norm(self.stem(x)))
        y = self.relu(self.bn1(self.conv1(x)))
        y = y * self.excite(self.prelu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        out: Tensor = self.head(self.relu(self.bn2(self.conv2(y)) + x))
        return out


def gated_block() -> tuple[Block, slim.ChannelGraph, dict[str, nn.Parameter]]:
    torch.manual_seed(0)
    model = Block()
    graph = slim.trace(model, torch.rand(1, 3, 8, 8))
    gates = slim.add_gates(model, graph)
    randomise(model)
    return model, graph, gates


def test_layers_behind_a_reused_activation_are_gated_themselves() -> None:
    _, graph, gates = gated_block()
    assert [site.path for site in graph.gate_sites] == ["prelu", "stem_norm", "bn1", "bn2"]
    assert set(gates) == {g.name for g in graph.groups if g.prunable} == {"stem", "conv1", "squeeze"}


def test_closed_gates_behind_layers_make_the_cut_free_and_fold_away() -> None:
    model, graph, gates = gated_block()
    with torch.no_grad():
        for vector in gates.values():
            vector[::2] = 0.0
            vector[1::2] += 0.1
    plan = slim.make_plan(graph, slim.score(model, graph), threshold=0.01, round_to=1, min_channels=1)
    assert all(k % 2 for g in plan.groups for k in g.keep)
    x = torch.rand(2, 3, 8, 8)
    pruned = slim.apply_plan(model, plan)
    assert slim.max_difference(model, pruned, x) < 1e-6
    folded = slim.fold_gates(pruned)
    assert slim.max_difference(model, folded, x) < 1e-5 and not slim.gate_vectors(folded)
    assert {type(m) for m in folded.modules()} == {type(m) for m in Block().modules()}
    assert not any(m._forward_hooks for m in folded.modules())


def test_gates_that_cannot_go_forward_fold_back_into_the_layer() -> None:
    class Smooth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.b = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(nn.functional.silu(self.n(self.a(x))))
            return out

    torch.manual_seed(0)
    model = Smooth()
    slim.add_gates(model, slim.trace(model, torch.rand(1, 3, 8, 8)))
    randomise(model)
    folded = slim.fold_gates(model)
    factors = slim.gate_vectors(model)["a"]
    assert torch.equal(folded.n.weight, model.n.weight * factors) and torch.equal(folded.b.weight, model.b.weight)
    assert slim.max_difference(model, folded, torch.rand(2, 3, 8, 8)) < 1e-6


def test_gating_renames_nothing_and_copies_follow_their_own_gates() -> None:
    model, graph, _ = gated_block()
    assert {n for n, _ in model.named_parameters() if "slim_gate" not in n} == {
        n for n, _ in Block().named_parameters()
    }
    assert slim.trace(model, torch.rand(1, 3, 8, 8)) == graph
    twin, x = copy.deepcopy(model), torch.rand(1, 3, 8, 8)
    before = model(x)
    with torch.no_grad():
        slim.gate_vectors(twin)["stem"].zero_()
    assert torch.equal(model(x), before) and not torch.equal(twin(x), before)
