"""The sparse part of a training: what pulls the gates, and how it is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from slim import SmallestHalfL1, closed_gates_at_zero

from .evaluation import Evaluation


class Pulling(Protocol):
    """What sparse training does to the gates after a step: `slim.SmallestHalfL1` or `slim.ClosedShareController`."""

    def step(self, lr: float) -> None: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Sparsity:
    """The sparse part of a training.

    Args:
        pull: measures the gates; with `by` absent it also moves them
        by: what takes the step in the pull's place, such as a controller of its strength
        from_epoch: first epoch in which gates are pulled; before it, and with None in all epochs, they are only kept at or
            above 0
    """

    pull: SmallestHalfL1
    by: Pulling | None = None
    from_epoch: int | None = 0

    @property
    def mover(self) -> Pulling:
        return self.by or self.pull

    def pulls_in(self, epoch: int) -> bool:
        return self.from_epoch is not None and epoch >= self.from_epoch

    def step(self, epoch: int, lr: float) -> None:
        """What is done to the gates after a step of `epoch`, in place."""
        if self.pulls_in(epoch):
            self.mover.step(lr)
        else:
            self.pull.project()

    def measured(self, epoch: int) -> float | None:
        """The pull against the gradient, where gates are pulled."""
        return self.pull.strength_over_gradient() if self.pulls_in(epoch) else None

    def masked_ap(self, model: nn.Module, evaluate: Callable[[nn.Module], Evaluation]) -> float | None:
        """AP with closed gates at exactly 0, which is what a cut of them leaves; None where they all are 0 already."""
        if self.from_epoch is None:
            return None
        with closed_gates_at_zero(model) as changed:
            return evaluate(model).ap if changed else None

    def scalars(
        self, epoch: int, measured: float | None, evaluation: Evaluation | None, masked_ap: float | None
    ) -> dict[str, float | None]:
        """Whether it is sparse enough, and whether the pull is strong enough: TensorBoard's scalars of an epoch."""
        if self.from_epoch is None:
            return {}
        plain = None if evaluation is None else evaluation.ap
        return {
            "loss/l1": self.pull.penalty(),
            "gates/strength": self.pull.strength if self.pulls_in(epoch) else 0.0,
            "gates/pull_over_gradient": measured,
            "metrics/masked_ap": plain if masked_ap is None else masked_ap,
        }
