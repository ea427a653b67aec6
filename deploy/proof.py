"""The proof that an exported network is the one that was trained."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import slim

from .errors import DeployError

LARGEST_DIFFERENCE = 1e-4
"""Of the output's largest magnitude, between torch and an exported float32 network."""
LARGEST_ROUNDING = 10
"""Times torch's own distance from float64, where that is larger."""


def prove_equal(model: nn.Module, exported: nn.Module, images: Tensor) -> float:
    """The largest difference, relative to the largest output (``slim.max_difference``); DeployError where it is too large.

    A network that magnifies float32's rounding is measured by how far torch itself is from float64.
    """
    difference = slim.max_difference(model, exported, images)
    if difference <= LARGEST_DIFFERENCE:
        return difference
    exact = copy.deepcopy(model).double()
    with slim.evaluation_mode(model), slim.evaluation_mode(exact), torch.no_grad():
        wanted, precise = model(images), exact(images.double())
    rounding = float((wanted - precise).abs().max() / precise.abs().max())
    if not difference <= LARGEST_ROUNDING * rounding:
        raise DeployError(
            f"the exported network differs from torch by {difference:.3g} of the largest output, expected at most "
            f"{LARGEST_DIFFERENCE:g}; nothing was written"
        )
    return difference


def prove_same_detections(model: nn.Module, exported: nn.Module, images: Tensor) -> float:
    """As ``prove_equal``, for networks that end in a suppression: [B, D, 6] of box, score, class; 0 fills up.

    Each detection of either must be among the other's: scores that are equal but for rounding may stand in any order. The
    least confident one may be missing, since rounding decides which is the last to fit.
    """
    with slim.evaluation_mode(model), torch.no_grad():
        pairs = list(zip(model(images), exported(images), strict=True))
    largest = max((float(first.abs().max()) for first, _ in pairs), default=0.0)
    worst = 0.0
    for first, second in pairs:
        for some, others in ((first, second), (second, first)):
            for row in some[some[:, 4] > some[-1, 4] + LARGEST_DIFFERENCE]:
                same = others[others[:, 5] == row[5]]
                worst = max(worst, float((same - row).abs().amax(1).min()) if len(same) else float("inf"))
    if not worst <= LARGEST_DIFFERENCE * largest:
        raise DeployError(
            f"the exported network's detections differ from torch's by {worst:.3g}, expected at most "
            f"{LARGEST_DIFFERENCE * largest:.3g}; nothing was written"
        )
    return worst / largest if largest else 0.0
