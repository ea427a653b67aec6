from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from slim import CLOSED, ClosedShareController, Gate, SlimError, SmallestHalfL1, closed_gates_at_zero

SIZES = (16, 33, 64, 128)
STEPS, LR = 260, 0.01


class Gates(nn.Module):
    """Gate vectors alone."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList(Gate([f"g{i}"], [nn.Parameter(torch.ones(size))]) for i, size in enumerate(SIZES))


def resisting(share: float, stiffness: float, noise: float = 0.0) -> tuple[SmallestHalfL1, list[float]]:
    """SGD on 0.5 * k * (gate - 1)^2 with k from 0 to ``stiffness``, under the controller; the strengths it used."""
    random = torch.Generator().manual_seed(0)
    sparsity = SmallestHalfL1(Gates(), strength=0.0)
    lrs = [LR * (1 - 0.99 * step / STEPS) for step in range(STEPS)]
    controller = ClosedShareController(sparsity, share, sum(lrs))
    vectors = list(sparsity.vectors.values())
    resistances = [stiffness * torch.rand(vector.shape, generator=random) ** 2 for vector in vectors]
    strengths = []
    for lr in lrs:
        with torch.no_grad():
            for vector, resistance in zip(vectors, resistances, strict=True):
                jitter = noise * torch.randn(vector.shape, generator=random)
                vector -= lr * (resistance * (vector - 1) + jitter)
        controller.step(lr)
        strengths.append(sparsity.strength)
    return sparsity, strengths


@pytest.mark.parametrize("share", [0.5, 0.4, 0.25, 0.1])
@pytest.mark.parametrize(("stiffness", "noise"), [(0.01, 0.0), (0.5, 0.0), (5.0, 0.0), (0.5, 0.25)])
def test_the_share_is_reached_whatever_the_resistance(share: float, stiffness: float, noise: float) -> None:
    sparsity, _ = resisting(share, stiffness, noise)
    assert sparsity.closed_share() == pytest.approx(share, abs=0.01)


def test_more_resistance_takes_more_strength() -> None:
    assert resisting(0.4, 5.0)[1][-1] > 4 * resisting(0.4, 0.01)[1][-1]


def test_the_strength_of_unopposed_gates_is_their_distance_over_the_learning_rates_left() -> None:
    sparsity = SmallestHalfL1(Gates(), strength=0.0)
    controller = ClosedShareController(sparsity, 0.5, total_lr=10.0)
    controller.step(0.1)
    assert sparsity.strength == pytest.approx(1 / 8)  # a travel of 1 in 80 % of the learning rates
    controller.step(0.1)
    assert sparsity.strength == pytest.approx((1 - 0.1 / 8) / 7.9, rel=1e-5)


def test_only_the_smallest_of_all_are_shrunk_when_the_share_is_below_the_fraction() -> None:
    sparsity = SmallestHalfL1(Gates(), strength=1.0)
    with torch.no_grad():
        sparsity.vectors["g1"][:] = torch.linspace(0.2, 0.5, 33)
    sparsity.limit = 10
    chosen = sparsity.selected()
    assert int(chosen.sum()) == 10
    assert chosen[16:26].all()  # the ten smallest of g1
    sparsity.limit = 20  # g1 may give its smaller half, 16, and the rest comes from equal gates in order
    assert sparsity.selected()[:20].tolist() == [True] * 4 + [False] * 12 + [True] * 4


def test_a_controller_continues_from_its_state() -> None:
    def push(sparsity: SmallestHalfL1) -> None:
        with torch.no_grad():
            for vector in sparsity.vectors.values():
                vector += 0.001

    whole = SmallestHalfL1(Gates(), strength=0.0)
    controller = ClosedShareController(whole, 0.3, 1.0)
    for _ in range(30):
        controller.step(0.01)
        push(whole)
    middle, gates = controller.state(), whole.joined().clone()
    again = SmallestHalfL1(Gates(), strength=7.0)
    with torch.no_grad():
        for vector, part in zip(again.vectors.values(), gates.split(list(SIZES)), strict=True):
            vector.copy_(part)
    resumed = ClosedShareController(again, 0.3, 1.0)
    resumed.restore(middle)
    for _ in range(60):
        for c, p in ((controller, whole), (resumed, again)):
            c.step(0.01)
            push(p)
    assert torch.equal(whole.joined(), again.joined()) and whole.strength == again.strength


def test_what_cannot_be_reached_is_refused() -> None:
    sparsity = SmallestHalfL1(Gates(), strength=0.0)
    for share in (0.0, 0.6):
        with pytest.raises(SlimError, match=f"closed share {share}: expected above 0 and at most the fraction .* 0.5"):
            ClosedShareController(sparsity, share, 1.0)
    with pytest.raises(SlimError, match="rates of the sparse steps sum to 0"):
        ClosedShareController(sparsity, 0.5, 0.0)


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
