"""Letterbox geometry by hand, and decoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError
from data.images import FILL, letterbox, letterbox_of, read_image, read_size, resize
from data.letterbox import Letterbox
from tests.data.scenes import rectangle, visible_box


@pytest.mark.parametrize(
    ("original_hw", "size_px", "expected", "resized_hw"),
    [
        ((480, 640), 320, (0.5, 0.5, 0, 40), (240, 320)),
        ((640, 480), 320, (0.5, 0.5, 40, 0), (320, 240)),
        ((100, 100), 320, (3.2, 3.2, 0, 0), (320, 320)),
        # 333 * 320 / 500 = 213.12 -> 213; of the 107 rows that are left 53 lie above.
        ((333, 500), 320, (0.64, 213 / 333, 0, 53), (213, 320)),
        ((1, 1000), 100, (0.1, 1.0, 0, 49), (1, 100)),
    ],
)
def test_letterbox_geometry(
    original_hw: tuple[int, int], size_px: int, expected: tuple[float, float, int, int], resized_hw: tuple[int, int]
) -> None:
    assert letterbox_of(original_hw, size_px) == (Letterbox(*expected, original_hw), resized_hw)


def test_a_canvas_of_another_shape() -> None:
    """320 x 213 pixels on 384 x 256: 64 columns and 43 rows are left."""
    assert letterbox_of((333, 500), 320, (256, 384)) == (
        Letterbox(0.64, 213 / 333, 32, 21, (333, 500)),
        (213, 320),
    )


def test_a_canvas_that_is_too_small_shrinks_the_image() -> None:
    """400 x 500 pixels at 500: on 200 x 500 the height decides, on 500 x 250 the width."""
    assert letterbox_of((400, 500), 500, (200, 500)) == (Letterbox(0.5, 0.5, 125, 0, (400, 500)), (200, 250))
    assert letterbox_of((400, 500), 500, (500, 250)) == (Letterbox(0.5, 0.5, 0, 150, (400, 500)), (200, 250))


@pytest.mark.parametrize("size_hw", [(16, 20), (90, 61)])
def test_memory_formats_give_the_same_pixels(size_hw: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    last = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(resize(image, size_hw), resize(last, size_hw))
    assert torch.equal(resize(image[:, 3:30, 7:40], size_hw), resize(last[:, 3:30, 7:40], size_hw))


def test_letterbox_pads_with_grey_and_keeps_the_image_in_between() -> None:
    square, geometry = letterbox(torch.full((3, 30, 50), 200, dtype=torch.uint8), 100)
    assert (geometry.left_px, geometry.top_px) == (0, 20)
    assert square.shape == (3, 100, 100) and square.dtype == torch.uint8
    assert square[:, :20].unique().tolist() == [FILL] == square[:, 80:].unique().tolist()
    assert square[:, 20:80].unique().tolist() == [200]


@pytest.mark.parametrize("original_hw", [(333, 500), (77, 31), (480, 640)])
def test_boxes_go_to_the_letterbox_and_back(original_hw: tuple[int, int]) -> None:
    geometry, _ = letterbox_of(original_hw, 320)
    height, width = original_hw
    boxes = torch.tensor([[0, 0, width, height], [3, 5, 17.5, 20.25]], dtype=torch.float64)
    moved = geometry.to_letterboxed(boxes)
    assert moved[1, 0].item() == pytest.approx(3 * geometry.ratio_x + geometry.left_px)
    assert moved[1, 3].item() == pytest.approx(20.25 * geometry.ratio_y + geometry.top_px)
    torch.testing.assert_close(geometry.to_original(moved), boxes)


def test_to_original_clips_to_the_image() -> None:
    geometry, _ = letterbox_of((480, 640), 320)
    assert geometry.to_original(torch.tensor([[-5.0, 0.0, 400.0, 320.0]])).tolist() == [[0, 0, 640, 480]]


def test_the_pixels_follow_the_geometry() -> None:
    square, geometry = letterbox(rectangle(90, 150, (30, 21, 99, 60)), 100)
    expected = geometry.to_letterboxed(torch.tensor([[30.0, 21, 99, 60]]))[0].numpy()
    found = visible_box(square, 0)
    assert found is not None and np.abs(found - expected).max() <= 0.5


def test_shrinking_averages() -> None:
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[:, :, ::4] = 200
    assert (resize(stripes, (16, 16)).float()[:, :, 1:-1] - 50).abs().max() <= 5


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp", ".tiff"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_formats_and_grey_images_are_read(tmp_path: Path, suffix: str, mode: str) -> None:
    path = tmp_path / f"image{suffix}"
    Image.new("RGB", (31, 20), (90, 90, 90)).convert(mode).save(path)
    image = read_image(path)
    assert read_size(path) == image.shape[1:] == (20, 31)
    assert image.dtype == torch.uint8 and image.shape[0] == 3 and (image.int() - 90).abs().max() <= 2


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_exif_turns_the_image_upright(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255
    Image.fromarray(pixels).save(tmp_path / f"turned{suffix}", exif=exif)
    image = read_image(tmp_path / f"turned{suffix}")
    assert read_size(tmp_path / f"turned{suffix}") == image.shape[1:] == (40, 20)
    assert image[:, :18].min() > 240 and image[:, 22:].max() < 15


def test_bytes_after_the_end_of_a_jpeg_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "appended.jpg"
    Image.new("RGB", (40, 30)).save(path)
    path.write_bytes(path.read_bytes() + bytes(9))
    assert read_size(path) == read_image(path).shape[1:] == (30, 40)


@pytest.mark.parametrize("read", [read_image, read_size])
@pytest.mark.parametrize(
    ("name", "content"), [("empty.jpg", b""), ("text.png", b"no image"), ("cut.jpg", None), ("cut.png", None)]
)
def test_damaged_images_are_named(tmp_path: Path, read: object, name: str, content: bytes | None) -> None:
    path = tmp_path / name
    if content is None:
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        content = path.read_bytes()[: path.stat().st_size * 2 // 3]
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read(path)  # type: ignore[operator]
    assert str(error.value).startswith(f"{path}: the image cannot be read (")
    assert str(error.value).count("\n") == 0
    assert str(error.value).endswith("; restore or remove it") and str(error.value).count("cannot be read") == 1
