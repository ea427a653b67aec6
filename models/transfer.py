"""Copying weights between models that are alike in part, and the change of a model's classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .builder import build_model
from .errors import ModelError
from .yolo import YOLO


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
    """Copy into ``model``, in place, each tensor that fits by name and shape, anchors included.

    Batch norm statistics go with their counter: neither is taken without the other. Raises ModelError when not one
    parameter fits.

    >>> print(transfer_weights(nn.Linear(2, 3), {"weight": torch.ones(3, 2), "bias": torch.ones(4)}))
    1 of 2 tensors loaded
    kept as they were: bias: shape (4,) in the checkpoint, (3,) in the model
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


def renew_head(model: YOLO, sources: Sequence[int | None]) -> None:
    """Give the head outputs for ``len(sources)`` classes, in place; all else, widths and gates included, stays.

    Class i takes the rows of the class ``sources[i]`` that the head had; None is a class that it did not know, whose
    weights are drawn and whose bias is the prior. Box and objectness rows stay where any class does. A head that knows none
    of its classes starts anew altogether: it has learned that nothing of them is an object.
    """
    # A whole network is drawn for the sake of its head: the draws that weights of other classes always had.
    fresh = build_model(model.description, len(sources))
    old, num_anchors = model.detect, model.detect.anchors.shape[1]
    rows = [(5 + i, 5 + source) for i, source in enumerate(sources) if source is not None]
    if rows:
        rows += [(row, row) for row in range(5)]
    for conv, before in zip(fresh.detect.m, old.m, strict=True):
        assert isinstance(conv, nn.Conv2d) and isinstance(before, nn.Conv2d)
        _narrow_inputs(conv, before.in_channels)
        for name in ("weight", "bias"):
            new = getattr(conv, name).detach().view(num_anchors, len(sources) + 5, -1)
            kept = getattr(before, name).detach().view(num_anchors, old.num_classes + 5, -1)
            for row, source in rows:
                new[:, row] = kept[:, source]
    old.m = fresh.detect.m.to(old.anchors.device)
    model.description = fresh.description


def _narrow_inputs(conv: nn.Conv2d, width: int) -> None:
    """The first ``width`` inputs, spread as those of a convolution of that width are drawn; in place."""
    with torch.no_grad():
        conv.weight = nn.Parameter(conv.weight[:, :width] * math.sqrt(conv.in_channels / width))
    conv.in_channels = width
