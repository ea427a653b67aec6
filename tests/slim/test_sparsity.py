from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import slim
from slim import CLOSED, BudgetL1, ChannelGraph, Gate, SlimError, SmallestHalfL1, closed_gates_at_zero

SIZES = (16, 33, 64, 128)


class Gates(nn.Module):
    """Gate vectors alone."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList(Gate([f"g{i}"], [nn.Parameter(torch.ones(size))]) for i, size in enumerate(SIZES))


def chain() -> tuple[nn.Sequential, ChannelGraph, Tensor]:
    """Two layers that can be cut, the first at four times the MACs of the second, with gates."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.ReLU(), nn.Conv2d(16, 16, 1, 2, bias=False), nn.ReLU(), nn.Conv2d(16, 2, 1)
    )
    x = torch.rand(2, 3, 9, 9)
    graph = slim.trace(model, x)
    slim.add_gates(model, graph)
    return model, graph, x


FINE = {"round_to": 1, "min_channels": 1}


def trained(sparsity: BudgetL1, steps: range, worth: dict[str, Tensor]) -> None:
    """Steps in which the loss's gradient at each gate is the channel's worth."""
    for _ in steps:
        for name, vector in sparsity.vectors.items():
            vector.grad = worth[name].clone()
        sparsity.step(0.1)


def test_a_budget_gives_each_layer_the_width_that_its_channels_are_worth() -> None:
    model, graph, x = chain()
    sparsity = BudgetL1(model, graph, macs=0.5, strength=1.0, steps=40, options=FINE)
    worth = {"0": torch.arange(1.0, 17.0), "2": torch.full((16,), 0.1)}
    trained(sparsity, range(40), worth)
    closed = {name: (vector == 0).sum().item() for name, vector in sparsity.vectors.items()}
    assert closed["2"] > 10 > closed["0"] > 0
    # Those of the first layer are its least worthy.
    assert (sparsity.vectors["0"] == 0).tolist() == [True] * closed["0"] + [False] * (16 - closed["0"])
    plan = slim.make_plan(graph, slim.score(model, graph), macs=0.5, **FINE)
    assert all((sparsity.vectors[g.name][list(g.removed)] == 0).all() for g in plan.groups)
    with torch.no_grad():
        assert torch.allclose(slim.apply_plan(model, plan)(x), model(x), atol=1e-6)


def test_the_budget_falls_to_its_target_and_then_the_choice_stays() -> None:
    model, graph, _ = chain()
    sparsity = BudgetL1(model, graph, macs=0.4, strength=1.0, steps=50, options=FINE)
    worth = {"0": torch.arange(1.0, 17.0), "2": torch.arange(1.0, 17.0)}
    shares, counts = [], []
    for _ in range(30):
        shares.append(sparsity.budget())
        trained(sparsity, range(1), worth)
        counts.append(int(sparsity.selected().sum()))
    assert shares[0] == pytest.approx(1 - 0.6 * (1 - (29 / 30) ** 2)) and shares[-1] == pytest.approx(0.4)
    assert shares == sorted(shares, reverse=True) and counts[0] < counts[-1]
    chosen = sparsity.selected()
    trained(sparsity, range(20), {name: values.flip(0) * 100 for name, values in worth.items()})
    assert torch.equal(sparsity.selected(), chosen)


def test_what_a_channel_costs_counts_unless_it_is_left_out() -> None:
    model, graph, _ = chain()
    worth, gone = {"0": 1.0, "2": 0.9}, {}
    for cost_aware in (True, False):
        sparsity = BudgetL1(model, graph, macs=0.9, strength=0.0, steps=1, cost_aware=cost_aware, options=FINE)
        for name, vector in sparsity.vectors.items():
            vector.grad = torch.full((16,), worth[name])
        sparsity.observe()
        gone[cost_aware] = {name: len(removed) for name, removed in sparsity.plan_at(0.9).items()}
    assert gone[True]["0"] > 0 == gone[True]["2"] and gone[False]["2"] > gone[False]["0"]


def test_a_budget_out_of_reach_is_told_before_the_training() -> None:
    model, graph, _ = chain()
    with pytest.raises(SlimError, match=r"macs=0\.001 cannot be reached"):
        BudgetL1(model, graph, macs=0.001, strength=1.0, steps=1)
    with pytest.raises(SlimError, match=r"macs is 1\.5"):
        BudgetL1(model, graph, macs=1.5, strength=1.0, steps=1)


@pytest.mark.parametrize("rank_every", [7, 13, 40])
def test_a_choice_that_stands_aims_at_the_last_of_its_steps(rank_every: int) -> None:
    """The last choice is one for the target, however long it stands: chosen once, it is so from the beginning."""
    model, graph, _ = chain()
    sparsity = BudgetL1(model, graph, macs=0.4, strength=1.0, steps=40, options=FINE, rank_every=rank_every)
    assert (sparsity.budget() == pytest.approx(0.4)) == (rank_every == 40)
    trained(sparsity, range(40), {"0": torch.arange(1.0, 17.0), "2": torch.arange(1.0, 17.0)})
    removed = sparsity.plan_at(0.4)
    assert int(sparsity.selected().sum()) == sum(map(len, removed.values()))
    assert all((sparsity.vectors[name][list(channels)] == 0).all() for name, channels in removed.items())


@pytest.mark.parametrize("penalty", ["loss", "polarisation"])
def test_importance_is_of_the_loss_without_the_penalty(penalty: Literal["loss", "polarisation"]) -> None:
    model, graph, _ = chain()
    sparsity = BudgetL1(model, graph, macs=0.4, strength=5.0, steps=4, options=FINE, penalty=penalty)
    for lr in (0.0, 0.1, 0.1):
        for vector in sparsity.vectors.values():
            vector.grad = torch.full((16,), 0.25)
        if lr:
            sparsity.add_gradient()
            assert any(float((vector.grad - 0.25).abs().max()) > 1 for vector in sparsity.vectors.values())
        sparsity.step(lr)
    assert all(torch.allclose(values, torch.full((16,), 0.0625).double()) for values in sparsity.importance.values())
    assert sparsity.strength_over_gradient() is None


@pytest.mark.parametrize("rank_every", [1, 7])
def test_a_budget_continues_from_its_state(rank_every: int) -> None:
    worth = {"0": torch.rand(16), "2": torch.rand(16)}

    def make() -> BudgetL1:
        model, graph, _ = chain()
        return BudgetL1(model, graph, macs=0.4, strength=1.0, steps=40, options=FINE, rank_every=rank_every)

    whole, first, second = make(), make(), make()
    trained(whole, range(40), worth)
    trained(first, range(11), worth)
    with torch.no_grad():
        for name, vector in second.vectors.items():
            vector.copy_(first.vectors[name])
    second.restore(first.state())
    trained(second, range(29), worth)
    assert torch.equal(whole.joined(), second.joined()) and torch.equal(whole.selected(), second.selected())


def test_a_choice_that_is_restored_is_where_the_gates_are() -> None:
    """States are read on the CPU."""
    first, second = (SmallestHalfL1(Gates().to(device), strength=1.0, rank_every=9) for device in ("cpu", "meta"))
    first.step(0.1)
    second.restore(first.state())
    assert second.selected().device.type == "meta"


def test_a_ranking_stands_for_as_long_as_it_is_asked_to() -> None:
    fresh, once = (SmallestHalfL1(Gates(), strength=1.0, rank_every=n) for n in (1, 1000))
    for sparsity in (fresh, once):
        sparsity.step(0.1)
        with torch.no_grad():
            for vector in sparsity.vectors.values():
                vector[: vector.numel() // 2] = 2.0
        sparsity.step(0.1)
    assert float(once.vectors["g0"].detach()[0]) == pytest.approx(1.9) and float(fresh.vectors["g0"].detach()[0]) == 2.0


def test_over_all_vectors_the_smallest_of_them_all_shrink() -> None:
    sparsity = SmallestHalfL1(Gates(), strength=1.0, scope="all", fraction=33 / sum(SIZES))
    with torch.no_grad():
        sparsity.vectors["g1"].fill_(0.5)
    assert sparsity.selected().tolist() == [False] * 16 + [True] * 33 + [False] * (64 + 128)


def test_penalties_of_the_loss_add_their_gradient_and_leave_the_step_alone() -> None:
    sparsity = SmallestHalfL1(Gates(), strength=3.0, penalty="loss")
    before = gradients(sparsity, 0.5)[0].clone()
    sparsity.add_gradient()
    sparsity.step(0.1)
    vector = sparsity.vectors["g0"]
    assert (vector.grad - before).tolist() == [3.0] * 8 + [0.0] * 8 and vector.tolist() == [1.0] * 16
    polarised = SmallestHalfL1(Gates(), strength=1.0, penalty="polarisation")
    with torch.no_grad():
        for vector in polarised.vectors.values():
            vector.fill_(3.0)
        polarised.vectors["g3"].fill_(1.0)  # 128 of 241 factors stand below the mean
    polarised.add_gradient()
    # t - (sign - mean of signs): what is small is drawn to 0, what is large away from the mean.
    mean = (113 - 128) / 241
    low, high = (polarised.vectors[name].grad for name in ("g3", "g0"))
    assert low is not None and float(low[0]) == pytest.approx(1.2 + 1 + mean)
    assert high is not None and float(high[0]) == pytest.approx(1.2 - 1 + mean)


def test_weights_of_norms_shrink_towards_zero_from_both_sides() -> None:
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([-0.3, 0.05, 2.0, -3.0]))
    sparsity = SmallestHalfL1(norm, strength=1.0, vectors={"bn": norm.weight})
    sparsity.step(0.1)
    assert norm.weight.tolist() == pytest.approx([-0.2, 0.0, 2.0, -3.0])


def test_a_gate_that_was_negative_becomes_a_plain_zero() -> None:
    """-0 equals 0, but its bits are others."""
    sparsity = SmallestHalfL1(Gates(), strength=1.0)
    with torch.no_grad():
        sparsity.vectors["g0"][:3] = torch.tensor([-0.05, -0.5, 0.05])
    sparsity.step(0.1)
    low = sparsity.vectors["g0"].detach()[:3]
    assert low.tolist() == [0.0, 0.0, 0.0] and not bool(low.signbit().any())


def gradients(sparsity: SmallestHalfL1, value: float) -> list[Tensor]:
    for vector in sparsity.vectors.values():
        vector.grad = torch.full_like(vector, 100.0)
    for vector in sparsity.vectors.values():
        vector.grad[: vector.numel() // 2] = value  # what is shrunk of equal gates
    return [vector.grad for vector in sparsity.vectors.values()]


def test_strength_over_gradient_is_measured_where_gates_are_shrunk() -> None:
    sparsity = SmallestHalfL1(Gates(), strength=3.0)
    assert sparsity.strength_over_gradient() is None
    gradients(sparsity, -0.5)
    assert sparsity.strength_over_gradient() == pytest.approx(6.0)


def test_closed_gates_are_zero_inside_and_themselves_again_outside() -> None:
    model = Gates()
    vector = model.gates[0].vectors[0]
    with closed_gates_at_zero(model) as changed:
        assert not changed
    with torch.no_grad():
        vector[:2] = torch.tensor([CLOSED / 2, CLOSED * 2])
    with closed_gates_at_zero(model) as changed:
        assert changed and vector[:2].tolist() == [0.0, pytest.approx(CLOSED * 2)]
    assert float(vector.detach()[0]) == pytest.approx(CLOSED / 2)
