"""Sparse training: the L1 step on the smallest part of every gate vector, and a controller of its strength."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from slim.errors import SlimError
from slim.gate import CLOSED, gate_vectors


class SmallestHalfL1:
    """The L1 step on the smallest part of every gate vector, a proximal step.

    Take it once, right after ``optimizer.step()``: in each vector the ``fraction`` of entries that is smallest by
    magnitude (the ranking is fresh at each step; of equal entries the ones of lower index) becomes
    ``max(0, gate - lr * strength)``; the others become ``max(0, gate)``. Unlike a term in the loss it reaches exactly 0
    and owes nothing to batch size, loss scale, momentum or AMP. (Proximal operator of the L1 norm: Parikh and Boyd,
    "Proximal Algorithms", 2014, section 6.5.2.)

    ``strength`` and ``limit`` may be changed between steps. ``limit`` is the largest number of gates that a step shrinks,
    the smallest over all vectors; None for no such limit.

    Args:
        model: a model with gates, see ``slim.add_gates``; vectors that require no gradient are left alone
        strength: how far a gate moves in one step, per unit of learning rate; see ``slim.strength_for``
        fraction: share of each vector that is shrunk, 0..1

    Raises:
        SlimError: for values out of range, and when the model has no gate that is trained.

    Example:
        >>> import slim, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
        >>> gates = slim.add_gates(model, slim.trace(model, torch.zeros(1, 3, 8, 8)))
        >>> sparsity = slim.SmallestHalfL1(model, strength=2.0)
        >>> sparsity.step(lr=0.25)  # after each optimizer.step()
        >>> gates["0"].tolist()
        [0.5, 0.5, 1.0, 1.0]
    """

    limit: int | None = None

    def __init__(self, model: nn.Module, *, strength: float, fraction: float = 0.5) -> None:
        if not 0.0 <= fraction <= 1.0:
            raise SlimError(f"fraction is {fraction}; expected 0 to 1, the part of each gate vector that is shrunk")
        if not strength >= 0.0:
            raise SlimError(f"strength is {strength}; expected a number of at least 0")
        gates = gate_vectors(model)
        if not gates:
            raise SlimError("the model has no gates to shrink; call slim.add_gates(model, graph) first")
        self.vectors = {name: vector for name, vector in gates.items() if vector.requires_grad}
        if not self.vectors:
            raise SlimError(f"all {len(gates)} gate vectors of the model are frozen; leave one its requires_grad")
        self.strength = strength
        self.fraction = fraction
        self._sizes = [vector.numel() for vector in self.vectors.values()]
        # All vectors are ranked at once, as rows of a table that is as wide as the longest of them.
        width = max(self._sizes)
        self._slots = torch.cat([row * width + torch.arange(size) for row, size in enumerate(self._sizes)])
        self._counts = torch.tensor([[int(size * fraction)] for size in self._sizes])

    @torch.no_grad()
    def selected(self) -> Tensor:
        """Which gates the next step shrinks: bool [all gates], in the order of ``joined``."""
        gates = self.joined()
        slots, counts = self._slots.to(gates.device), self._counts.to(gates.device)
        table = gates.new_full((len(self._sizes), max(self._sizes)), float("inf"))
        table.view(-1)[slots] = gates.abs()
        order = torch.sort(table, dim=1, stable=True).indices
        is_low = torch.arange(table.shape[1], device=gates.device) < counts
        chosen = torch.zeros_like(table, dtype=torch.bool).scatter_(1, order, is_low).view(-1)[slots]
        if self.limit is not None:
            ranked = gates.abs().masked_fill_(~chosen, float("inf")).sort(stable=True).indices
            chosen[ranked[self.limit :]] = False
        return chosen

    def joined(self) -> Tensor:
        """All gates one after another, detached, [all gates]."""
        return torch.cat([vector.detach() for vector in self.vectors.values()])

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Take one L1 step with learning rate ``lr``, in place; keeps the gates at or above 0."""
        if self.strength > 0:
            gates = self.joined().sub_(self.selected() * (lr * self.strength))
            torch._foreach_copy_(list(self.vectors.values()), list(gates.split(self._sizes)))
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Keep the gates at or above 0 and do nothing else, in place."""
        torch._foreach_clamp_min_(list(self.vectors.values()), 0.0)

    def penalty(self) -> float:
        """Sum of the magnitudes of the gates that the next step would shrink."""
        return float(self.joined()[self.selected()].abs().sum())

    def closed_share(self) -> float:
        """Share of these gates that are closed, 0..1."""
        gates = self.joined()
        return int((gates.abs() < CLOSED).sum()) / gates.numel()

    def strength_over_gradient(self) -> float | None:
        """Strength over the mean magnitude of the loss's gradient at the gates that are shrunk; above 1 they close.

        Read it between a backward pass and the next ``zero_grad``. None where there is no gradient.
        """
        gradients = [vector.grad for vector in self.vectors.values() if vector.grad is not None]
        if len(gradients) < len(self.vectors):
            return None
        opposed = float(torch.cat(gradients)[self.selected()].abs().mean())
        return self.strength / opposed if opposed > 0 else None

    def gates(self) -> dict[str, Tensor]:
        """The gate vectors by name, detached (for histograms)."""
        return {name: vector.detach() for name, vector in self.vectors.items()}

    def state(self) -> dict[str, float]:
        """What ``restore`` needs to continue exactly."""
        return {"strength": self.strength}

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue from a ``state``, in place."""
        self.strength = state["strength"]


def strength_for(total_lr: float, travel: float = 2.0) -> float:
    """The strength with which an unopposed gate moves by ``travel`` in all.

    Args:
        total_lr: sum of the learning rates over the sparse steps
        travel: how far; a gate starts at 1 and the data resists, so that 2 closes about the smallest half

    Raises:
        SlimError: when ``total_lr`` is not above 0.

    Example:
        >>> import slim
        >>> slim.strength_for(total_lr=0.5, travel=2.0)
        4.0
    """
    if not total_lr > 0:
        raise SlimError(
            f"the learning rates of the sparse steps sum to {total_lr}; expected more than 0 (train longer)"
        )
    return travel / total_lr


ARRIVAL = 0.8
"""By this share of the sparse steps' learning rates the gates shall be closed; the rest keeps them closed."""
HORIZON = 0.02
"""What a late controller plans with, as a share of the sparse steps' learning rates."""
NUDGE = 1.03
"""Factor by which the strength grows in a step in which closed gates have opened again."""
MEMORY = 0.9
"""Weight of the past in the running measure of how far the L1 step really moves a gate."""


class ClosedShareController:
    """Raises or lowers the strength of L1 steps so that ``share`` of all gates is closed when the sparse steps end.

    The L1 step is limited to that many gates, the smallest over all vectors and at most its fraction of each. Until they
    are closed its strength is what takes the largest of them to 0 in time: its size over the learning rates that are left,
    over the part of the step that the loss has let through so far. After that the strength stays, and is nudged up while
    the loss opens some again. Call this ``step`` in place of the L1 step's.

    Args:
        sparsity: the L1 step; its ``strength`` and ``limit`` are set
        share: of all gates, above 0 and at most the L1 step's fraction
        total_lr: sum of the learning rates over the sparse steps

    Raises:
        SlimError: when ``share`` is out of this range or ``total_lr`` not above 0.
    """

    def __init__(self, sparsity: SmallestHalfL1, share: float, total_lr: float) -> None:
        if not 0 < share <= sparsity.fraction:
            raise SlimError(
                f"closed share {share}: expected above 0 and at most the fraction that is shrunk, {sparsity.fraction}"
            )
        if not total_lr > 0:
            raise SlimError(f"the learning rates of the sparse steps sum to {total_lr}; expected more than 0")
        self.sparsity = sparsity
        # Vectors of odd size have no exact half.
        sparsity.limit = min(max(1, round(share * sparsity.joined().numel())), int(sparsity.selected().sum()))
        self.total_lr = total_lr
        self.spent_lr = 0.0
        self.reached = False
        self.let_through = 1.0
        self._expected: float | None = None
        self._frontier = 0.0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Set the strength and take one L1 step with learning rate ``lr``, in place."""
        frontier = float(self.sparsity.joined()[self.sparsity.selected()].max())
        self.reached |= frontier < CLOSED
        if self.reached:
            self.sparsity.strength *= NUDGE if frontier >= CLOSED else 1.0
        else:
            if self._expected:
                passed = (self._frontier - frontier) / self._expected
                # A gate that the loss opens for a moment must not make the strength explode.
                self.let_through = MEMORY * self.let_through + (1 - MEMORY) * min(max(passed, 0.05), 1.0)
            left = max(ARRIVAL * self.total_lr - self.spent_lr, HORIZON * self.total_lr)
            self.sparsity.strength = frontier / (left * self.let_through)
        self._frontier, self._expected = frontier, lr * self.sparsity.strength
        self.spent_lr += lr
        self.sparsity.step(lr)

    def state(self) -> dict[str, float | bool | None]:
        """What ``restore`` needs to continue exactly."""
        names = ("reached", "spent_lr", "let_through", "_expected", "_frontier")
        return {"strength": self.sparsity.strength, **{name: getattr(self, name) for name in names}}

    def restore(self, state: Mapping[str, float | bool | None]) -> None:
        """Continue from a ``state``, in place."""
        for name, value in state.items():
            setattr(self.sparsity if name == "strength" else self, name, value)
