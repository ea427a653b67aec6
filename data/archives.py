"""Unpacking archives that strangers made: nothing outside of the target, no more bytes than announced, all or nothing."""

from __future__ import annotations

import lzma
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from .errors import DataError
from .transfer import check_space, readable

_CHUNK_BYTES = 1 << 20
_DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,  # a compression that this Python lacks
    RuntimeError,  # encrypted
    ValueError,
)
_BY_THE_WAY = ("__MACOSX", ".DS_Store")
"""macOS packs these; its ``._NAME.jpg`` would pass for images."""


class _Member(NamedTuple):
    name: str
    folder: bool
    open: Callable[[], IO[bytes]]
    refused: str = ""
    """What it is, if it is nothing that a data set needs."""


def unpack(archive: Path, target: Path, limit_bytes: int) -> int:
    """Unpack a zip or tar (plain, gz, bz2, xz) into the new folder ``target``; the number of files.

    Folders and regular files alone are made. A link within a tar becomes a copy of the file that it names; other links,
    devices, and names that are absolute or hold ``..`` are refused, as is more than ``limit_bytes`` of content, counted
    as it is written. On any error ``target`` is removed again; DataError names archive and member.
    """
    target.mkdir(parents=True)
    whole = False
    try:
        count = _unpack(archive, target, limit_bytes)
        whole = True
        return count
    except _DAMAGED as error:
        if isinstance(error, DataError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{archive}: cannot be unpacked ({reason}); remove it and download it again") from error
    except OSError as error:
        # bz2 reports damage as an OSError without a number.
        reason = error.strerror or str(error)
        raise DataError(f"{archive}: cannot be unpacked into {target} ({reason}); nothing of it is kept") from error
    finally:
        if not whole:
            shutil.rmtree(target, ignore_errors=True)


def _unpack(archive: Path, target: Path, limit_bytes: int) -> int:
    with closing(_opened(archive)) as opened:
        if isinstance(opened, zipfile.ZipFile):
            announced = sum(info.file_size for info in opened.infolist())
            _check_limit(archive, announced, limit_bytes)
            check_space(target, announced, f"unpacking {archive.name}")
        members = _zip_members(opened) if isinstance(opened, zipfile.ZipFile) else _tar_members(opened)
        written = count = 0
        for member in tqdm(members, unit=" files", desc=f"unpacking {archive.name}"[-30:]):
            place = target.joinpath(*_parts(archive, member))
            if any(part in _BY_THE_WAY for part in place.parts[len(target.parts) :]):
                continue
            if member.folder:
                place.mkdir(parents=True, exist_ok=True)
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            with member.open() as source, place.open("wb") as file:
                while chunk := source.read(_CHUNK_BYTES):
                    written += len(chunk)
                    _check_limit(archive, written, limit_bytes)
                    file.write(chunk)
            count += 1
        return count


def _opened(archive: Path) -> Any:
    # By content: names lie. A tar first, since any file that ends in a zip passes for one.
    if tarfile.is_tarfile(archive):
        return tarfile.open(archive)
    if zipfile.is_zipfile(archive):
        return zipfile.ZipFile(archive)
    with archive.open("rb") as file:
        start = file.read(40)
    raise DataError(f"{archive}: is neither a zip nor a tar; it starts with {start!r}: correct the address")


def _zip_members(opened: zipfile.ZipFile) -> Iterator[_Member]:
    for info in opened.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        refused = "" if kind in (0, stat.S_IFREG, stat.S_IFDIR) else "a link" if kind == stat.S_IFLNK else "a device"
        # The name as the archive has it: zipfile itself cuts it at a NUL and turns the slashes of some systems.
        yield _Member(info.orig_filename, info.is_dir(), lambda info=info: opened.open(info), refused)


def _tar_members(opened: tarfile.TarFile) -> Iterator[_Member]:
    for info in opened:
        refused = "" if info.isfile() or info.isdir() else "a device"
        content: Callable[[], Any] = lambda info=info: opened.extractfile(info)  # noqa: E731
        if info.issym() or info.islnk():
            linked = _linked(opened, info)
            refused = "" if linked is not None else f"a link to {info.linkname!r}"
            content = lambda linked=linked: opened.extractfile(linked)  # noqa: E731
        yield _Member(info.name, info.isdir(), content, refused)


def _linked(opened: tarfile.TarFile, info: tarfile.TarInfo, depth: int = 8) -> tarfile.TarInfo | None:
    """The regular file of the same archive that a link leads to; None where it leads elsewhere or nowhere."""
    for _ in range(depth):
        named = PurePosixPath(info.linkname)
        base = PurePosixPath(info.name).parent if info.issym() else PurePosixPath()
        parts: list[str] = []
        for part in (base / named).parts:
            if part == ".." and not parts:
                return None
            parts.pop() if part == ".." else parts.append(part)
        try:
            info = opened.getmember("/".join(parts))
        except KeyError:
            return None
        if info.isfile():
            return info
        if not (info.issym() or info.islnk()):
            return None
    return None


def _parts(archive: Path, member: _Member) -> tuple[str, ...]:
    """Where a member goes, below the target; DataError for what must not go anywhere."""
    refused = member.refused
    path = PurePosixPath(member.name)
    if not refused and (path.is_absolute() or ".." in path.parts):
        refused = "a path outside of the folder"
    if not refused and re.search(r"[\\\0]|^[A-Za-z]:", member.name):
        refused = "a name that some systems read as a path"
    if refused:
        raise DataError(
            f"{archive}: the member {member.name[:200]!r} is {refused}, which no data set needs; nothing was unpacked: "
            "do not use this archive"
        )
    return path.parts


def _check_limit(archive: Path, count: int, limit_bytes: int) -> None:
    if count > limit_bytes:
        raise DataError(
            f"{archive}: unpacks to {readable(count)} or more, expected at most {readable(limit_bytes)}; nothing was "
            "unpacked: say the true size by 'unpacked' in the description if the archive is to be trusted"
        )
