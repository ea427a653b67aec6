from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import EngineError, milliseconds_per_image


class Sleeper(nn.Module):
    def __init__(self, name: str, seconds: float, order: list[str]) -> None:
        super().__init__()
        self.name, self.seconds, self.order = name, seconds, order

    def forward(self, images: Tensor) -> Any:
        assert not self.training
        self.order.append(self.name)
        time.sleep(self.seconds)
        return images


def test_models_take_turns_and_the_median_is_per_image() -> None:
    order: list[str] = []
    models = {"slow": Sleeper("slow", 0.02, order), "fast": Sleeper("fast", 0.004, order)}
    found = milliseconds_per_image(models, torch.zeros(2, 3, 8, 8), repeats=3, warmup=1)
    assert len(order) == 8
    assert all(one != other for one, other in pairwise(order))
    assert found["slow"] >= 10
    assert found["fast"] >= 2
    assert found["slow"] > found["fast"]
    assert models["slow"].training


def test_no_repeat_is_an_error() -> None:
    with pytest.raises(EngineError, match="repeats=0"):
        milliseconds_per_image({}, torch.zeros(1, 3, 8, 8), repeats=0)
