"""Anchors and the boxes of a data set: how well they fit, and others that fit better."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ModelError

LOWEST_RECALL = 0.98
"""Anchors that can recall fewer of the boxes are worth refitting (YOLOv5's bound)."""

_MOST_BOXES = 20_000
"""A fair sample of more boxes gives the same anchors, sooner."""
_LEAST_SIDE_PX = 2.0
_CHUNK = 1 << 16


@dataclass(frozen=True)
class AnchorFit:
    """How well anchors fit boxes, in the loss's terms: anchors take boxes whose sides differ by less than ``anchor_t`` times."""

    recall: float
    """Best possible recall: the share (0..1) of boxes that some anchor takes."""
    anchors_above: float
    """How many anchors take a box, on average."""

    def __str__(self) -> str:
        return f"{self.recall:.2%} of the boxes within reach, {self.anchors_above:.2f} anchors a box"


def anchor_fit(anchors_px: Tensor, sizes_px: Tensor, anchor_t: float = 4.0) -> AnchorFit:
    """Measure how well anchors fit boxes, by the same inequality as in ``DetectionLoss``.

    Args:
        anchors_px: [..., 2] widths and heights in pixels.
        sizes_px: [n, 2] widths and heights of boxes, in pixels of the network's input.
        anchor_t: by how many times the sides of an anchor and a box may differ.

    Raises:
        ModelError: there is no box, or a side is not above 0.

    >>> print(anchor_fit(torch.tensor([[10.0, 10.0]]), torch.tensor([[20.0, 30.0], [10.0, 50.0]])))
    50.00% of the boxes within reach, 0.50 anchors a box
    """
    anchors, sizes = _checked(anchors_px, "anchors"), _checked(sizes_px, "boxes")
    within = [_closeness(anchors, chunk) > 1 / anchor_t for chunk in sizes.split(_CHUNK)]
    taken = torch.cat([chunk.sum(1) for chunk in within])
    return AnchorFit(float((taken > 0).double().mean()), float(taken.double().mean()))


def refit_anchors(
    sizes_px: Tensor, count: int, *, anchor_t: float = 4.0, generations: int = 1000, seed: int = 0
) -> Tensor:
    """Find ``count`` anchors [count, 2] for boxes ``sizes_px`` [n, 2], in pixels, by rising area.

    The same seed gives the same anchors.

    K-means (Lloyd's, started as k-means++, Arthur and Vassilvitskii 2007) on widths and heights, each divided by its
    standard deviation; then an evolution strategy with one parent, one child and the 1/5 success rule (Rechenberg 1973) on
    the logarithms, which maximises the mean closeness of boxes to their best anchor, 0 for boxes out of its reach. Boxes
    of less than 2 px on both sides are left out if there are others. ModelError for sizes that are no sizes.
    """
    if count < 1:
        raise ModelError(f"anchors: {count} are asked for, expected at least 1")
    sizes = _checked(sizes_px, "boxes").double()
    visible = sizes[(sizes >= _LEAST_SIDE_PX).any(1)]
    sizes = visible if len(visible) else sizes
    # Drawn on the CPU, by a generator of its own: the same everywhere, and nobody else's numbers change.
    generator = torch.Generator().manual_seed(seed)
    if len(sizes) > _MOST_BOXES:
        sizes = sizes[torch.randperm(len(sizes), generator=generator)[:_MOST_BOXES]]
    spread = sizes.std(0, correction=0).clamp(min=1e-3)
    anchors = _cluster(sizes / spread, count, generator) * spread
    anchors = _evolve(anchors, sizes, anchor_t, generations, generator)
    return anchors[anchors.prod(1).argsort(stable=True)].float()


def _checked(sides: Tensor, what: str) -> Tensor:
    sides = sides.detach().cpu().reshape(-1, sides.shape[-1] if sides.ndim else 1)
    if sides.shape[-1] != 2 or not len(sides) or not bool((torch.isfinite(sides) & (sides > 0)).all()):
        raise ModelError(
            f"anchors: {what} of the shape {tuple(sides.shape)}, expected [n, 2] with n and all sides above 0"
        )
    return sides


def _closeness(anchors: Tensor, sizes: Tensor) -> Tensor:
    """[n, count]: by how much the worse of two sides must be scaled, 0..1; 1 where anchor and box are of one size."""
    ratio = sizes[:, None] / anchors[None]
    return torch.minimum(ratio, 1 / ratio).amin(2)


def _fitness(anchors: Tensor, sizes: Tensor, anchor_t: float) -> float:
    best = _closeness(anchors, sizes).amax(1)
    return float((best * (best > 1 / anchor_t)).mean())


def _cluster(points: Tensor, count: int, generator: torch.Generator, rounds: int = 30) -> Tensor:
    """Centres [count, 2] of ``points`` [n, 2]."""
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    for _ in range(count - 1):
        far = torch.cdist(points, centres).amin(1).square()
        weights = far if float(far.sum()) > 0 else torch.ones_like(far)
        centres = torch.cat((centres, points[torch.multinomial(weights, 1, generator=generator)]))
    for _ in range(rounds):
        nearest = torch.cdist(points, centres).argmin(1)
        members = torch.zeros(count, dtype=points.dtype).index_add_(
            0, nearest, torch.ones(len(points), dtype=points.dtype)
        )
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        moved = torch.where(members[:, None] > 0, sums / members[:, None].clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def _evolve(anchors: Tensor, sizes: Tensor, anchor_t: float, generations: int, generator: torch.Generator) -> Tensor:
    step, best = 0.1, _fitness(anchors, sizes, anchor_t)
    for _ in range(generations):
        change = torch.randn(anchors.shape, generator=generator, dtype=anchors.dtype)
        change *= torch.rand(anchors.shape, generator=generator) < 0.5  # a few at a time
        child = anchors * (step * change).exp()
        fitness = _fitness(child, sizes, anchor_t)
        better = fitness > best
        if better:
            anchors, best = child, fitness
        step = min(max(step * math.exp(0.2 if better else -0.05), 1e-3), 0.5)
    return anchors
