"""A detector of two convolutions, its loss, its batches and an L1 step: all that the loop needs, in milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import TRAINING_STATE_KEY, Evaluation
from slim import BudgetL1, Gate, SmallestHalfL1, trace, write_atomically


class TinyDetector(nn.Module):
    """Training: [raw]; evaluation: (decoded [B, N, 6], [raw]). Dropout makes it depend on the random state."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.gate = Gate(["conv"], [nn.Parameter(torch.ones(4))])
        self.drop = nn.Dropout2d(0.3)
        self.head = nn.Conv2d(4, 6, 1)

    def forward(self, images: Tensor) -> Any:
        raw = self.head(self.drop(self.gate(torch.relu(self.norm(self.conv(images))))))
        return [raw] if self.training else (raw.flatten(2).transpose(1, 2), [raw])

    @property
    def gate_vector(self) -> Tensor:
        return self.gate.vectors[0]


def squared_loss(outputs: list[Tensor], targets: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    box = (outputs[0].mean((2, 3)) - targets.mean(0)).square().mean()
    obj = outputs[0].square().mean()
    return box + obj, {"box": box.detach(), "obj": obj.detach()}


@dataclass
class TinyBatch:
    images: Tensor
    targets: Tensor
    image_ids: list[int]
    letterboxes: list[Any]


@dataclass
class TinySet:
    epoch: int = -1
    epochs: list[int] = field(default_factory=list)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.epochs.append(epoch)


class TinyLoader:
    """Batches that depend on the epoch alone."""

    def __init__(self, batches: int = 3) -> None:
        self.dataset = TinySet()
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[TinyBatch]:
        random = torch.Generator().manual_seed(self.dataset.epoch)
        for _ in range(self.batches):
            images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=random)
            yield TinyBatch(images, torch.rand(5, 6, generator=random), [0, 1], [None, None])


class RecordingL1(SmallestHalfL1):
    """The L1 step on the gate of a TinyDetector; writes down with what learning rate it is taken."""

    def __init__(self, model: TinyDetector, strength: float = 0.0, calls: list[Any] | None = None) -> None:
        super().__init__(model, strength=strength)
        self.calls: list[Any] = [] if calls is None else calls

    def step(self, lr: float) -> None:
        self.calls.append(("L1 step", lr))
        super().step(lr)


def budget_l1(model: TinyDetector, steps: int, **options: Any) -> BudgetL1:
    """The L1 step that closes half of a TinyDetector's gate, those of least importance."""
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    fine = {"round_to": 1, "min_channels": 1}
    return BudgetL1(model, graph, macs=0.5, strength=99.0, steps=steps, options=fine, **options)


def save(path: Path, model: nn.Module, state: dict[str, Any] | None) -> None:
    content: dict[str, Any] = {"model": model.state_dict()}
    if state is not None:
        content[TRAINING_STATE_KEY] = state
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def evaluation_of(ap: float) -> Evaluation:
    return Evaluation(ap, ap, ap, {"thing": ap}, 2, 0.1, [])


def weight_sum(model: nn.Module) -> Evaluation:
    """An "AP" that depends on the weights and, like a real evaluation may, disturbs the random state."""
    torch.rand(3)
    return evaluation_of(float(torch.sigmoid(sum(parameter.detach().sum() for parameter in model.parameters()))))
