"""Which samples an epoch asks for: image weights for rare classes, sizes of multi-scale training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import DataError


@dataclass(frozen=True)
class Draw:
    """One sample that a batch asks for."""

    index: int
    """Of the image in its data set."""
    canvas_hw: tuple[int, int] | None = None
    """Height and width of the sample in pixels; None for the data set's own square."""
    turn: int = 0
    """How often the epoch drew the image before: each time it is augmented differently."""


def weigh_images(labels: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Weigh images so that classes are drawn alike: labels [n, 5] of each image -> probabilities [images], sum 1.

    An object weighs 1 / (number of objects of its class in all images), an image as much as its objects together;
    so all classes that occur have the same weight, however rare. An image without an object weighs as much as the mean
    of those that have one: the share of such images stays.
    """
    classes = [rows[:, 0].astype(np.int64) for rows in labels]
    counts = np.bincount(np.concatenate([np.zeros(0, np.int64), *classes]))
    weights: NDArray[np.float64] = np.array([(1 / counts[found]).sum() for found in classes])
    empty = np.array([len(found) == 0 for found in classes])
    if empty.any():
        weights[empty] = 1.0 if empty.all() else weights[~empty].mean()
    weights /= weights.sum()
    return weights


def multi_scale_sizes(image_size_px: int, stride_px: int) -> tuple[int, ...]:
    """List the multiples of the largest stride from half of the image size to one and a half of it, all in pixels.

    DataError if there is none but the image size itself.

    >>> multi_scale_sizes(96, 32)
    (64, 96, 128)
    """
    first, last = max(1, math.ceil(image_size_px / 2 / stride_px)), math.floor(image_size_px * 1.5 / stride_px)
    sizes = tuple(stride_px * k for k in range(first, last + 1))
    if len(sizes) < 2:
        raise DataError(
            f"multi-scale: image size {image_size_px} leaves no multiple of the stride {stride_px} to choose from between "
            f"half and one and a half of it; expected at least {2 * stride_px}"
        )
    return sizes
