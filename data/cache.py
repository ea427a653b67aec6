"""What need not be done twice: resized images in memory or on disk, and sizes and labels from one start to the next.

What lies on disk is in ``.slim-cache`` beside the data (else in the user's cache folder) and may be deleted at any time. A
damaged or outdated file there costs time and a line in the log, never a wrong sample.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import mmap
import os
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .annotations import Annotations, Entry, as_rows
from .errors import DataError
from .images import read_bytes, read_size

logger = logging.getLogger(__name__)

FOLDER = ".slim-cache"
VERSION = 2
_SETTLED_NS = 2_000_000_000
"""The coarsest clock of a file system in use, FAT's."""


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
            with _replacing(self._path(index)) as temporary:
                temporary.write_bytes(self._digest(index) + zlib.crc32(pixels).to_bytes(4) + pixels)
        except OSError as error:
            self._can_write = False
            logger.warning("%s: no further images are cached on disk (%s)", self._folder, error.strerror or error)

    def _path(self, index: int) -> Path:
        return self._folder / f"{_digest_of(_key_of(self._files[index], self._base).encode())}.pixels"

    def _digest(self, index: int) -> bytes:
        if index not in self._digests:
            self._digests[index] = bytes.fromhex(_digest_of(read_bytes(self._files[index])))
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
    places = (base / FOLDER, user / "slim" / _digest_of(str(base.resolve()).encode()))
    for place in places:
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                return place
    logger.warning("neither %s nor %s can be written: going on without a cache on disk", *places)
    return None


def read_sizes_and_labels(
    entries: Sequence[Entry], folder: Path | None, base: Path, record_of: Sequence[object]
) -> list[tuple[tuple[int, int], Annotations] | str]:
    """The (height, width) and annotations of each image, or why its file cannot be read; no image is decoded.

    With a cache ``folder``, files are read only if their size, times or inode have changed since an earlier start with the
    same ``record_of``, or if they had been written just before (a second edit could fall into the same tick of the clock).
    A COCO file, which belongs to many images, is read at every start: a record of its boxes would be no smaller.
    """
    name = _digest_of(json.dumps([_key_of(x, base) if isinstance(x, Path) else str(x) for x in record_of]).encode())
    path = folder / f"{name}.json" if folder else None
    known = _read_record(path) if path else {}
    record: dict[str, Any] = {}

    def read(entry: Entry) -> tuple[tuple[int, int], Annotations] | str:
        key = _key_of(entry.image, base)
        stamps = [_stamp(path) if path else None for path in (entry.image, entry.labels)]
        found = known.get(key)
        if found is None or found["stamps"] != stamps or not found["settled"]:
            try:
                size = read_size(entry.image)
            except DataError as error:
                return str(error)
            labels = _to_plain(entry.read(size)) if entry.labels else None
            # The stamps were taken before: a change while the files are read makes the next start read them again.
            found = {"stamps": stamps, "settled": all(map(_is_settled, stamps)), "size": size, "labels": labels}
        record[key] = found
        height, width = found["size"]
        return (height, width), _from_plain(found["labels"]) if entry.labels else entry.read((height, width))

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results = list(pool.map(read, entries))
    if path and record != known:
        body = json.dumps({"version": VERSION, "files": record}).encode()
        try:
            with _replacing(path) as temporary:
                temporary.write_bytes(b"%08x\n" % zlib.crc32(body) + body)
        except OSError as error:
            logger.warning("%s: cannot be written (%s): going on without", path, error.strerror or error)
    return results


def _read_record(path: Path) -> dict[str, Any]:
    try:
        checksum, _, body = path.read_bytes().partition(b"\n")
        if int(checksum, 16) != zlib.crc32(body):
            raise ValueError("its checksum is wrong")
        content = json.loads(body)
        return dict(content["files"]) if content["version"] == VERSION else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s: damaged (%s): made anew", path, error)
        return {}


def _to_plain(labels: Annotations) -> dict[str, Any]:
    return {**vars(labels), "rows": labels.rows.tolist(), "ignored": labels.ignored.tolist()}


def _from_plain(labels: dict[str, Any]) -> Annotations:
    arrays = {key: as_rows(labels[key]) for key in ("rows", "ignored")}
    return Annotations(**{**labels, **arrays, **{key: tuple(labels[key]) for key in ("problems", "out_of_range")}})


def _stamp(path: Path) -> list[int] | None:
    """Size, times and inode: every ordinary edit moves one of them. None if the file is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _is_settled(stamp: list[int] | None) -> bool:
    """Whether a change of the file after now is sure to change its stamp."""
    return stamp is None or time.time_ns() - max(stamp[1], stamp[2]) > _SETTLED_NS


def _digest_of(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _key_of(path: Path, base: Path) -> str:
    """The path as seen from the data set's folder, so that a data set can be moved with its cache."""
    return Path(os.path.relpath(path, base)).as_posix()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends well, and vanishes when it does not."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
