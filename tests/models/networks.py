"""Small networks for tests of checkpoints and blocks."""

from __future__ import annotations

from typing import Any

from torch import nn


def two_levels(**keys: Any) -> dict[str, Any]:
    """A description of two levels at strides 2 and 4, 2 classes, a few thousand parameters."""
    return {
        "nc": 2,
        "anchors": [[4, 5, 6, 6], [12, 10, 20, 24]],
        "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [8, 3, 2]], [-1, 2, "C3", [8]]],
        "head": [
            [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
            [[-1, 0], 1, "Concat", [1]],
            [-1, 1, "C3", [8, "False"]],
            [[5, 2], 1, "Detect", ["nc", "anchors"]],
        ],
        **keys,
    }


def draw_statistics(model: nn.Module) -> None:
    """Give each batch norm statistics of its own, as training leaves them; in place."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
