"""Decoded and letterboxed images in one file that all processes map: loader workers share its memory.

Two files: ``NAME.pixels`` holds squares of S * S * 3 bytes, one after another; the record ``NAME.images`` says which
image is where, by stamp and digest of its file and checksum of its square. Squares are only ever appended, and the record is
replaced at the end, so that an interrupted writer leaves what was there.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from .cache import Stamp, digest_of, is_settled, key_of, read_record, replacing, take_stamp, write_record
from .errors import DataError
from .images import decode_image, letterbox, read_bytes, read_image

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Square:
    """One image of the file."""

    stamp: Stamp | None
    settled: bool
    digest: str
    original_hw: tuple[int, int]
    slot: int
    checksum: int


class PixelFile:
    """The letterboxed images of a data set, by index, as uint8 [3, S, S] mapped from the disk.

    A square is checked against its checksum when a process first takes it; a damaged one is decoded again and mended.
    """

    def __init__(self, path: Path, images: Sequence[Path], squares: Sequence[Square], size_px: int) -> None:
        self.path, self.images, self.squares, self.size_px = path, tuple(images), tuple(squares), size_px
        self._open()

    def __len__(self) -> int:
        return len(self.squares)

    def subset(self, indices: Sequence[int]) -> PixelFile:
        """The file with these images alone, in this order."""
        images, squares = ([kept[i] for i in indices] for kept in (self.images, self.squares))
        return PixelFile(self.path, images, squares, self.size_px)

    def __getitem__(self, index: int) -> Tensor:
        square = self.squares[index]
        pixels = torch.from_numpy(self._map[square.slot]).permute(2, 0, 1)
        if not self._checked[index]:
            if zlib.crc32(self._map[square.slot]) != square.checksum:
                return self._mend(index)
            self._checked[index] = True
        return pixels

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_map", "_checked")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        count = 1 + max(square.slot for square in self.squares)
        # Copy on write: torch wants memory that it may write to, and no write reaches the file.
        self._map = np.memmap(self.path, np.uint8, mode="c", shape=(count, self.size_px, self.size_px, 3))
        self._checked = np.zeros(len(self.squares), dtype=bool)

    def _mend(self, index: int) -> Tensor:
        square, image = self.squares[index], self.images[index]
        logger.warning("%s: damaged at %s, which is decoded again", self.path, image)
        pixels, _ = letterbox(read_image(image), self.size_px)
        content = _bytes_of(pixels)
        if zlib.crc32(content) != square.checksum:
            raise DataError(f"{image}: the image changed since the data set was opened; start again")
        try:
            with self.path.open("r+b") as file:
                file.seek(square.slot * len(content))
                file.write(content)
        except OSError as error:
            logger.warning("%s: cannot be mended (%s)", self.path, error.strerror or error)
        return pixels


def open_pixels(
    folder: Path, name: str, images: Sequence[Path], base: Path, size_px: int
) -> tuple[list[tuple[int, int] | str], PixelFile | None] | None:
    """Each image's original (height, width), or why it cannot be read, and the file of the squares of those that can.

    What is not in the file yet, or changed, is decoded and added. None, with a line in the log, if the disk does not take it.
    """
    try:
        with FileLock(folder / f"{name}.lock"):
            return _Update(folder, name, images, base, size_px).run()
    except OSError as error:
        logger.warning("%s: no cache on disk (%s)", folder / f"{name}.pixels", error.strerror or error)
        return None


class _Update:
    """One look through all images, under the lock."""

    def __init__(self, folder: Path, name: str, images: Sequence[Path], base: Path, size_px: int) -> None:
        self.images, self.size_px, self.bytes = images, size_px, 3 * size_px**2
        self.pixels, self.record = folder / f"{name}.pixels", folder / f"{name}.images"
        self.keys = [key_of(image, base) for image in images]
        self.known, self.slots = self._read()
        self.fresh = self.slots == 0
        self.lock = threading.Lock()
        self.file: BinaryIO | None = None

    def run(self) -> tuple[list[tuple[int, int] | str], PixelFile | None]:
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            squares: list[Square | str | None] = list(pool.map(self._unchanged, range(len(self.images))))
            missing = [i for i, square in enumerate(squares) if square is None]
            if missing:
                self._check_space(len(missing))
                with ExitStack() as stack:
                    path = stack.enter_context(replacing(self.pixels)) if self.fresh else self.pixels
                    # Closed before the rename: the stack unwinds from its end.
                    self.file = stack.enter_context(path.open("r+b"))
                    for i, square in zip(missing, pool.map(self._decoded, missing), strict=True):
                        squares[i] = square
        rows = {self.keys[i]: square for i, square in enumerate(squares) if isinstance(square, Square)}
        if rows != self.known:
            write_record(
                self.record, {"slots": self.slots, "squares": {key: asdict(square) for key, square in rows.items()}}
            )
        usable = [i for i, square in enumerate(squares) if isinstance(square, Square)]
        opened = (
            PixelFile(self.pixels, [self.images[i] for i in usable], [rows[self.keys[i]] for i in usable], self.size_px)
            if usable
            else None
        )
        return [square.original_hw if isinstance(square, Square) else str(square) for square in squares], opened

    def _read(self) -> tuple[dict[str, Square], int]:
        content = read_record(self.record)
        if content is None:
            return {}, 0
        slots = content["slots"]
        length = self.pixels.stat().st_size if self.pixels.is_file() else 0
        if length < slots * self.bytes:
            logger.warning("%s: damaged (%d bytes, expected %d): made anew", self.pixels, length, slots * self.bytes)
            return {}, 0
        if slots > 2 * len(self.images):
            return {}, 0  # mostly squares of images that are gone or changed
        squares = {key: Square(**row) for key, row in content["squares"].items()}
        return {key: _with_tuple(square) for key, square in squares.items()}, slots

    def _unchanged(self, index: int) -> Square | None:
        known, stamp = self.known.get(self.keys[index]), take_stamp(self.images[index])
        if known is None or stamp is None:
            return None
        if known.settled and known.stamp == stamp:
            return known
        try:
            same = digest_of(read_bytes(self.images[index])) == known.digest
        except DataError:
            return None
        return _with_tuple(Square(**{**asdict(known), "stamp": stamp, "settled": is_settled(stamp)})) if same else None

    def _decoded(self, index: int) -> Square | str:
        assert self.file is not None
        stamp = take_stamp(self.images[index])
        try:
            content = read_bytes(self.images[index])
            pixels, geometry = letterbox(decode_image(content, self.images[index]), self.size_px)
        except DataError as error:
            return str(error)
        square = _bytes_of(pixels)
        with self.lock:
            # Written, not mapped: on a full disk a write fails, a mapped page kills the process.
            slot = self.slots
            self.file.seek(slot * self.bytes)
            self.file.write(square)
            self.slots += 1
        return Square(stamp, is_settled(stamp), digest_of(content), geometry.original_hw, slot, zlib.crc32(square))

    def _check_space(self, count: int) -> None:
        need, free = count * self.bytes, shutil.disk_usage(self.pixels.parent).free
        if need > free / 2:
            raise OSError(f"{need / 2**30:.1f} GiB are more than half of the {free / 2**30:.1f} GiB free")


def _bytes_of(pixels: Tensor) -> bytes:
    """uint8 [3, S, S], channels last."""
    return pixels.permute(1, 2, 0).numpy().tobytes()


def _with_tuple(square: Square) -> Square:
    """JSON knows no tuples."""
    height, width = square.original_hw
    return Square(square.stamp, square.settled, square.digest, (height, width), square.slot, square.checksum)
