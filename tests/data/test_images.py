"""Letterbox geometry by hand, and decoding."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data import DataError
from data.images import FILL, IMAGE_SUFFIXES, letterbox, letterbox_of, read_image, read_size, resize
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


def averaging(old: int, new: int) -> NDArray[np.float64]:
    """[new, old]: new pixel i covers i * s to (i + 1) * s of the old ones, s = old / new, some of them in part."""
    edges = np.arange(new + 1) * old / new
    low, high = np.maximum(edges[:-1, None], np.arange(old)), np.minimum(edges[1:, None], np.arange(1, old + 1))
    return (high - low).clip(min=0) * new / old


def between_centres(old: int, new: int) -> NDArray[np.float64]:
    """[new, old]: linear between the two old pixels whose centres lie next to the new one's; the outermost at the edges."""
    matrix = np.zeros((new, old))
    for i in range(new):
        place = (i + 0.5) * old / new - 0.5
        low = math.floor(place)
        for pixel, weight in ((low, 1 - (place - low)), (low + 1, place - low)):
            matrix[i, min(max(pixel, 0), old - 1)] += weight
    return matrix


def expected(image: Tensor, size_hw: tuple[int, int], matrix: Callable[[int, int], NDArray[np.float64]]) -> Tensor:
    down, across = (matrix(old, new) for old, new in zip(image.shape[1:], size_hw, strict=True))
    return torch.from_numpy(np.einsum("ih,chw,jw->cij", down, image.numpy().astype(np.float64), across, optimize=True))


def noise(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(height))


def test_the_expected_values_by_hand() -> None:
    """Two pixels out of three: (0 + 30 / 2) / 1.5 and (30 / 2 + 90) / 1.5; three out of two: at 1/6, 1/2 and 5/6 of them."""
    row = torch.tensor([[[0, 30, 90]]] * 3, dtype=torch.uint8)
    assert expected(row, (1, 2), averaging)[0].tolist() == [pytest.approx([10, 70])]
    assert expected(row[..., :2], (1, 3), between_centres)[0].tolist() == [pytest.approx([0, 15, 30])]
    assert resize(row, (1, 2))[0].tolist() == [[10, 70]] and resize(row[..., :2], (1, 3))[0].tolist() == [[0, 15, 30]]


@pytest.mark.parametrize(
    ("old_hw", "new_hw"),
    [((48, 64), (24, 32)), ((33, 50), (21, 32)), ((90, 61), (64, 43)), ((100, 75), (11, 8)), ((7, 300), (2, 64))],
)
def test_evaluation_shrinks_by_averages_of_areas(old_hw: tuple[int, int], new_hw: tuple[int, int]) -> None:
    image = noise(*old_hw)
    assert (resize(image, new_hw) - expected(image, new_hw, averaging)).abs().max() <= 0.51


@pytest.mark.parametrize("area", [False, True])
@pytest.mark.parametrize(("old_hw", "new_hw"), [((24, 32), (48, 64)), ((33, 50), (42, 64)), ((5, 9), (64, 115))])
def test_enlarging_is_bilinear(old_hw: tuple[int, int], new_hw: tuple[int, int], area: bool) -> None:
    """OpenCV rounds its weights to 1 / 2048."""
    image = noise(*old_hw)
    assert (resize(image, new_hw, area=area) - expected(image, new_hw, between_centres)).abs().max() <= 0.8


@pytest.mark.parametrize(("old_hw", "new_hw"), [((33, 50), (21, 32)), ((90, 61), (64, 43)), ((100, 75), (40, 30))])
def test_training_shrinks_bilinearly_without_antialias(old_hw: tuple[int, int], new_hw: tuple[int, int]) -> None:
    image = noise(*old_hw)
    found = resize(image, new_hw, area=False)
    assert (found - expected(image, new_hw, between_centres)).abs().max() <= 0.8
    assert (found - expected(image, new_hw, averaging)).abs().mean() > 5


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


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "big-endian.tiff", "turned.png", "alpha.png", "colour.png"])
def test_the_upper_half_of_16_bits_counts_as_in_opencv(tmp_path: Path, name: str) -> None:
    channels = {"alpha.png": 4, "colour.png": 3}.get(name)
    values = np.random.default_rng(0).integers(0, 2**16, (20, 31, channels or 1), dtype=np.uint16)
    path, exif = tmp_path / name, Image.Exif()
    exif[0x0112] = 6 if name == "turned.png" else 1
    if channels:
        cv2.imwrite(str(path), values)
    else:
        grey = values[..., 0].astype(">u2" if name == "big-endian.tiff" else "<u2")
        Image.fromarray(grey).save(path, exif=exif)
    found = read_image(path)
    by_opencv = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    assert by_opencv is not None and (by_opencv == values[..., :3] >> 8).all()
    expected = np.rot90(by_opencv, -1) if name == "turned.png" else by_opencv
    assert np.array_equal(found.permute(1, 2, 0), expected[..., ::-1]) and read_size(path) == found.shape[1:]


def test_colour_tiff_of_16_bits_is_one_apart_at_most(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (20, 31, 3), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "a.tiff"), values)
    expected = cv2.imread(str(tmp_path / "a.tiff"))
    assert expected is not None
    difference = read_image(tmp_path / "a.tiff").permute(1, 2, 0).numpy().astype(int) - expected[..., ::-1]
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("read", [read_image, read_size])
@pytest.mark.parametrize(("kind", "said"), [(np.float32, "floats"), (np.int32, "integers of 32 bits or with a sign")])
def test_other_values_are_refused(tmp_path: Path, read: Callable[[Path], object], kind: type, said: str) -> None:
    path = tmp_path / "depth.tiff"
    Image.fromarray(np.ones((4, 6), kind)).save(path)
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value) == f"{path}: its pixels are {said}, expected values of 8 or 16 bits; convert or remove it"


@pytest.mark.parametrize("read", [read_image, read_size])
def test_the_limit_is_the_users(tmp_path: Path, read: Callable[[Path, int], object]) -> None:
    path = tmp_path / "large.png"
    Image.new("L", (60, 50)).save(path)
    read(path, 3000)
    with pytest.raises(DataError) as error:
        read(path, 2999)
    assert str(error.value) == (
        f"{path}: 60 x 50 pixels, expected at most 2999; give a larger --max-pixels to read it, or remove it"
    )


def test_a_bomb_is_read_where_the_limit_is_above_it(tmp_path: Path) -> None:
    """Pillow's own limit is 178956970; nothing of the file's 200 million pixels is decoded here."""
    path = tmp_path / "bomb.png"
    Image.new("1", (20000, 10000)).save(path)
    with pytest.raises(DataError, match=r"bomb\.png: 20000 x 10000 pixels, expected at most 178956970; give a larger"):
        read_size(path)
    assert read_size(path, 200_000_000) == (10000, 20000)


def test_the_first_picture_of_an_mpo_counts(tmp_path: Path) -> None:
    path = tmp_path / "left-and-right.mpo"
    noise = np.random.default_rng(0).integers(200, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, save_all=True, append_images=[Image.new("RGB", (40, 30))])
    with Image.open(path) as image:
        assert image.format == "MPO" and path.suffix in IMAGE_SUFFIXES
    assert read_size(path) == (30, 40) and read_image(path).min() > 150
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])  # within the first picture
    with pytest.raises(DataError, match=r"left-and-right\.mpo: the image cannot be read"):
        read_size(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_the_size_is_that_of_the_pixels(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"image{suffix}"
    Image.new("RGB", (20, 10), "red").save(file, **({} if suffix == ".bmp" else {"exif": exif}))
    assert read_size(file) == tuple(read_image(file).shape[1:])


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_a_file_that_is_cut_off_is_found_when_it_is_opened(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"image{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(DataError, match="cannot be read"):
        read_size(file)
