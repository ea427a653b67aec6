"""What a training moves and how: frozen layers, optimiser, learning-rate schedule and moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import compress

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from slim import NORMS, SlimError, gate_parameters

from .settings import OptimConfig

MAX_WARMUP_SHARE = 0.1  # of all steps: a short run on a small data set must not spend itself warming up


@dataclass(frozen=True)
class Frozen:
    """What ``freeze`` did: the outermost modules, their parameters of all, and their norms."""

    modules: tuple[str, ...]
    frozen_params: int
    params: int
    norms: int

    def __str__(self) -> str:
        return (
            f"frozen: {', '.join(self.modules)}: {self.frozen_params} of {self.params} parameters; norms that keep "
            f"their statistics: {self.norms}"
        )


def freeze(model: nn.Module, patterns: Sequence[str]) -> Frozen:
    """Take the modules whose path matches a pattern, with all that is in them, out of the training; in place.

    Their parameters get no gradient and no optimiser, so that neither weights nor gates move, and `fit` keeps their
    norms in evaluation mode. A gate vector that a frozen module shares with others is frozen for all of them.
    ``model.1.*`` matches everything in ``model.1``, which ``model.1`` alone takes too. Raises SlimError for a pattern
    without a match and when nothing is left to train.
    """
    paths = [path for path, _ in model.named_modules() if path]
    chosen: list[str] = []
    for pattern in patterns:
        matched = [path for path in paths if fnmatchcase(path, pattern)]
        if not matched:
            near = get_close_matches(pattern.strip("*."), paths, cutoff=0.4) or paths[:5]
            raise SlimError(f"freeze: no module is named {pattern!r}; near names: {', '.join(near)}")
        chosen += matched
    for path in chosen:
        model.get_submodule(path).requires_grad_(False)
    parameters = list(model.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        raise SlimError(f"freeze: {' '.join(patterns)} leaves nothing to train; leave out a layer, such as the head")
    outermost = [path for path in dict.fromkeys(chosen) if not any(path.startswith(f"{other}.") for other in chosen)]
    return Frozen(
        modules=tuple(outermost),
        frozen_params=sum(parameter.numel() for parameter in parameters if not parameter.requires_grad),
        params=sum(parameter.numel() for parameter in parameters),
        norms=sum(_is_frozen_norm(module) for module in model.modules()),
    )


def enter_training(model: nn.Module) -> None:
    """Set training mode, in place, but for frozen norms: they use their statistics and leave them unchanged."""
    model.train()
    for module in model.modules():
        if _is_frozen_norm(module):
            module.eval()


def _is_frozen_norm(module: nn.Module) -> bool:
    """Whether a module is a norm that has parameters, none of which gets a gradient."""
    own = list(module.parameters(recurse=False))
    return isinstance(module, NORMS) and bool(own) and not any(parameter.requires_grad for parameter in own)


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Make the optimiser of two parameter groups, "decayed" and "plain" (norms, biases, gates), without frozen parameters.

    Raises SlimError when no parameter of the model requires a gradient.
    """
    norms = [parameter for m in model.modules() if isinstance(m, NORMS) for parameter in m.parameters(recurse=False)]
    never_decayed = {id(parameter) for parameter in [*gate_parameters(model), *norms]}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_weight = parameter.ndim > 1 and id(parameter) not in never_decayed
            (decayed if is_weight else plain).append(parameter)
    if not decayed and not plain:
        raise SlimError("the model has no parameter that requires a gradient: nothing can be trained")
    groups = [
        {"name": "decayed", "params": decayed, "weight_decay": config.weight_decay},
        {"name": "plain", "params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), weight_decay=0.0, fused=True)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)


def learning_rate_factor(config: OptimConfig, steps_per_epoch: int, epochs: int) -> Callable[[int], float]:
    """Give the factor on `config.lr` as a function of the optimiser step, counted from 0: warm-up times decay."""
    total = max(1, steps_per_epoch * epochs)
    warmup = round(min(config.warmup_epochs * steps_per_epoch, MAX_WARMUP_SHARE * total))

    def factor(step: int) -> float:
        progress = min(step / max(1, total - 1), 1.0)
        remaining = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        decay = config.final_lr_ratio + (1 - config.final_lr_ratio) * remaining
        return decay * min(1.0, (step + 1) / (warmup + 1))

    return factor


def learning_rate_sum(config: OptimConfig, steps_per_epoch: int, epochs: int, from_epoch: int = 0) -> float:
    """Sum of the learning rates of all steps from `from_epoch` on: what `slim.strength_for` wants."""
    factor = learning_rate_factor(config, steps_per_epoch, epochs)
    return sum(config.lr * factor(step) for step in range(from_epoch * steps_per_epoch, epochs * steps_per_epoch))


class WeightAverage(AveragedModel):
    """Exponential moving average of weights and statistics in `.module`; gates are copied, not averaged.

    An averaged gate would approach 0 without reaching it, and the network that is saved and cut would be
    another than the one whose gates were closed.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        super().__init__(model, use_buffers=True)
        self._decay, self._warmup_steps = config.ema_decay, config.ema_warmup_steps

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move towards `model`; call once after every optimiser step."""
        gates = {id(gate) for gate in gate_parameters(self.module)}
        averages, currents = ([*module.parameters(), *module.buffers()] for module in (self.module, model))
        count = int(self.n_averaged)
        is_averaged = [count > 0 and old.is_floating_point() and id(old) not in gates for old in averages]
        is_copied = [not chosen for chosen in is_averaged]
        if any(is_averaged):
            decay = self._decay * (1 - math.exp(-(count + 1) / self._warmup_steps))
            torch._foreach_lerp_(
                list(compress(averages, is_averaged)), list(compress(currents, is_averaged)), 1 - decay
            )
        if any(is_copied):
            torch._foreach_copy_(list(compress(averages, is_copied)), list(compress(currents, is_copied)))
        self.n_averaged += 1


def recalibrate(model: nn.Module, images: Iterable[Tensor], device: torch.device | str) -> None:
    """Re-estimate the statistics of all batch norms as the mean over batches of `images`; in place, moves to `device`.

    images: float [B, 3, H, W] in 0..1. What a cut of open channels leaves has other statistics than the network before.
    """
    update_bn(images, model.to(device), torch.device(device))
