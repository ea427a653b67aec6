"""Resized images that need not be decoded again, in memory or on disk.

What lies on disk is in ``.slim-cache`` beside the data (else in the user's cache folder) and may be deleted at any time. A
damaged or outdated file there costs time and a line in the log, never a wrong sample.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import mmap
import os
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .images import read_bytes

logger = logging.getLogger(__name__)

FOLDER = ".slim-cache"
_DECODING = b"2"
"""Counted up where the same file gives other pixels than before: what lies on disk is made anew."""


class MemoryCache:
    """Images of a data set by index, in memory that worker processes share with whoever forked them; filled one by one."""

    def __init__(self, sizes_hw: Sequence[tuple[int, int]]) -> None:
        self._sizes_hw = tuple(sizes_hw)
        self._allocate()

    def _allocate(self) -> None:
        self._starts = np.cumsum([0, *(3 * height * width for height, width in self._sizes_hw)])
        # Anonymous and shared: the system gives pages as they are written, and /dev/shm's limit in containers is not met.
        memory = np.frombuffer(mmap.mmap(-1, int(self._starts[-1]) + len(self._sizes_hw)), np.uint8)
        self._pixels, self._is_filled = np.split(memory, [int(self._starts[-1])])

    def get(self, index: int) -> Tensor | None:
        """uint8 [3, h, w], a view; None if it was not put yet."""
        return self._view(index) if self._is_filled[index] else None

    def put(self, index: int, image: Tensor) -> None:
        self._view(index).copy_(image)
        self._is_filled[index] = 1

    def _view(self, index: int) -> Tensor:
        pixels = self._pixels[self._starts[index] : self._starts[index + 1]]
        return torch.from_numpy(pixels.reshape(*self._sizes_hw[index], 3)).permute(2, 0, 1)

    def __getstate__(self) -> dict[str, Any]:
        return {"_sizes_hw": self._sizes_hw}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._allocate()


class DiskCache:
    """Images of a data set by index, one file each in ``folder``: 16 bytes of digest of the image file's content, by which it
    is told to be current, 4 bytes of checksum of the pixels, and the pixels."""

    def __init__(self, folder: Path, files: Sequence[Path], sizes_hw: Sequence[tuple[int, int]], base: Path) -> None:
        self._folder, self._files, self._sizes_hw, self._base = folder, tuple(files), tuple(sizes_hw), base
        self._digests: dict[int, bytes] = {}
        self._can_write = True

    def get(self, index: int) -> Tensor | None:
        """uint8 [3, h, w]; None if it was not put yet, or is damaged or of another content of the image's file."""
        path, size = self._path(index), (*self._sizes_hw[index], 3)
        try:
            content = np.fromfile(path, np.uint8)
        except FileNotFoundError:
            return None
        mark, pixels = content[:20].tobytes(), content[20:]
        if mark[16:] != zlib.crc32(pixels.data).to_bytes(4):
            logger.warning("%s: damaged: made anew", path)
            return None
        is_current = mark[:16] == self._digest(index) and pixels.size == math.prod(size)
        return torch.from_numpy(pixels.reshape(size)).permute(2, 0, 1) if is_current else None

    def put(self, index: int, image: Tensor) -> None:
        if not self._can_write:
            return
        pixels = image.permute(1, 2, 0).numpy().tobytes()
        try:
            self._folder.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._folder) as folder:
                temporary = Path(folder, "pixels")
                temporary.write_bytes(self._digest(index) + zlib.crc32(pixels).to_bytes(4) + pixels)
                temporary.replace(self._path(index))
        except OSError as error:
            self._can_write = False
            logger.warning("%s: no further images are cached on disk (%s)", self._folder, error.strerror or error)

    def _path(self, index: int) -> Path:
        # Seen from the data set's folder, so that a data set can be moved with its cache.
        key = Path(os.path.relpath(self._files[index], self._base)).as_posix()
        return self._folder / f"{_digest_of(key.encode()).hex()}.pixels"

    def _digest(self, index: int) -> bytes:
        if index not in self._digests:
            self._digests[index] = _digest_of(read_bytes(self._files[index]), _DECODING)
        return self._digests[index]


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    try:
        # Free pages alone would leave out the file cache, which gives way.
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def find_folder(base: Path) -> Path | None:
    """``base/.slim-cache``, or one in the user's cache folder where that cannot be written; None if neither can."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    places = (base / FOLDER, user / "slim" / _digest_of(str(base.resolve()).encode()).hex())
    for place in places:
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                return place
    logger.warning("neither %s nor %s can be written: going on without a cache on disk", *places)
    return None


def _digest_of(content: bytes, person: bytes = b"") -> bytes:
    return hashlib.blake2b(content, digest_size=16, person=person).digest()
