"""A pull whose strength follows from how many gates it shall close."""

from __future__ import annotations

import torch

from slim.errors import SlimError
from slim.gate import CLOSED, SmallestHalfL1

ARRIVAL = 0.8
"""By this share of the sparse steps' learning rates the gates shall be closed; what is left is for holding them."""
HORIZON = 0.02
"""What a late controller plans with, as a share of the sparse steps' learning rates."""
NUDGE = 1.03
"""Factor by which the strength grows in a step in which closed gates have opened again."""
MEMORY = 0.9
"""Weight of the past in the running measure of how far the pull really moves a gate."""


class ClosedShareController:
    """Raises or lowers a pull's strength so that ``share`` of all gates is closed when the sparse steps end.

    The pull is limited to that many gates, the smallest over all vectors and at most its fraction of each. Until they are
    closed its strength is what takes the largest of them to 0 in time: its size over the learning rates that are left,
    over the part of the pull's travel that the loss has let through so far. After that the strength stays, and is nudged
    up while the loss opens some again. Take ``step`` in place of the pull's. ``total_lr`` is the sum of the learning rates
    over the sparse steps. SlimError when ``share`` is more than what is pulled.
    """

    def __init__(self, pull: SmallestHalfL1, share: float, total_lr: float) -> None:
        total = pull.joined().numel()
        reachable = int(pull.pulled().sum())
        if not 0 < share <= pull.fraction:
            raise SlimError(
                f"closed share {share}: expected above 0 and at most the fraction that is pulled, {pull.fraction}"
            )
        if not total_lr > 0:
            raise SlimError(f"the learning rates of the sparse steps sum to {total_lr}; expected more than 0")
        self.pull = pull
        # Vectors of odd size have no exact half.
        self.wanted = min(max(1, round(share * total)), reachable)
        pull.limit = self.wanted
        self.total_lr = total_lr
        self.spent_lr = 0.0
        self.reached = False
        self.let_through = 1.0
        self._expected: float | None = None
        self._frontier = 0.0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Set the strength and pull once with learning rate ``lr``, in place."""
        gates = self.pull.joined()
        frontier = float(gates[self.pull.pulled()].max())
        self.reached |= frontier < CLOSED
        if self.reached:
            self.pull.strength *= NUDGE if frontier >= CLOSED else 1.0
        else:
            self._measure(frontier)
            left = max(ARRIVAL * self.total_lr - self.spent_lr, HORIZON * self.total_lr)
            self.pull.strength = frontier / (left * self.let_through)
        self._frontier, self._expected = frontier, lr * self.pull.strength
        self.spent_lr += lr
        self.pull.step(lr)

    def _measure(self, frontier: float) -> None:
        if self._expected:
            passed = (self._frontier - frontier) / self._expected
            # A gate that the loss pushes back for a moment must not make the strength explode.
            self.let_through = MEMORY * self.let_through + (1 - MEMORY) * min(max(passed, 0.05), 1.0)

    def state(self) -> dict[str, float | bool | None]:
        """What ``restore`` needs to continue exactly."""
        names = ("reached", "spent_lr", "let_through", "_expected", "_frontier")
        return {"strength": self.pull.strength, **{name: getattr(self, name) for name in names}}

    def restore(self, state: dict[str, float | bool | None]) -> None:
        """Continue from a ``state``, in place."""
        rest = dict(state)
        self.pull.strength = float(rest.pop("strength") or 0.0)
        for name, value in rest.items():
            setattr(self, name, value)
