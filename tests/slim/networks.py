"""Small networks with hand-set weights for slim's tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import slim


def conv(inputs: int, outputs: int, kernel: int = 1, **kwargs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **kwargs),
        nn.BatchNorm2d(outputs),
        nn.SiLU(),
    )


class Shifted(nn.Module):
    """x, in steps whose rounding float32 shows and float64 does not; or a wrong x."""

    def __init__(self, by: float, factor: float = 1.0) -> None:
        super().__init__()
        self.shift, self.factor = nn.Parameter(torch.tensor(by)), factor

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.factor + self.shift) - self.shift


class Chain(nn.Module):
    """Two gateable groups of 4 and 6 channels and a frozen head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = conv(3, 4, 3)
        self.second = conv(4, 6)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(x)))
        return out


class Residual(nn.Module):
    """A residual sum, a concatenation, max pooling and a depthwise layer: 8 + 8 channels, 16 concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8, 3)
        self.branch = nn.Sequential(conv(8, 12), conv(12, 8, 3))
        self.side = conv(8, 8)
        self.depthwise = conv(16, 16, 3, groups=16)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.branch(x)
        x = torch.cat([nn.functional.max_pool2d(x, 3, 1, 1), self.side(x)], 1)
        out: Tensor = self.head(self.depthwise(x))
        return out


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Non-trivial batch-norm statistics, and gates between 0 and 1.5."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)):
                continue
            if module.weight is not None:
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_(0, 0.3, generator=generator)  # type: ignore[union-attr,operator]
                module.running_var.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr,operator]
        for name, parameter in model.named_parameters():
            if ".vectors." in name:
                parameter.uniform_(0, 1.5, generator=generator)
    return model.eval()


def settle(model: nn.Module, x: Tensor) -> nn.Module:
    """Batch-norm statistics that fit the data, so that a deep network's output really depends on every layer."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def prove(
    model: nn.Module, x: Any, keep: float = 0.5, seed: int = 0, tolerance: float = 1e-4
) -> tuple[slim.ChannelGraph, slim.Plan]:
    """Cut to a share of the channels, chosen at random, and assert pruned = masked and that something was cut."""
    graph = slim.trace(model, x)
    plan = slim.make_plan(
        graph, slim.score(model, graph, "random", seed=seed), channels=keep, round_to=1, min_channels=1, scope="local"
    )
    masked, pruned = slim.mask(model, plan), slim.apply_plan(model, plan)
    difference = slim.max_difference(masked, pruned, x)
    assert difference <= tolerance, f"pruned differs from masked by {difference}"
    return graph, plan
