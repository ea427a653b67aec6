"""Layers that a training leaves as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from slim import NORMS, SlimError


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
        norms=sum(is_frozen_norm(module) for module in model.modules()),
    )


def is_frozen_norm(module: nn.Module) -> bool:
    """A norm that has parameters, none of which gets a gradient."""
    own = list(module.parameters(recurse=False))
    return isinstance(module, NORMS) and bool(own) and not any(parameter.requires_grad for parameter in own)


def enter_training(model: nn.Module) -> None:
    """Training mode, but for frozen norms: they use their statistics and leave them unchanged."""
    model.train()
    for module in model.modules():
        if is_frozen_norm(module):
            module.eval()
