"""Copying weights between models that are alike in part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.errors import ModelError


@dataclass(frozen=True)
class Transfer:
    """What ``transfer_weights`` did: names that were ``loaded``; ``skipped`` ones as "name: reason"."""

    loaded: tuple[str, ...]
    skipped: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{len(self.loaded)} of {len(self.loaded) + len(self.skipped)} tensors loaded"
        if not self.skipped:
            return text
        more = f" and {len(self.skipped) - 4} more" if len(self.skipped) > 4 else ""
        return f"{text}\nkept as they were: {'; '.join(self.skipped[:4])}{more}"


def transfer_weights(model: nn.Module, state_dict: Mapping[str, Tensor]) -> Transfer:
    """Copies into ``model``, in place, each tensor that fits by name and shape, anchors included.

    Batch norm statistics go with their counter: neither is taken without the other. Raises ModelError when not one
    parameter fits.
    """
    own = model.state_dict()
    loaded: list[str] = []
    skipped: list[str] = []
    for name in state_dict:
        reason = _misfit(name, own, state_dict)
        if reason:
            skipped.append(f"{name}: {reason}")
        else:
            loaded.append(name)
    parameters = {name for name, _ in model.named_parameters()}
    if not parameters.intersection(loaded):
        first = skipped[0] if skipped else "it is empty"
        raise ModelError(
            f"no weight of the checkpoint fits the model ({first}); give the model description that it was trained with"
        )
    skipped += [f"{name}: not in the checkpoint" for name in own if name not in state_dict]
    with torch.no_grad():
        for name in loaded:
            own[name].copy_(state_dict[name])
    return Transfer(tuple(loaded), tuple(skipped))


def _misfit(name: str, own: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> str:
    if name not in own:
        return "not in the model"
    found, expected = tuple(state_dict[name].shape), tuple(own[name].shape)
    if found != expected:
        return f"shape {found} in the checkpoint, {expected} in the model"
    mean = name.removesuffix("num_batches_tracked") + "running_mean"
    if name.endswith("num_batches_tracked") and mean in own and _misfit(mean, own, state_dict):
        return "its running mean does not fit"
    return ""
