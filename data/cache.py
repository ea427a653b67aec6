"""What a second start need not read again, kept on disk: where it lies, and how a changed file is noticed.

A file's stamp is its size, the times of its last change of content and of status, and its inode. Every ordinary edit moves
one of them: the status time cannot be set back as the content's can, and a replaced file has another inode. A stamp
that was taken within two seconds of the change is not trusted, since a second edit may fall into the same tick of the clock
(git's "racily clean" files). Where the stamp differs or is not trusted, the content decides: of an image by its
BLAKE2 digest, and a label file is simply read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .annotations import Annotations, Entry, as_rows

logger = logging.getLogger(__name__)

FOLDER = ".slim-cache"
VERSION = 1
_SETTLED_NS = 2_000_000_000
"""The coarsest clock of a file system in use, FAT's."""

Stamp = list[int]


def take_stamp(path: Path) -> Stamp | None:
    """Size, times and inode; None if the file is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def is_settled(stamp: Stamp | None) -> bool:
    """Whether a change of the file after now is sure to change its stamp."""
    return stamp is None or time.time_ns() - max(stamp[1], stamp[2]) > _SETTLED_NS


def digest_of(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def name_of(base: Path, split: str, parts: Sequence[object]) -> str:
    """A file name for what depends on ``parts``; it stays when a data set with its cache is moved."""
    text = json.dumps([key_of(part, base) if isinstance(part, Path) else str(part) for part in parts])
    return f"{split}-{digest_of(text.encode())[:12]}"


def key_of(path: Path, base: Path) -> str:
    """The path as seen from the data set's folder."""
    return Path(os.path.relpath(path, base)).as_posix()


def find_folder(base: Path) -> Path | None:
    """``base/.slim-cache``, or one in the user's cache folder where that cannot be written; None if neither can."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    places = (base / FOLDER, user / "slim" / digest_of(str(base.resolve()).encode())[:16])
    for place in places:
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                return place
    logger.warning("neither %s nor %s can be written: going on without a cache on disk", *places)
    return None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
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


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Plain data with a checksum in the first line; the file is written whole or not at all."""
    body = json.dumps({"version": VERSION, **content}).encode()
    with replacing(path) as temporary:
        temporary.write_bytes(b"%08x\n" % zlib.crc32(body) + body)


def read_record(path: Path) -> dict[str, Any] | None:
    """What ``write_record`` wrote; None if it is not there, damaged (then it is logged) or of another version."""
    try:
        checksum, _, body = path.read_bytes().partition(b"\n")
        if int(checksum, 16) != zlib.crc32(body):
            raise ValueError("its checksum is wrong")
        content: dict[str, Any] = json.loads(body)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s: damaged (%s): made anew", path, error)
        return None
    return content if content.get("version") == VERSION else None


def read_annotations(
    entries: Sequence[Entry], sizes: Sequence[tuple[int, int]], folder: Path | None, name: str, base: Path
) -> list[Annotations]:
    """``entry.read(size)`` of each, out of the cache in ``folder`` where the label file has not changed.

    A COCO file, which belongs to many images, is read at every start: a record of its boxes would be no smaller.
    """
    if folder is None or not any(entry.labels for entry in entries):
        return [entry.read(size) for entry, size in zip(entries, sizes, strict=True)]
    path = folder / f"{name}.labels"
    known = (read_record(path) or {}).get("files", {})
    found: list[Annotations] = []
    files: dict[str, Any] = {}
    for entry, size in zip(entries, sizes, strict=True):
        if entry.labels is None:
            found.append(entry.read(size))
            continue
        key, stamp = key_of(entry.labels, base), take_stamp(entry.labels)
        record = known.get(key)
        if record is None or record["stamp"] != stamp or not record["settled"] or record["size"] != list(size):
            # The stamp was taken before: a change while it is read makes the next start read again.
            record = {"stamp": stamp, "settled": is_settled(stamp), "size": list(size), **_plain(entry.read(size))}
        files[key] = record
        found.append(_annotations(record))
    if files != known:
        try:
            write_record(path, {"files": files})
        except OSError as error:
            logger.warning("%s: cannot be written (%s): going on without", path, error.strerror or error)
    return found


def _plain(annotations: Annotations) -> dict[str, Any]:
    return {
        "rows": annotations.rows.tolist(),
        "ignored": annotations.ignored.tolist(),
        "problems": list(annotations.problems),
        "out_of_range": list(annotations.out_of_range),
        "unusable": annotations.unusable,
    }


def _annotations(record: dict[str, Any]) -> Annotations:
    return Annotations(
        as_rows(record["rows"]),
        as_rows(record["ignored"]),
        tuple(record["problems"]),
        tuple(record["out_of_range"]),
        record["unusable"],
    )
