"""The proof that an exported network is the one that was trained."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

import slim
from slim import SlimError

from .graph_wrappers import WithNms

LARGEST_DIFFERENCE = 1e-4
"""The accepted difference between torch and an exported float32 network, relative to the output's largest magnitude."""
LARGEST_ROUNDING = 10
"""The accepted difference where that is larger: so many times torch's own distance from float64."""


def prove_equal(model: nn.Module, exported: nn.Module, images: Tensor) -> float:
    """The largest difference, relative to the largest output (``slim.max_difference``); SlimError where it is too large.

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
        raise SlimError(
            f"the exported network differs from torch by {difference:.3g} of the largest output, expected at most "
            f"{LARGEST_DIFFERENCE:g}; nothing was written"
        )
    return difference


def prove_same_detections(model: WithNms, exported: nn.Module, images: Tensor) -> float:
    """Do what ``prove_equal`` does for detectors that end in a suppression; the difference is that of boxes and scores.

    Where scores are equal, or an overlap is at its limit, but for rounding, more than one outcome is right. So what is
    checked is what defines the outcome: each detection is a candidate of torch's, no two of a class overlap too much, and
    each candidate that is missing overlaps too much with a detection of its class that is no less confident.
    """
    with slim.evaluation_mode(model), torch.no_grad():
        candidates = [model.candidates(predictions) for predictions in model.network(images)]
        worst = max(_suppression_error(model, *pair) for pair in zip(candidates, exported(images), strict=True))
    if not worst <= LARGEST_DIFFERENCE:
        raise SlimError(
            f"the exported network's detections differ from torch's by {worst:.3g} of the largest coordinate, expected at "
            f"most {LARGEST_DIFFERENCE:g}; nothing was written"
        )
    return worst


def _suppression_error(model: WithNms, candidates: Tensor, detections: Tensor) -> float:
    """The largest difference of one image's rows (box, score, class); infinite where they are no suppression of candidates."""
    candidates, found = candidates[candidates[:, 4] > 0], detections[detections[:, 4] > 0]
    is_full = len(found) == model.max_detections
    least = max(model.conf, float(found[-1, 4]) if is_full else 0.0) + LARGEST_DIFFERENCE
    surely = candidates[candidates[:, 4] > least]
    if not len(found):
        return float("inf") if len(surely) else 0.0
    if not len(candidates):
        return float("inf")
    scale = candidates[:, :4].abs().max()
    size = torch.tensor([*[float(scale)] * 4, 1.0, LARGEST_DIFFERENCE / 2])  # no class is another one
    worst = float((torch.cdist(found / size, candidates / size, float("inf"))).min(1).values.max())
    same_class = found[:, 5, None] == found[:, 5]
    overlaps = box_iou(found[:, :4], found[:, :4]).triu(1) * same_class
    removed = box_iou(surely[:, :4], found[:, :4]) > model.iou - LARGEST_DIFFERENCE
    removed &= (surely[:, 5, None] == found[:, 5]) & (found[:, 4] > surely[:, 4, None] - LARGEST_DIFFERENCE)
    if bool((overlaps > model.iou + LARGEST_DIFFERENCE).any()) or not bool(removed.any(1).all()):
        return float("inf")
    return worst
