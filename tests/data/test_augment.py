"""Augmentation against pixels: after any of it, a box still fits what it was drawn around."""

from __future__ import annotations

import colorsys
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import data.colour
from data import Augment
from data.augment import Labels, Tile, View, colour_and_flip, mix, mosaic_tiles, random_view, render
from data.colour import jitter_hsv
from data.images import FILL
from tests.data.scenes import Box, rectangle, visible_box

SIZE = 96
STILL = Augment(
    mosaic=0, scale=0, translate=0, degrees=0, shear=0, hsv_h=0, hsv_s=0, hsv_v=0, flipud=0, fliplr=0
)  # fmt: skip
SCENES: tuple[tuple[int, int, Box], ...] = (
    (72, 96, (20, 12, 61, 50)),
    (96, 60, (5, 30, 40, 71)),
    (96, 96, (30, 30, 77, 60)),
    (50, 96, (40, 8, 80, 40)),
)


def scene(kind: int) -> tuple[Tensor, Labels]:
    height, width, box = SCENES[kind]
    return rectangle(height, width, box, kind), np.array([[kind, *box]], dtype=np.float32)


def augment_sample(
    tiles: list[Tile], canvas_px: int, size_px: int, augment: Augment, rng: np.random.Generator
) -> tuple[Tensor, Labels]:
    return colour_and_flip(*render(tiles, random_view(augment, canvas_px, size_px, rng)), augment, rng)


def sample(augment: Augment, seed: int, mosaic: bool) -> tuple[Tensor, Labels]:
    rng = np.random.default_rng(seed)
    if mosaic:
        return augment_sample(mosaic_tiles([scene(k) for k in range(4)], SIZE, rng), 2 * SIZE, SIZE, augment, rng)
    image, labels = scene(seed % 4)
    tile = Tile(image, labels, (SIZE - image.shape[2]) // 2, (SIZE - image.shape[1]) // 2)
    return augment_sample([tile], SIZE, SIZE, augment, rng)


def misfits(image: Tensor, labels: Labels, inner_only: bool) -> list[float]:
    """For each label the largest distance in pixels between its sides and those of the visible rectangle."""
    assert len(set(labels[:, 0])) == len(labels)
    found = []
    for kind, *box in labels.tolist():
        if inner_only and (min(box) < 1.5 or max(box) > SIZE - 1.5):
            continue
        seen = visible_box(image, int(kind))
        assert seen is not None, "a box around nothing"
        found.append(float(np.abs(seen - box).max()))
    return found


@pytest.mark.parametrize("mosaic", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"scale": 0.5},
        {"translate": 0.2},
        {"flipud": 0.5, "fliplr": 0.5},
        {"scale": 0.7, "translate": 0.1, "flipud": 0.5, "fliplr": 0.5},
    ],
    ids=["still", "scale", "translate", "flip", "all"],
)
def test_boxes_fit_the_pixels(change: dict[str, float], mosaic: bool) -> None:
    fits = [m for seed in range(24) for m in misfits(*sample(replace(STILL, **change), seed, mosaic), inner_only=False)]
    assert len(fits) >= 20
    assert max(fits) <= 1.5


@pytest.mark.parametrize("mosaic", [False, True])
@pytest.mark.parametrize(
    "change",
    [{"degrees": 30.0}, {"shear": 15.0}, {"degrees": 180.0, "scale": 0.7, "translate": 0.1, "fliplr": 0.5}],
    ids=["rotation", "shear", "all"],
)
def test_boxes_fit_the_pixels_of_turned_images(change: dict[str, float], mosaic: bool) -> None:
    """Where a side of the output cuts a turned rectangle, the box of the whole is cut, which need not be tight."""
    fits = [m for seed in range(24) for m in misfits(*sample(replace(STILL, **change), seed, mosaic), inner_only=True)]
    assert len(fits) >= 8
    assert max(fits) <= 1.5


def test_what_leaves_the_canvas_leaves_the_box() -> None:
    """A rectangle that the mosaic's edge cuts in half, turned and shrunk so that the edge lies inside the output."""
    tile = Tile(rectangle(SIZE, SIZE, (20, 30, 60, 60)), np.array([[0, 20, 30, 60, 60]], np.float32), -40, 40)
    cos, sin = 0.5 * np.cos(0.4), 0.5 * np.sin(0.4)
    view = View(np.array([[cos, sin], [-sin, cos]]), np.array([SIZE / 2, SIZE / 2]), SIZE, SIZE)
    image, labels = render([tile], view)
    assert len(misfits(image, labels, inner_only=True)) == 1
    assert misfits(image, labels, inner_only=True)[0] <= 1.5


def test_an_upright_box_is_cut_where_the_canvas_ends() -> None:
    """The rectangle's columns 20 to 60 lie at -20 to 20 of the canvas, which is shown at half of its size from x = 24 on."""
    tile = Tile(rectangle(SIZE, SIZE, (20, 30, 60, 60)), np.array([[0, 20, 30, 60, 60]], np.float32), -40, 0)
    image, labels = render([tile], View(0.5 * np.eye(2), np.array([SIZE / 2, SIZE / 2]), SIZE, SIZE))
    assert labels.tolist() == [[0, 24, 39, 34, 54]]
    assert misfits(image, labels, inner_only=False)[0] <= 0.5


def test_no_label_is_lost_without_reason() -> None:
    """An unlabelled rectangle is a sliver: it shows a small part of itself."""
    for seed in range(40):
        image, labels = sample(replace(STILL, translate=0.3), seed, mosaic=True)
        for kind in {0, 1, 2, 3} - {int(k) for k in labels[:, 0]}:
            seen = visible_box(image, kind)
            x1, y1, x2, y2 = SCENES[kind][2]
            if seen is not None:
                width, height = seen[2] - seen[0], seen[3] - seen[1]
                assert min(width, height) <= 3 or width * height <= 0.13 * (x2 - x1) * (y2 - y1)


def test_without_any_change_the_image_stays() -> None:
    image, labels = scene(2)
    same, boxes = augment_sample([Tile(image, labels, 0, 0)], SIZE, SIZE, STILL, np.random.default_rng(0))
    assert torch.equal(same, image)
    assert boxes.tolist() == labels.tolist()


def test_both_renderers_agree() -> None:
    """A shear of a hair takes the general path."""
    tiles = mosaic_tiles([scene(k) for k in range(4)], SIZE, np.random.default_rng(3))
    shift = np.array([SIZE / 2, SIZE / 2])
    aligned, boxes = render(tiles, View(np.eye(2), shift, 2 * SIZE, SIZE))
    general, others = render(tiles, View(np.array([[1.0, 1e-9], [0.0, 1.0]]), shift, 2 * SIZE, SIZE))
    assert (aligned.int() - general.int()).abs().max() <= 1
    np.testing.assert_allclose(boxes, others, atol=1e-3)


def test_flips_mirror_pixels_and_boxes_exactly() -> None:
    image, labels = scene(2)
    both = replace(STILL, flipud=1, fliplr=1)
    flipped, boxes = augment_sample([Tile(image, labels, 0, 0)], SIZE, SIZE, both, np.random.default_rng(0))
    assert torch.equal(flipped, image.flip(1, 2))
    x1, y1, x2, y2 = SCENES[2][2]
    assert boxes.tolist() == [[2, SIZE - x2, SIZE - y2, SIZE - x1, SIZE - y1]]


def identity(tile: Tile) -> tuple[Tensor, NDArray[np.float32]]:
    return render([tile], View(np.eye(2), np.array([50.0, 50.0]), 100, 100))


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((10, 10, 40, 40), [10, 10, 40, 40]),
        # A tile that begins at x = 80 shows its first 20 columns.
        ((0, 10, 40, 40), [0, 10, 20, 40]),
        ((17.0, 10, 30, 40), [17, 10, 20, 40]),
        ((18.0, 10, 30, 40), None),  # 2 px wide
        ((17.0, 10, 46.9, 40), [17, 10, 20, 40]),  # 10.03 % visible
        ((17.0, 10, 47.1, 40), None),  # 9.97 % visible
        ((30, 10, 40, 40), None),
    ],
)  # fmt: skip
def test_boxes_are_clipped_and_slivers_dropped(box: tuple[float, ...], expected: list[float] | None) -> None:
    x_px = 0 if expected == [10, 10, 40, 40] else 80
    tile = Tile(torch.zeros(3, 50, 50, dtype=torch.uint8), np.array([[1, *box]], np.float32), x_px, 0)
    image, labels = identity(tile)
    shifted = None if expected is None else [[1, expected[0] + x_px, expected[1], expected[2] + x_px, expected[3]]]
    assert labels.tolist() == (shifted or [])
    assert labels.dtype == np.float32 and labels.shape[1] == 5
    assert image[:, 50:].unique().tolist() == [FILL]


@pytest.mark.parametrize(("height", "kept"), [(3.0, True), (2.0, False), (2.1, False), (2.6, True)])
def test_lines_are_dropped(height: float, kept: bool) -> None:
    """Higher than 2 px, and less than 100 times as wide as high: 250 px allow no less than 2.5."""
    tile = Tile(torch.zeros(3, 300, 300, dtype=torch.uint8), np.array([[0, 5, 5, 255, 5 + height]], np.float32), 0, 0)
    _, labels = render([tile], View(np.eye(2), np.array([150.0, 150.0]), 300, 300))
    assert len(labels) == kept


def test_mosaic_places_four_images_around_one_point() -> None:
    for seed in range(20):
        tiles = mosaic_tiles([scene(k) for k in range(4)], SIZE, np.random.default_rng(seed))
        x, y = tiles[3].x_px, tiles[3].y_px
        assert SIZE // 2 <= x <= SIZE * 3 // 2 and SIZE // 2 <= y <= SIZE * 3 // 2
        corners = [
            (t.x_px + (t.image.shape[2] if i % 2 == 0 else 0), t.y_px + (t.image.shape[1] if i < 2 else 0))
            for i, t in enumerate(tiles)
        ]
        assert set(corners) == {(x, y)}


@pytest.mark.parametrize("turn", [0.0, 0.015, -0.06, 0.2, -0.35, 0.45, 0.5, -1.0])
def test_hsv_jitter_is_that_of_colorsys(turn: float) -> None:
    image = torch.randint(0, 256, (3, 8, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image[:, 0, 0], image[:, 0, 1], image[:, 0, 2] = 0, 255, 77
    jittered = jitter_hsv(image, turn, 1.4, 0.8)
    assert jittered.dtype == torch.uint8 and jittered.shape == image.shape
    for row in range(8):
        for column in range(9):
            h, s, v = colorsys.rgb_to_hsv(*(image[:, row, column] / 255).tolist())
            expected = colorsys.hsv_to_rgb((h + turn) % 1, min(1.4 * s, 1), min(0.8 * v, 1))
            found = (jittered[:, row, column] / 255).tolist()
            assert found == pytest.approx(expected, abs=0.6 / 255)


def test_hsv_jitter_saturates_and_the_identity_changes_nothing() -> None:
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(jitter_hsv(image, 0.0, 1.0, 1.0), image)
    brightest = image.amax(dim=0).int()
    assert (jitter_hsv(image, 0.0, 0.0, 1.0).int() == brightest).all()
    assert torch.equal(jitter_hsv(image, 0.0, 1.0, 2.0).amax(dim=0).int(), (2 * brightest).clamp(max=255))
    assert jitter_hsv(image, 0.0, 9.0, 1.0).amin(dim=0).float().mean() < 2


def test_an_image_larger_than_what_is_worked_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    whole = jitter_hsv(image, 0.1, 1.2, 0.9)
    monkeypatch.setattr(data.colour, "_PIXELS_AT_ONCE", 77)
    assert torch.equal(jitter_hsv(image, 0.1, 1.2, 0.9), whole)
    assert whole.permute(1, 2, 0).is_contiguous()


def test_colour_jitter_is_drawn_within_its_limits() -> None:
    image, labels = torch.full((3, SIZE, SIZE), 100, dtype=torch.uint8), np.zeros((0, 5), np.float32)
    values = set()
    for seed in range(20):
        shown, _ = augment_sample(
            [Tile(image, labels, 0, 0)], SIZE, SIZE, replace(STILL, hsv_v=0.3), np.random.default_rng(seed)
        )
        values.add(int(shown[0, 0, 0]))
    assert 70 <= min(values) < 90 and 110 < max(values) <= 130


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mixup_blends_pixels_and_keeps_both_labels(share: float) -> None:
    one, other = scene(0)[0][:, :50, :60], scene(3)[0][:, :50, :60]
    labels = [scene(0)[1], scene(3)[1]]
    image, both = mix((one, labels[0]), (other, labels[1]), share)
    assert image.dtype == torch.uint8
    assert torch.equal(image, (share * one.double() + (1 - share) * other.double()).round().byte())
    assert both.tolist() == np.concatenate(labels).tolist() and both.dtype == np.float32


@pytest.mark.parametrize("zoom", [0.5, 1.5])
@pytest.mark.parametrize("shear", [0.0, 10.0])
def test_a_zoomed_view_shows_the_same_part_in_more_or_fewer_pixels(zoom: float, shear: float) -> None:
    augment = replace(STILL, scale=0.3, translate=0.1, shear=shear)
    size_px = int(SIZE * zoom)
    found = 0
    for seed in range(12):
        tiles = mosaic_tiles([scene(k) for k in range(4)], SIZE, np.random.default_rng(seed))
        shown = []
        for size, factor in ((SIZE, 1.0), (size_px, zoom)):
            view = random_view(augment, 2 * SIZE, size, np.random.default_rng(seed), factor)
            shown.append(render(tiles, view))
        (_, base), (image, labels) = shown
        assert image.shape == (3, size_px, size_px)
        for kind, *box in labels.tolist():
            seen = visible_box(image, int(kind))
            assert seen is not None
            if shear == 0 or (min(box) > 1.5 and max(box) < size_px - 1.5):
                assert np.abs(seen - box).max() <= 1.5
            same = base[base[:, 0] == kind]
            if len(same):
                assert np.abs(same[0, 1:] * zoom - box).max() <= 2
                found += 1
    assert found >= 10


def test_boxes_stay_inside_whatever_the_augmentation() -> None:
    rng = np.random.default_rng(0)
    boxes = 0
    for seed in range(60):
        wild = Augment(
            scale=rng.uniform(0, 0.9), translate=rng.uniform(0, 1), degrees=rng.choice([0.0, 90.0]),
            shear=rng.choice([0.0, 20.0]), flipud=0.5, fliplr=0.5,
        )  # fmt: skip
        _, labels = sample(wild, seed, mosaic=bool(seed % 2))
        assert (labels[:, 1:] >= 0).all() and (labels[:, 1:] <= SIZE).all()
        assert (labels[:, 3:] - labels[:, 1:3] > 0).all()
        boxes += len(labels)
    assert boxes > 30
