"""Files over HTTP: resumed where they broke off, tried again, verified before they bear their name, and unpacked."""

from __future__ import annotations

import hashlib
import http.client
import lzma
import os
import re
import shutil
import ssl
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from .errors import DataError

TIMEOUT_S = 30.0
ATTEMPTS = 6
"""How many attempts in a row may bring no new byte."""
PAUSE_S = 1.0
"""Before the second attempt; doubled for each further one."""
_TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
_DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
)


def fetch(url: str, target: Path, sha256: str = "", size: int | None = None) -> str:
    """Download ``url`` to ``target`` and return its SHA-256; a file that is there already is verified and kept.

    Until the digest is right the bytes lie in ``target.part``, with the server's mark of their version in ``target.version``.
    An interruption of any kind leaves these two; the next call asks for the missing bytes alone (HTTP's Range with
    If-Range, RFC 9110), and starts afresh where the server knows no ranges or holds another file by now.

    Args:
        url: an http(s) address.
        target: where the file goes.
        sha256: 64 lower-case hexadecimal digits, where known.
        size: in bytes, where known.

    Raises:
        DataError: the address answers otherwise, or digest or size are wrong.
        OSError: the file cannot be written; what came so far is kept.
    """
    if target.is_file() and sha256 in ("", digest := sha256_of(target)):
        return digest
    part, version_file = (target.with_name(f"{target.name}.{suffix}") for suffix in ("part", "version"))
    target.parent.mkdir(parents=True, exist_ok=True)
    failures, most = 0, 0
    while True:
        try:
            _connect(url, part, version_file, sha256, size)
            break
        except _BROKEN as error:
            code = error.code if isinstance(error, urllib.error.HTTPError) else None
            cause = getattr(error, "reason", error)
            reason = (
                f"the server answers {code} ({cause})" if code else f"no connection ({cause or type(cause).__name__})"
            )
            is_final = isinstance(cause, ssl.SSLCertVerificationError) or "unknown url type" in str(cause)
            if is_final or code not in (None, *_TRY_AGAIN):
                raise DataError(f"{url}: {reason}; correct the address in the description") from error
            failures = 1 if _length(part) > most else failures + 1
            most = max(most, _length(part))
            if failures >= ATTEMPTS:
                kept = (
                    f"; {readable(_length(part))} are kept: run again to go on"
                    if _length(part)
                    else "; run again later"
                )
                raise DataError(f"{url}: {reason}, {failures} times in a row{kept}") from error
        time.sleep(min(PAUSE_S * 2 ** (failures - 1), 30.0))
    digest = sha256_of(part)
    version_file.unlink(missing_ok=True)
    if sha256 not in ("", digest):
        part.unlink()
        raise DataError(
            f"{url}: expected SHA-256 {sha256}, found {digest}; what came is discarded and nothing else is touched; try "
            "again, or correct the description if the publisher replaced the file"
        )
    os.replace(part, target)
    return digest


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_space(folder: Path, needed: int, what: str) -> None:
    """DataError when the disk of ``folder`` has fewer than ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder}: {what} needs {readable(needed)}, the disk has {readable(free)} free; free some or choose another "
            "--data-root"
        )


def readable(count: int) -> str:
    """Bytes for people: '19.34 GB'."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} bytes"


def _length(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _connect(url: str, part: Path, version_file: Path, sha256: str, size: int | None) -> None:
    """One request; returns when the file is whole."""
    known = version_file.read_text(encoding="utf-8") if version_file.is_file() else ""
    start = _length(part) if known or sha256 else 0  # else nobody could tell whether the bytes belong to the same file
    headers = {"User-Agent": "slim-data/1", "Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={start}-"} if start else {}
    headers |= {"If-Range": known} if start and known else {}
    changed = ConnectionError("the file changed while it was fetched")
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE or not start:
            raise
        if error.headers.get("Content-Range") == f"bytes */{start}":
            return
        part.unlink()
        raise changed from error
    with response:
        if url.startswith("https:") and not response.url.startswith("https:"):
            raise DataError(f"{url}: leads to {response.url}, which is not encrypted; correct the address")
        etag, length = response.headers.get("ETag", ""), response.headers.get("Content-Length", "")
        version = (etag if not etag.startswith("W/") else "") or response.headers.get("Last-Modified", "")
        total = int(length) + start if length.isdigit() else size
        if response.status == http.client.PARTIAL_CONTENT:
            is_next = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            if not is_next or (version and known not in ("", version)):
                part.unlink()
                raise changed
        else:
            start, total = 0, int(length) if length.isdigit() else size
        if size not in (None, total):
            raise DataError(
                f"{url}: holds {total} bytes, expected {size}; the publisher replaced the file: correct the description"
            )
        if not start:
            part.unlink(missing_ok=True)
            version_file.write_text(version, encoding="utf-8")
        check_space(part.parent, (total or start) - start, part.name)
        bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem)
        # Without a buffer: whatever ends the process, the bytes are there to go on from.
        with part.open("ab", buffering=0) as file, bar as progress:
            while chunk := response.read(1 << 18):
                rest = memoryview(chunk)
                while rest:
                    rest = rest[file.write(rest) :]
                progress.update(len(chunk))
    if total is not None and (received := _length(part)) != total:
        if received > total:
            part.unlink()
        raise ConnectionError(f"the connection ended at byte {received} of {total}")


def unpack(archive: Path, target: Path) -> int:
    """Unpack a zip or tar (plain, gz, bz2, xz), told by its content, into the new folder ``target``.

    Names that lead outside of the folder are refused, as are links out of it and devices (tarfile's filter ``data``). What
    macOS packs by the way is removed again.

    Returns:
        The number of files.

    Raises:
        DataError: the archive is of no known kind, damaged or refused; nothing of it is kept then.
    """
    target.mkdir(parents=True)
    whole = False
    try:
        if tarfile.is_tarfile(archive):  # first, since any file that ends in a zip passes for one
            with tarfile.open(archive) as tar:
                tar.extractall(target, filter=_checked_member)
        elif zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                for info in opened.infolist():
                    _check_name(info.orig_filename)
                opened.extractall(target)
        else:
            with archive.open("rb") as file:
                start = file.read(40)
            raise DataError(f"{archive}: is neither a zip nor a tar; it starts with {start!r}: correct the address")
        for junk in [*target.rglob("__MACOSX"), *target.rglob(".DS_Store")]:
            shutil.rmtree(junk) if junk.is_dir() else junk.unlink()
        whole = True
        return sum(path.is_file() for path in target.rglob("*"))
    except tarfile.FilterError as error:
        raise DataError(f"{archive}: {error}; nothing was unpacked: do not use this archive") from error
    except _DAMAGED as error:
        if isinstance(error, DataError):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{archive}: cannot be unpacked ({reason}); nothing of it is kept; free some space, or download it again"
        ) from error
    finally:
        if not whole:
            shutil.rmtree(target, ignore_errors=True)


def _checked_member(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
    _check_name(member.name)
    return tarfile.data_filter(member, path)


def _check_name(name: str) -> None:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or re.search(r"[\\\0]|^[A-Za-z]:", name):
        raise tarfile.FilterError(f"the member {name[:200]!r} is a path outside of the folder")
