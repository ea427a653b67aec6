"""A synthetic detection set: coloured shapes on textured, cluttered backgrounds, written to disk in YOLO format.

Only form tells the classes apart: colour, size, angle, texture and place are drawn alike for all. Outlines, streaks
and blobs that belong to no class lie behind and before the shapes, and shapes may overlap a little.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image

from .cache import FOLDER as CACHE_FOLDER
from .config import SPLITS, data_folder, read_description
from .errors import DataError

SHAPE_NAMES = ("circle", "square", "triangle", "cross")
FORMAT_VERSION = 4
RECORD = "shapes.json"
"""Written last: it says that the set is whole, and from which parameters it was made."""

_FILE_NAME = re.compile(r"shapes_\d{6,}\.(jpg|txt)")
_OBJECTS = (6, 10)
"""Fewest and most objects that are tried in an image; one that finds no free spot is left out.

Many, so that a short training from scratch sees many."""

_RADIUS = (0.13, 0.22)
"""Radius of a shape as a fraction of the image side."""
_MAX_COVER = 0.25
"""How much of an object's box another one's may cover."""

Field = NDArray[np.float32]


def make_shapes(
    root: str | Path, train: int = 400, val: int = 100, test: int = 100, image_size_px: int = 160, seed: int = 0
) -> None:
    """Draw a synthetic data set: ``images/{train,val,test}`` and ``labels/...`` under ``root``.

    The same arguments give the same bytes. A whole set with the same arguments is left alone; an interrupted or
    different one is made anew. Of several processes one draws and the others wait (``<root>.lock``).

    Args:
        root: the data set's folder.
        train, val, test: the number of images, square JPEGs with up to 10 objects of 4 classes.
        image_size_px: their side, at least 32.
        seed: at least 0.

    Raises:
        DataError: an argument is out of range, or ``root`` holds files that are not of such a set (none is ever deleted).
    """
    counts = {"train": train, "val": val, "test": test}
    recipe = {**counts, "image_size_px": image_size_px, "seed": seed, "version": FORMAT_VERSION}
    if min(counts.values()) < 0 or image_size_px < 32 or seed < 0:
        raise DataError(f"shapes: {counts} images of {image_size_px} px, seed {seed}: expected >= 0, >= 32 px, >= 0")
    root = Path(root)
    if _is_whole(root, recipe):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.with_name(f"{root.name}.lock")):
        if not _is_whole(root, recipe):
            _draw(root, recipe)


def make_described_shapes(file: str | Path, data_root: str | Path | None = None) -> bool:
    """Draw the shapes that a data set's yaml describes by its key ``synthetic``; False where it has no such key.

    The key holds arguments of ``make_shapes`` by name. DataError for anything else in it.
    """
    file = Path(file)
    content = read_description(file)
    if "synthetic" not in content:
        return False
    wanted, known = content["synthetic"], ("train", "val", "test", "image_size_px", "seed")
    if not isinstance(wanted, dict) or any(key not in known or type(value) is not int for key, value in wanted.items()):
        raise DataError(
            f"{file}: synthetic is {wanted!r}, expected whole numbers for some of {', '.join(known)}: it has shapes drawn; "
            "leave it out to use files of your own"
        )
    make_shapes(data_folder(content, file, data_root), **wanted)
    return True


def _draw(root: Path, recipe: Mapping[str, int]) -> None:
    _clear(root)
    for number, split in enumerate(SPLITS):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for index in range(recipe[split]):
            image, labels = draw_scene(recipe["image_size_px"], np.random.default_rng((recipe["seed"], number, index)))
            stem = f"shapes_{index:06d}"
            Image.fromarray(image).save(root / "images" / split / f"{stem}.jpg", quality=92)
            lines = [f"{int(row[0])} " + " ".join(f"{value:.6f}" for value in row[1:]) + "\n" for row in labels]
            (root / "labels" / split / f"{stem}.txt").write_text("".join(lines), encoding="utf-8")
    (root / RECORD).write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")


def _is_whole(root: Path, recipe: Mapping[str, int]) -> bool:
    try:
        record = json.loads((root / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return record == recipe and all(
        len(list((root / kind / split).glob(f"shapes_*{suffix}"))) == recipe[split]
        for split in SPLITS
        for kind, suffix in (("images", ".jpg"), ("labels", ".txt"))
    )


def _clear(root: Path) -> None:
    """Remove an earlier set, file by file; refuse if anything under ``root`` was not written by us."""
    below = root.rglob("*") if root.exists() else ()
    files = [path for path in below if not path.is_dir() and CACHE_FOLDER not in path.parts]
    ours = [path.name == RECORD or _FILE_NAME.fullmatch(path.name) is not None for path in files]
    foreign = [path for path, mine in zip(files, ours, strict=True) if not mine]
    if foreign or (root.exists() and not root.is_dir()):
        found = foreign[0] if foreign else "a file"
        raise DataError(f"{root} is not a set of shapes: found {found}; choose an empty or new folder")
    for path in sorted(files, key=lambda path: path.name != RECORD):
        path.unlink()


def draw_scene(size_px: int, rng: np.random.Generator) -> tuple[NDArray[np.uint8], Field]:
    """One image, uint8 [size, size, 3], and its labels, float32 [n, 5]: class, cx, cy, w, h normalised."""
    canvas = _background(size_px, rng)
    for _ in range(int(rng.integers(2, 6))):
        _paint_clutter(canvas, rng, opacity=rng.uniform(0.3, 0.9))
    placed: list[tuple[float, float, float]] = []
    labels: list[list[float]] = []
    for _ in range(int(rng.integers(_OBJECTS[0], _OBJECTS[1] + 1))):
        spot = _free_spot(placed, rng)
        if spot is None:
            continue
        placed.append(spot)
        kind = int(rng.integers(len(SHAPE_NAMES)))
        labels.append([kind, *_paint_shape(canvas, kind, spot, rng)])
    for _ in range(int(rng.integers(0, 3))):
        _paint_streak(canvas, rng, opacity=rng.uniform(0.2, 0.6))
    canvas += rng.normal(0, rng.uniform(2, 9), size=(size_px, size_px, 1)).astype(np.float32)
    return canvas.clip(0, 255).astype(np.uint8), np.array(labels, dtype=np.float32).reshape(-1, 5)


def _background(size_px: int, rng: np.random.Generator) -> Field:
    """A gradient between two colours under noise of three grain sizes; float32 [size, size, 3]."""
    angle = rng.uniform(0, 2 * math.pi)
    ys, xs = np.mgrid[0 : 1 : size_px * 1j, 0 : 1 : size_px * 1j].astype(np.float32) - np.float32(0.5)
    blend = (0.5 + 0.7 * (xs * math.cos(angle) + ys * math.sin(angle)))[..., None].astype(np.float32)
    first, second = rng.uniform(30, 225, size=(2, 3)).astype(np.float32)
    canvas: Field = first * blend + second * (1 - blend)
    for cells in (4, 12, 40):
        coarse = rng.normal(0, rng.uniform(4, 22), size=(cells, cells)).astype(np.float32)
        noise = Image.fromarray(coarse).resize((size_px, size_px), Image.Resampling.BILINEAR)
        canvas += np.asarray(noise)[..., None]
    return canvas


def _free_spot(placed: list[tuple[float, float, float]], rng: np.random.Generator) -> tuple[float, float, float] | None:
    """Centre and radius, as fractions of the side, of a place that hides little of what is there; None after 20 trials."""
    for _ in range(20):
        radius = float(rng.uniform(*_RADIUS))
        x, y = (float(value) for value in rng.uniform(0.8 * radius, 1 - 0.8 * radius, size=2))
        if all(_cover((x, y, radius), other) <= _MAX_COVER for other in placed):
            return x, y, radius
    return None


def _cover(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    reach = one[2] + other[2]
    overlap = max(0.0, reach - abs(one[0] - other[0])) * max(0.0, reach - abs(one[1] - other[1]))
    return overlap / (2 * min(one[2], other[2])) ** 2


def _paint_shape(
    canvas: Field, kind: int, spot: tuple[float, float, float], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Draw one object and return its tight visible box: cx, cy, w, h normalised."""
    size = canvas.shape[0]
    x, y, radius = (value * size for value in spot)
    distance, top, left = _shape_distance(kind, x, y, radius, rng.uniform(0, 2 * math.pi), size)
    alpha = (0.5 - distance).clip(0, 1)
    patch = canvas[top : top + alpha.shape[0], left : left + alpha.shape[1]]
    grain = rng.normal(0, rng.uniform(0, 14), size=alpha.shape).astype(np.float32)
    _blend(patch, _contrasting(patch, rng) + grain[..., None], alpha)
    rows, columns = np.flatnonzero((alpha >= 0.5).any(axis=1)), np.flatnonzero((alpha >= 0.5).any(axis=0))
    y1, y2, x1, x2 = top + rows[0], top + rows[-1] + 1, left + columns[0], left + columns[-1] + 1
    return (x1 + x2) / 2 / size, (y1 + y2) / 2 / size, (x2 - x1) / size, (y2 - y1) / size


def _shape_distance(kind: int, x: float, y: float, radius: float, angle: float, size: int) -> tuple[Field, int, int]:
    """Signed distance in pixels to the outline (negative inside) over the patch around it, and the patch's top and left.

    The sizes inside the radius are such that all four classes fill about the same area.
    """
    us, vs, top, left = _local_axes(x, y, radius, angle, size)
    if kind == 0:
        distance = np.hypot(us, vs) - 0.72 * radius
    elif kind == 1:
        distance = np.maximum(np.abs(us), np.abs(vs)) - 0.64 * radius
    elif kind == 2:
        # Three half planes, each half of the radius from the centre of gravity: the corners lie on the circle.
        turns = (math.pi / 2, math.pi / 2 + 2 * math.pi / 3, math.pi / 2 + 4 * math.pi / 3)
        sides = [us * math.cos(turn) + vs * math.sin(turn) for turn in turns]
        distance = np.maximum(np.maximum(sides[0], sides[1]), sides[2]) - 0.5 * radius
    else:
        along, across = np.maximum(np.abs(us), np.abs(vs)), np.minimum(np.abs(us), np.abs(vs))
        distance = np.maximum(along - 0.9 * radius, across - 0.28 * radius)
    return distance.astype(np.float32), top, left


def _local_axes(x: float, y: float, radius: float, angle: float, size: int) -> tuple[Field, Field, int, int]:
    """Coordinates turned by ``angle`` around (x, y) over the patch of the canvas that a shape of that radius can touch."""
    left, right = max(0, math.floor(x - radius) - 1), min(size, math.ceil(x + radius) + 2)
    top, bottom = max(0, math.floor(y - radius) - 1), min(size, math.ceil(y + radius) + 2)
    xs = (np.arange(left, right, dtype=np.float32) + np.float32(0.5 - x))[None, :]
    ys = (np.arange(top, bottom, dtype=np.float32) + np.float32(0.5 - y))[:, None]
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return cos * xs + sin * ys, cos * ys - sin * xs, top, left


def _contrasting(patch: Field, rng: np.random.Generator) -> Field:
    """A random colour that stands out from the patch's mean by at least 60 levels in some channel."""
    mean = patch.mean(axis=(0, 1))
    colour = rng.uniform(0, 255, size=3)
    while np.abs(colour - mean).max() < 60:
        colour = rng.uniform(0, 255, size=3)
    return colour.astype(np.float32)


def _paint_clutter(canvas: Field, rng: np.random.Generator, opacity: float) -> None:
    """Something of no class: a streak, a thin ring, a thin square outline or a soft blob."""
    kind = int(rng.integers(4))
    if kind == 0:
        _paint_streak(canvas, rng, opacity)
        return
    size = canvas.shape[0]
    x, y = rng.uniform(0, size, size=2)
    radius = float(rng.uniform(0.04, 0.16)) * size
    us, vs, top, left = _local_axes(float(x), float(y), radius * 1.5, float(rng.uniform(0, math.pi)), size)
    if kind == 1:
        alpha = 1.5 - np.abs(np.hypot(us, vs) - radius)
    elif kind == 2:
        alpha = 1.5 - np.abs(np.maximum(np.abs(us), np.abs(vs)) - 0.8 * radius)
    else:
        alpha = np.exp(-3 * (us**2 + (2 * vs) ** 2) / radius**2)
    patch = canvas[top : top + alpha.shape[0], left : left + alpha.shape[1]]
    _blend(patch, rng.uniform(0, 255, size=3).astype(np.float32), alpha.clip(0, 1) * np.float32(opacity))


def _paint_streak(canvas: Field, rng: np.random.Generator, opacity: float) -> None:
    """A straight line, 1 to 3 px wide."""
    size = canvas.shape[0]
    x, y = (float(value) for value in rng.uniform(0, size, size=2))
    length, width = float(rng.uniform(0.1, 0.5)) * size, float(rng.uniform(0.5, 1.5))
    us, vs, top, left = _local_axes(x, y, length, float(rng.uniform(0, math.pi)), size)
    alpha = (width + 0.5 - np.abs(vs)).clip(0, 1) * (np.abs(us) < length)
    patch = canvas[top : top + alpha.shape[0], left : left + alpha.shape[1]]
    _blend(patch, rng.uniform(0, 255, size=3).astype(np.float32), alpha * np.float32(opacity))


def _blend(patch: Field, colour: Field, alpha: Field) -> None:
    """Mix ``colour`` into ``patch``, a view of the canvas, in place."""
    patch += (colour - patch) * alpha[..., None]
