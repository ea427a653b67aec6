"""The sparse part of a training: what changes the gates after a step, and how it is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from slim import ChannelGraph, L1Step, closed_gates_at_zero, open_channels

from .evaluation import Evaluation


@dataclass(frozen=True)
class Sparsity:
    """The sparse part of a training.

    Args:
        l1: takes the L1 step and measures the gates
        from_epoch: first epoch with the L1 step; before it, and with None in all epochs, gates are only kept at or above 0
        graph: of the network, for the open channels of its layers
    """

    l1: L1Step
    from_epoch: int | None = 0
    graph: ChannelGraph | None = None

    def is_active(self, epoch: int) -> bool:
        """Whether the L1 step is taken in an epoch."""
        return self.from_epoch is not None and epoch >= self.from_epoch

    def before_step(self, epoch: int) -> None:
        """Add the penalty's gradient, where it is part of the loss, before an optimiser step of `epoch`; in place."""
        if self.is_active(epoch):
            self.l1.add_gradient()

    def step(self, epoch: int, lr: float) -> None:
        """Change the gates after an optimiser step of `epoch`, in place."""
        self.l1.step(lr if self.is_active(epoch) else 0.0)

    def masked_ap(self, model: nn.Module, evaluate: Callable[[nn.Module], Evaluation]) -> float | None:
        """AP with closed gates at exactly 0, as a cut leaves them; None where they all are 0 already."""
        if self.from_epoch is None:
            return None
        with closed_gates_at_zero(model) as changed:
            return evaluate(model).ap if changed else None

    def channels(self) -> dict[str, int]:
        """Open channels of each layer; empty where no gates are to close."""
        if self.graph is None or self.from_epoch is None:
            return {}
        return open_channels(self.graph, self.l1.gates())

    def scalars(self, epoch: int, over_gradient: float | None, masked_ap: float | None) -> dict[str, float | None]:
        """An epoch's scalars for TensorBoard: is the network sparse enough, and is the L1 step strong enough?"""
        if self.from_epoch is None:
            return {}
        return {
            "loss/l1": self.l1.sum_of_selected(),
            "gates/strength": self.l1.strength if self.is_active(epoch) else 0.0,
            "gates/pull_over_gradient": over_gradient,
            "metrics/masked_ap": masked_ap,
        }
