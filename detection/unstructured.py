"""Single weights set to zero: what channel pruning is compared with."""

from __future__ import annotations

import copy
from typing import Literal

from torch import nn
from torch.nn.utils import prune


def zero_smallest(
    model: nn.Module, share: float, scope: Literal["layer", "global"]
) -> tuple[nn.Module, dict[str, tuple[int, int]]]:
    """A copy in which this share of the convolutions' weights, the smallest by magnitude, is zero; and for each convolution
    its zeros and its weights.

    ``layer``: the share of each convolution, to the next whole weight; ``global``: of all together. Biases stay. The
    copy's convolutions hold plain parameters again, and its shapes are the model's.
    """
    model = copy.deepcopy(model)
    convolutions = {path: module for path, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    if scope == "global":
        pairs = [(module, "weight") for module in convolutions.values()]
        prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=share)
    for module in convolutions.values():
        if scope == "layer":
            prune.l1_unstructured(module, "weight", amount=share)
        prune.remove(module, "weight")
    counts = {path: (int((m.weight == 0).sum()), m.weight.numel()) for path, m in convolutions.items()}
    return model, counts


def share_of_zeros(model: nn.Module) -> float:
    """Of the convolutions' weights."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
