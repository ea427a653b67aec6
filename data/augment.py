"""Training augmentation: mosaic, random scale and shift (or a full affine map), mixup, colour jitter and flips.

The recipe is YOLOv5's (mosaic: Bochkovskiy et al., YOLOv4, 2020). Without rotation and shear each tile's visible part is
resized straight into the output: the canvas of twice the size never exists and every pixel is resampled once.
All randomness comes from the generator that the caller passes in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .colour import jitter_hsv
from .images import FILL, grey
from .settings import Augment

MIN_SIDE_PX = 2.0
MIN_VISIBLE = 0.1
MAX_ASPECT = 100.0
MIXUP_BETA = 32.0
"""Both parameters of the Beta distribution: near halves, as detectors are trained (YOLOv5, YOLOX)."""

Labels = NDArray[np.float32]


@dataclass(frozen=True)
class Tile:
    """An image placed on a canvas."""

    image: Tensor
    """uint8 [3, h, w]"""
    labels: Labels
    """float32 [n, 5]: class, x1, y1, x2, y2 in pixels of ``image``"""
    x_px: int
    """Where the image's left edge lies on the canvas."""
    y_px: int
    """Where its top edge lies."""


@dataclass(frozen=True)
class View:
    """The affine map from the canvas to the output: ``out = matrix @ (canvas - centre) + shift``, in pixels."""

    matrix: NDArray[np.float64]
    shift_px: NDArray[np.float64]
    canvas_px: int
    size_px: int

    @property
    def axis_aligned(self) -> bool:
        return bool(self.matrix[0, 1] == 0 and self.matrix[1, 0] == 0)


def mosaic_tiles(images: Sequence[tuple[Tensor, Labels]], size_px: int, rng: np.random.Generator) -> list[Tile]:
    """Four images around a random point of a canvas of ``2 * size_px``: top left, top right, bottom left, bottom right.

    What leaves the canvas is lost, as in YOLOv4's mosaic.
    """
    centre_x, centre_y = (int(value) for value in rng.integers(size_px // 2, size_px * 3 // 2 + 1, size=2))
    tiles = []
    for position, (image, labels) in enumerate(images):
        height, width = image.shape[1:]
        x = centre_x - width if position % 2 == 0 else centre_x
        y = centre_y - height if position < 2 else centre_y
        tiles.append(Tile(image, labels, x, y))
    return tiles


def random_view(augment: Augment, canvas_px: int, size_px: int, rng: np.random.Generator, zoom: float = 1.0) -> View:
    """Draw scale, rotation, shear and shift; nothing but the centre's position and ``zoom`` remain when all are 0.

    ``zoom``: pixels of the output for a pixel of the canvas, before the random scale.
    """
    scale = zoom * rng.uniform(1 - augment.scale, 1 + augment.scale)
    angle = math.radians(rng.uniform(-augment.degrees, augment.degrees))
    shear_x, shear_y = np.tan(np.radians(rng.uniform(-augment.shear, augment.shear, size=2)))
    shift = size_px * rng.uniform(0.5 - augment.translate, 0.5 + augment.translate, size=2)
    cos, sin = math.cos(angle), math.sin(angle)
    rotation = scale * np.array([[cos, sin], [-sin, cos]])
    return View(np.array([[1.0, shear_x], [shear_y, 1.0]]) @ rotation, shift, canvas_px, size_px)


def render(tiles: Sequence[Tile], view: View) -> tuple[Tensor, Labels]:
    """Draw the tiles as ``view`` shows them: uint8 [3, S, S] and labels in its pixels, clipped; slivers are dropped."""
    return _render_aligned(tiles, view) if view.axis_aligned else _render_affine(tiles, view)


def _render_aligned(tiles: Sequence[Tile], view: View) -> tuple[Tensor, Labels]:
    """Resize a whole-pixel crop of each tile into a whole-pixel rectangle of the output.

    Rounding changes a tile's scale by less than a pixel over its width; the boxes follow that very scale, so that they
    stay exact. Neighbouring tiles share their seam because the seam is rounded once.
    """
    size = view.size_px
    output = grey(size, size)
    labels, fits = [np.zeros((0, 5), np.float32)], [(0.0,) * 8]
    for tile in tiles:
        height, width = tile.image.shape[1:]
        x, y = _visible_span(tile.x_px, width, view, axis=0), _visible_span(tile.y_px, height, view, axis=1)
        if x is None or y is None:
            continue
        patch = _warped(tile.image[:, y.crop[0] : y.crop[1], x.crop[0] : x.crop[1]], (y.length, x.length))
        x_lo, x_hi, y_lo, y_hi = max(x.start, 0), min(x.stop, size), max(y.start, 0), min(y.stop, size)
        output[:, y_lo:y_hi, x_lo:x_hi] = patch[:, y_lo - y.start : y_hi - y.start, x_lo - x.start : x_hi - x.start]
        labels.append(tile.labels)
        scale_x, scale_y = x.ratio, y.ratio
        shift_x, shift_y = x.start - x.crop[0] * scale_x, y.start - y.crop[0] * scale_y
        fits.append((scale_x, scale_y, shift_x, shift_y, x_lo, y_lo, x_hi, y_hi))
    # All tiles' boxes at once: there are few, and what costs is the calls.
    rows, fit = np.concatenate(labels), np.repeat(np.array(fits), [len(part) for part in labels], axis=0)
    whole = rows[:, 1:] * fit[:, [0, 1, 0, 1]] + fit[:, [2, 3, 2, 3]]
    return output, _clip_and_filter(rows[:, :1], whole, _areas(whole), fit[:, 4:])


def _warped(image: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """The random scale of a view, uint8 [3, H, W] -> [3, h, w]: bilinear, antialiased when it shrinks."""
    if image.shape[-2:] == torch.Size(size_hw):
        return image
    pixels = image[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(pixels, size_hw, mode="bilinear", antialias=True)[0]


@dataclass(frozen=True)
class _Span:
    """Along one axis: source pixels ``crop`` become output pixels ``start`` to ``stop`` (which may pass the edge by a few)."""

    crop: tuple[int, int]
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def ratio(self) -> float:
        return self.length / (self.crop[1] - self.crop[0])


def _visible_span(offset: int, length: int, view: View, axis: int) -> _Span | None:
    scale, shift, centre = float(view.matrix[axis, axis]), float(view.shift_px[axis]), view.canvas_px / 2
    first = max(-shift / scale + centre, 0.0) - offset
    last = min((view.size_px - shift) / scale + centre, float(view.canvas_px)) - offset
    low, high = max(math.floor(first), 0, -offset), min(math.ceil(last), length, view.canvas_px - offset)
    if high <= low:
        return None
    start = round(scale * (low + offset - centre) + shift)
    stop = round(scale * (high + offset - centre) + shift)
    return _Span((low, high), start, stop) if stop > 0 and start < view.size_px and stop > start else None


def _render_affine(tiles: Sequence[Tile], view: View) -> tuple[Tensor, Labels]:
    """The general case: paste onto the canvas, then sample it once, bilinearly."""
    canvas = torch.zeros(1, 3, view.canvas_px, view.canvas_px)
    centre = view.canvas_px / 2
    kept = []
    for tile in tiles:
        height, width = tile.image.shape[1:]
        x_lo, y_lo = max(tile.x_px, 0), max(tile.y_px, 0)
        x_hi, y_hi = min(tile.x_px + width, view.canvas_px), min(tile.y_px + height, view.canvas_px)
        if x_hi <= x_lo or y_hi <= y_lo:
            continue
        part = tile.image[:, y_lo - tile.y_px : y_hi - tile.y_px, x_lo - tile.x_px : x_hi - tile.x_px]
        canvas[0, :, y_lo:y_hi, x_lo:x_hi] = part.float() - FILL
        if len(tile.labels):
            on_canvas = tile.labels[:, 1:] + np.array([tile.x_px, tile.y_px] * 2)
            clipped = on_canvas.clip([x_lo, y_lo] * 2, [x_hi, y_hi] * 2)
            mapped = _map_boxes(clipped - centre, view)
            # Visibility is judged against the whole object, wherever it was cut.
            whole = _areas(_map_boxes(on_canvas - centre, view))
            kept.append(
                _clip_and_filter(tile.labels[:, :1], mapped, whole, np.array([0, 0, view.size_px, view.size_px]))
            )
    inverse = np.linalg.inv(view.matrix)
    half = view.size_px / 2
    # affine_grid maps the output's -1..1 to the canvas's -1..1.
    theta = np.concatenate([inverse * half, (inverse @ (half - view.shift_px))[:, None]], axis=1) / centre
    grid = F.affine_grid(torch.from_numpy(theta).float()[None], [1, 3, view.size_px, view.size_px], align_corners=False)
    sampled = F.grid_sample(canvas, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0] + FILL
    return sampled.round_().clamp_(0, 255).to(torch.uint8), _stack(kept)


def _map_boxes(boxes_xyxy: NDArray[np.float64], view: View) -> NDArray[np.float64]:
    corners = boxes_xyxy[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2) @ view.matrix.T + view.shift_px
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)


def _areas(boxes_xyxy: NDArray[np.float64]) -> NDArray[np.float64]:
    return (boxes_xyxy[:, 2] - boxes_xyxy[:, 0]) * (boxes_xyxy[:, 3] - boxes_xyxy[:, 1])


def _clip_and_filter(
    classes: Labels,
    boxes_xyxy: NDArray[np.float64],
    whole_areas: NDArray[np.float64],
    window_xyxy: NDArray[np.float64] | NDArray[np.int64],
) -> Labels:
    """Clip to the window, [4] or one for each box [n, 4]; keep what is wider and higher than 2 px, at least 10 % visible and
    not a line."""
    boxes = np.minimum(np.maximum(boxes_xyxy, window_xyxy[..., [0, 1, 0, 1]]), window_xyxy[..., [2, 3, 2, 3]])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    aspect = np.maximum(width / np.maximum(height, 1e-9), height / np.maximum(width, 1e-9))
    keep = (width > MIN_SIDE_PX) & (height > MIN_SIDE_PX) & (aspect < MAX_ASPECT)
    keep &= width * height > MIN_VISIBLE * whole_areas
    return np.concatenate([classes[keep], boxes[keep]], axis=1).astype(np.float32)


def _stack(parts: Sequence[Labels]) -> Labels:
    return np.concatenate([*parts, np.zeros((0, 5), np.float32)])


def mix(one: tuple[Tensor, Labels], other: tuple[Tensor, Labels], share: float) -> tuple[Tensor, Labels]:
    """Mixup (Zhang et al., ICLR 2018) for detection: ``share * one + (1 - share) * other``, with the labels of both."""
    blended = torch.lerp(other[0].float(), one[0].float(), share).round_().to(torch.uint8)
    return blended, _stack([one[1], other[1]])


def colour_and_flip(image: Tensor, labels: Labels, augment: Augment, rng: np.random.Generator) -> tuple[Tensor, Labels]:
    """Colour jitter and mirrored sides; uint8 [3, S, S] and labels as ``render`` gives them."""
    hue, saturation, value = rng.uniform(-1, 1, size=3) * (augment.hsv_h, augment.hsv_s, augment.hsv_v)
    upside_down, mirrored = rng.random(2) < (augment.flipud, augment.fliplr)
    size_px, labels = image.shape[-1], labels.copy()
    if upside_down:
        image = image.flip(1)
        labels[:, [2, 4]] = size_px - labels[:, [4, 2]]
    if mirrored:
        image = image.flip(2)
        labels[:, [1, 3]] = size_px - labels[:, [3, 1]]
    if augment.hsv_h or augment.hsv_s or augment.hsv_v:
        image = jitter_hsv(image, float(hue), 1 + float(saturation), 1 + float(value))
    return image, labels
