"""Proofs tell rounding, and choices that turn on it, from networks that differ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import slim
from tests.slim.networks import Shifted
from tests.slim.test_operators import Net

X = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_rounding_is_told_from_a_difference() -> None:
    assert slim.prove(Shifted(0.0), Shifted(0.0), X) == slim.Proof(0.0)
    rounded = slim.prove(Shifted(0.0), Shifted(1e5), X)
    assert rounded.difference > 1e-4 and rounded.in_float64 is not None and rounded.in_float64 < 1e-9
    assert "which is rounding: in float64 to" in str(rounded)
    remade = slim.prove(Shifted(0.0), Shifted(1.0, 1.001), X, remade=lambda wide: wide)
    assert remade.difference > 1e-4 and remade.in_float64 == 0, "made anew in float64"
    with pytest.raises(slim.SlimError, match=r"differ by 1\.0e-03 .*expected at most 0\.0001 \(in float64 1\.0e-03\)"):
        slim.prove(Shifted(0.0), Shifted(0.0, 1.001), X)
    assert slim.prove(Shifted(0.0), Shifted(0.0, 1.001), X, tolerance=1e-2).difference > 1e-4


class TopK(nn.Module):
    """Two near-ties, of which rounding chooses one, as a detector's queries."""

    def __init__(self, order: list[int], factor: float = 1.0) -> None:
        super().__init__()
        self.order, self.factor = order, factor
        self.terms = nn.Parameter(torch.tensor([1e8, 1.0, 1.0, -1e8, 1e-3]))

    def forward(self, x: Tensor) -> Tensor:
        total = self.terms[0]
        for n in self.order:
            total = total + self.terms[n]
        scores = torch.stack([total, total.new_tensor(1.5)])
        return self.factor * torch.stack([x.mean(), 5 * x.mean()])[scores.argmax()]


def test_a_choice_between_near_ties_is_rounding() -> None:
    """1e8 + 1 + 1 - 1e8 is 0 in float32, 2 in float64 and in another order."""
    one, other = TopK([1, 2, 3, 4]), TopK([3, 1, 2, 4])
    proof = slim.prove(one, other, X)
    assert proof.difference > 0.5 and proof.in_float64 == 0
    with pytest.raises(slim.SlimError, match=r"in float64 1\.0e-02"):
        slim.prove(one, TopK([3, 1, 2, 4], factor=1.01), X)


def test_networks_that_cannot_run_in_float64_are_no_proof() -> None:
    """What holds float32 tensors of its own mixes types."""
    first, second = (Net(lambda m, x, f=f: x @ torch.eye(8) * f) for f in (1.0, 1.01))
    assert slim.prove(first, first, X).difference == 0
    with pytest.raises(slim.SlimError, match=r"differ by 1.0e-02 .*they do not run in float64"):
        slim.prove(first, second, X)
