"""Zip and tar archives, unpacked as what they are: files of a stranger."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from .errors import DataError

MAX_LINKS = 1000
"""Of a tar; pictures are files."""


def unpack(archive: Path, target: Path) -> None:
    """Unpack a zip or tar (plain, gz, bz2, xz), told by its content, into the new folder ``target``.

    Nothing is written outside of it: tarfile's filter ``data`` refuses what leads out, links and devices among it, and zipfile
    takes such names as if they were inside. What macOS packs by the way is removed again.

    Raises:
        DataError: the archive is of no known kind, damaged or refused; nothing of it is kept then.
    """
    try:
        target.mkdir(parents=True)
        if tarfile.is_tarfile(archive):  # first, since any file that ends in a zip passes for one
            with tarfile.open(archive) as tar:
                tar.extractall(target, filter=_bounded(shutil.disk_usage(target).free))
        elif zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                if sum(info.file_size for info in opened.infolist()) > shutil.disk_usage(target).free:
                    raise ValueError("it holds more than the disk has free")
                opened.extractall(target)
        else:
            with archive.open("rb") as file:
                raise ValueError(f"neither a zip nor a tar; it starts with {file.read(40)!r}: correct the address")
        for junk in [*target.rglob("__MACOSX"), *target.rglob(".DS_Store")]:
            shutil.rmtree(junk) if junk.is_dir() else junk.unlink()
    except Exception as error:  # a damaged archive can fail in any way
        shutil.rmtree(target, ignore_errors=True)
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{archive}: cannot be unpacked ({reason}); nothing of it is kept; free some space, or download it again"
        ) from error


def _bounded(free: int) -> Callable[[tarfile.TarInfo, str], tarfile.TarInfo | None]:
    """tarfile's filter ``data`` for an archive of so many bytes and few links: each link is looked for among all members."""
    links, size = 0, 0

    def checked(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
        nonlocal links, size
        links, size = links + (member.islnk() or member.issym()), size + member.size
        if links > MAX_LINKS:
            raise ValueError(f"more than {MAX_LINKS} links")
        if size > free:
            raise ValueError("it holds more than the disk has free")
        return tarfile.data_filter(member, folder)

    return checked
