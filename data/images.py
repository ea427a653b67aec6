"""Images on disk and their letterbox geometry.

Decoding is Pillow's, which torchvision brings along: torchvision.io's own decoders are deprecated since 0.29. Resizing is
OpenCV's, whose filters YOLOv5's checkpoints were trained and are evaluated with. Images are [3, H, W] with the colours of a
pixel side by side in memory (channels last): decoders and OpenCV write them so, and convolutions want them so.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import DataError
from .letterbox import Letterbox
from .settings import MAX_PIXELS

FILL = 114
"""The grey of every pixel that no image covers: YOLOv5's, so that its checkpoints see what they were trained on."""

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".mpo", ".png", ".webp", ".bmp", ".tif", ".tiff"})
# Pillow's plugins raise these for damaged files, SyntaxError and ValueError among them.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError)
_EMPTY = "the file has 0 bytes"
_EXIF_ORIENTATION = 0x0112


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode an image file to RGB uint8 [3, H, W], turned upright as its EXIF says; DataError if that cannot be done.

    Of grey images of 16 bits a value, and of colour ones, the upper 8 bits count, as for OpenCV's ``imread`` (which rounds
    in colour TIFF files: one in 255 apart). Of several images in a file (MPO, TIFF) the first is taken.
    """
    content = read_bytes(path)
    try:
        with _open(path, max_pixels, content) as image:
            return pixels_of(image)
    except DataError:
        raise
    except _UNREADABLE as error:
        raise _damaged(path, error) from error


def pixels_of(image: Image.Image) -> Tensor:
    """A Pillow image as RGB uint8 [3, H, W], turned upright as its EXIF says; of 16 bits a value the upper 8."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):  # Pillow would clip at 255
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1)


def read_bytes(path: Path) -> bytes:
    """The file's content; DataError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise _damaged(path, error) from error


def read_size(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return (height, width), upright; DataError as ``read_image`` for what is visibly wrong.

    No pixel is decoded of a file in whose format damage shows without; a TIFF's size may also be turned already, or not.
    """
    try:
        with _open(path, max_pixels) as image:
            image.verify()
        # A verified image is spent: Pillow wants it opened again.
        with _open(path, max_pixels) as image:
            width, height = image.size
            turned = image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
            kind = image.format
        if not (kind in ("PNG", "WEBP") or (kind in ("JPEG", "MPO") and _ends_as_jpeg(path))):
            # Cut off, whole with something appended, or of a format that has no mark of its end: only decoding tells.
            _, height, width = read_image(path, max_pixels).shape
            return height, width
    except DataError:
        raise
    except _UNREADABLE as error:
        raise _damaged(path, error) from error
    return (width, height) if turned else (height, width)


def _ends_as_jpeg(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-2, os.SEEK_END)
        return file.read() == b"\xff\xd9"


@contextlib.contextmanager
def _open(path: Path, max_pixels: int, content: bytes | None = None) -> Iterator[Image.Image]:
    """A file, or its ``content``, with nothing decoded; DataError where its pixels are too many, or no bytes."""
    if (path.stat().st_size if content is None else len(content)) == 0:
        raise OSError(_EMPTY)
    Image.MAX_IMAGE_PIXELS = None  # Pillow's limit, of the whole process; it warns at a half, and is not the user's
    with Image.open(path if content is None else io.BytesIO(content)) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise DataError(
                f"{path}: {width} x {height} pixels, expected at most {max_pixels}; give a larger --max-pixels to read it, "
                "or remove it"
            )
        if image.mode in ("F", "I"):
            kind = "floats" if image.mode == "F" else "integers of 32 bits or with a sign"
            raise DataError(f"{path}: its pixels are {kind}, expected values of 8 or 16 bits; convert or remove it")
        yield image


def _damaged(path: Path, error: Exception) -> DataError:
    if isinstance(error, UnidentifiedImageError):
        error = ValueError("of no known image format")
    reason = str(getattr(error, "strerror", None) or error).splitlines() or [type(error).__name__]
    return DataError(f"{path}: the image cannot be read ({reason[0].strip()}); restore or remove it")


def grey(height: int, width: int) -> Tensor:
    """Nothing but ``FILL``: uint8 [3, height, width], channels last."""
    return torch.full((height, width, 3), FILL, dtype=torch.uint8).permute(2, 0, 1)


def letterbox_of(
    original_hw: tuple[int, int], image_size_px: int, canvas_hw: tuple[int, int] | None = None
) -> tuple[Letterbox, tuple[int, int]]:
    """Scale an image so that its longer side is ``image_size_px``, centred on a canvas: that square unless given.

    On a canvas that is too small for that it is as large as fits. Returns the geometry and the resized (height, width);
    an odd remainder goes to the right and the bottom.
    """
    height, width = original_hw
    canvas_h, canvas_w = canvas_hw or (image_size_px, image_size_px)
    ratio = min(image_size_px / max(height, width), canvas_h / height, canvas_w / width)
    return _centred(original_hw, ratio, (canvas_h, canvas_w))


@dataclass(frozen=True)
class Canvas:
    """What a picture is scaled to fit into: ``sides_px`` (height, width).

    The network's input is just that, or with ``stride_px`` the multiples of it that leave the least grey.
    """

    sides_px: tuple[int, int]
    stride_px: int | None = None

    def place(self, original_hw: tuple[int, int]) -> tuple[Letterbox, tuple[int, int], tuple[int, int]]:
        """The geometry, the resized (height, width) and the input's (height, width); on a square that of `letterbox_of`."""
        ratio = min(side / original for side, original in zip(self.sides_px, original_hw, strict=True))
        input_hw = self.sides_px
        if self.stride_px is not None:
            _, resized_hw = _centred(original_hw, ratio, self.sides_px)
            height, width = (-(-side // self.stride_px) * self.stride_px for side in resized_hw)
            input_hw = height, width
        return *_centred(original_hw, ratio, input_hw), input_hw

    def letterbox(self, image: Tensor) -> tuple[Tensor, Letterbox]:
        """uint8 [3, H, W] -> uint8 [3, height, width] on grey as in the evaluation, and its geometry."""
        geometry, (height, width), input_hw = self.place((image.shape[1], image.shape[2]))
        canvas, top, left = grey(*input_hw), geometry.top_px, geometry.left_px
        canvas[:, top : top + height, left : left + width] = resize(image, (height, width))
        return canvas, geometry


def _centred(
    original_hw: tuple[int, int], ratio: float, canvas_hw: tuple[int, int]
) -> tuple[Letterbox, tuple[int, int]]:
    (height, width), (canvas_h, canvas_w) = original_hw, canvas_hw
    new_h, new_w = max(1, round(height * ratio)), max(1, round(width * ratio))
    assert new_h <= canvas_h and new_w <= canvas_w, "the canvas is too small"
    left, top = (canvas_w - new_w) // 2, (canvas_h - new_h) // 2
    return Letterbox(new_w / width, new_h / height, left, top, (height, width)), (new_h, new_w)


def resize(image: Tensor, size_hw: tuple[int, int], *, area: bool = True) -> Tensor:
    """Resize an image with the filter that YOLOv5 uses for the same purpose.

    An image that shrinks becomes the average of the area under each new pixel, as in YOLOv5's evaluation, or without
    ``area`` is sampled bilinearly between the pixels next to each new centre, as in its training (faster, not antialiased;
    at exactly half the size both are the same). An image that grows is always sampled bilinearly, between pixel centres.

    Args:
        image: uint8 [3, H, W]; fastest where its memory is channels last.
        size_hw: the new height and width in pixels.
        area: average areas when shrinking: for evaluation, calibration and detection. False is for training.

    Returns:
        uint8 [3, h, w], channels last in memory; ``image`` itself where it has that size already.

    >>> resize(torch.tensor([[[0, 100, 200, 50, 10, 90]]] * 3, dtype=torch.uint8), (1, 2))[0].tolist()
    [[100, 50]]
    >>> resize(torch.tensor([[[0, 100, 200, 50, 10, 90]]] * 3, dtype=torch.uint8), (1, 2), area=False)[0].tolist()
    [[100, 10]]
    """
    height, width = size_hw
    if image.shape[-2:] == torch.Size(size_hw):
        return image
    shrinks = height <= image.shape[1] and width <= image.shape[2]
    method = cv2.INTER_AREA if area and shrinks else cv2.INTER_LINEAR
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    return torch.from_numpy(cv2.resize(pixels, (width, height), interpolation=method)).permute(2, 0, 1)


def letterbox(image: Tensor, image_size_px: int) -> tuple[Tensor, Letterbox]:
    """Shrink or enlarge an image as the evaluation does, and centre it on a grey square.

    uint8 [3, H, W] -> uint8 [3, image_size_px, image_size_px], and its geometry.

    >>> square, geometry = letterbox(torch.zeros(3, 30, 60, dtype=torch.uint8), 40)
    >>> square.shape, geometry.ratio_x, (geometry.left_px, geometry.top_px)
    (torch.Size([3, 40, 40]), 0.6666666666666666, (0, 10))
    """
    return Canvas((image_size_px, image_size_px)).letterbox(image)
