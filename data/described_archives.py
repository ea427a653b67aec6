"""The ``download`` key of a data set's description: which archives, from where, and where their content goes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from .errors import DataError
from .transfer import Source

_KEYS = ("url", "sha256", "size", "unpacked", "from", "into", "voc")
_MOST_EXPANSION = 20
"""Without 'unpacked', how many times its own size an archive may unpack to; text reaches 10, photographs 1."""
_LEAST_LIMIT_BYTES = 100_000_000


@dataclass(frozen=True)
class Archive:
    """An entry of ``download``: a zip or tar, and where in the data set's folder its content goes."""

    source: Source
    unpacked: int | None = None
    """Bytes that the content may have."""
    origin: str | None = "."
    """The folder of the archive that is wanted; None: the outermost in which the splits' entries are found."""
    into: str = "."
    voc: tuple[tuple[str, str], ...] = ()
    """(split, list) pairs: ``origin`` is in VOC's layout; what ImageSets/Main/LIST.txt names goes to images/SPLIT and
    Annotations/SPLIT, the rest is left out."""

    @property
    def file_name(self) -> str:
        """Of the archive on our disk; two addresses never share one."""
        name = unquote(urlsplit(self.source.url).path.rpartition("/")[2])
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".")
        return f"{hashlib.sha256(self.source.url.encode()).hexdigest()[:8]}-{plain}"

    def limit_bytes(self, archive: Path) -> int:
        return self.unpacked or max(_MOST_EXPANSION * archive.stat().st_size, _LEAST_LIMIT_BYTES)


def described_archives(content: Mapping[str, Any], file: Path) -> tuple[Archive, ...]:
    """What ``download`` describes; DataError naming the key that cannot be followed. A script is refused."""
    described = content.get("download")
    if not described:
        raise DataError(
            f"{file}: has no download key, so --download has nowhere to fetch from; put the data there by hand"
        )
    if isinstance(described, str):
        if not _is_address(described.strip()):
            first = described.strip().splitlines()[0][:60]
            raise DataError(
                f"{file}: download is a script ({first!r}), and scripts are never run; expected an http(s) address or a "
                "list of archives with url, sha256, size and into"
            )
        return (Archive(Source(described.strip()), origin=None),)
    if not isinstance(described, list):
        raise DataError(f"{file}: download is {described!r}, expected an http(s) address or a list of archives")
    archives = tuple(_archive(entry, f"{file}: download[{i}]") for i, entry in enumerate(described))
    urls = [archive.source.url for archive in archives]
    twice = next((url for url in urls if urls.count(url) > 1), None)
    if twice:
        raise DataError(f"{file}: download names {twice} twice; leave one out")
    return archives


def _archive(entry: Any, where: str) -> Archive:
    if not isinstance(entry, dict) or not set(entry) <= set(_KEYS):
        raise DataError(f"{where} is {entry!r}, expected a mapping of {', '.join(_KEYS)}")
    url = entry.get("url")
    if not isinstance(url, str) or not _is_address(url):
        raise DataError(f"{where}: url is {url!r}, expected an http(s) address")
    digest = entry.get("sha256") or ""
    if not isinstance(digest, str) or not re.fullmatch(r"([0-9a-fA-F]{64})?", digest):
        raise DataError(f"{where}: sha256 is {digest!r}, expected 64 hexadecimal digits in quotation marks, or nothing")
    for key in ("size", "unpacked"):
        value = entry.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise DataError(f"{where}: {key} is {value!r}, expected a whole number of bytes")
    splits = entry.get("voc") or {}
    if not isinstance(splits, dict):
        raise DataError(
            f"{where}: voc is {splits!r}, expected a mapping of folders to VOC lists, such as {{train: train}}"
        )
    origin, into = entry.get("from", "."), entry.get("into", ".")
    inside = [("from", origin), ("into", into), *(("voc", part) for pair in splits.items() for part in pair)]
    for key, folder in inside:
        if not isinstance(folder, str) or PurePosixPath(folder).is_absolute() or ".." in PurePosixPath(folder).parts:
            raise DataError(f"{where}: {key} is {folder!r}, expected a relative path without ..")
    source = Source(url, digest.lower(), entry.get("size"))
    return Archive(source, entry.get("unpacked"), origin, into, tuple(splits.items()))


def _is_address(text: str) -> bool:
    parts = urlsplit(text) if not re.search(r"\s", text) else None
    return parts is not None and parts.scheme in ("http", "https") and bool(parts.hostname)
