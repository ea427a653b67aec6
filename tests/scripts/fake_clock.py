"""A machine whose networks take a fixed time and one by their MACs, in place of the real one."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import slim
from detection import latency as latency
from detection.timing import Comparison, Timing


@dataclass
class FakeClock:
    """``fixed`` of the dense network's ``dense_ms`` does not fall with MACs; ``again`` is what each later measurement of the
    same network is longer by; ``measured`` are the MACs of all networks that were measured."""

    dense_ms: float = 10.0
    fixed: float = 0.2
    again: float = 1.0
    measured: list[int] = field(default_factory=list)
    alone: int = 0
    warning: str = ""

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def time_dense(measurer: latency.Measurer) -> Timing:
            self.alone += 1
            return self.times(1.0)

        def against_dense(measurer: latency.Measurer, model: nn.Module) -> Comparison:
            example = torch.zeros_like(measurer.images[:1])
            macs = slim.cost(model, example).macs
            ratio = self.fixed + (1 - self.fixed) * macs / slim.cost(measurer.dense.model, example).macs
            ratio *= self.again if macs in self.measured else 1.0
            self.measured.append(macs)
            return Comparison(self.times(1.0), self.times(ratio), ratio, 0.001)

        monkeypatch.setattr(latency.Measurer, "time_dense", time_dense)
        monkeypatch.setattr(latency.Measurer, "against_dense", against_dense)

    def times(self, ratio: float) -> Timing:
        return Timing((self.dense_ms * ratio,) * 40, self.warning)
