"""A file from an http(s) address: what an interruption leaves is gone on from, and nothing is trusted before its digest."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from .errors import DataError

TIMEOUT_S = 30.0
ATTEMPTS = 6
"""How many attempts in a row may bring no new byte."""
PAUSE_S = 1.0
"""Before the second attempt; doubled for each further one."""


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
    if target.is_file() and sha256 in ("", digest := _sha256(target)):
        return digest
    part, version_file = (target.with_name(f"{target.name}.{suffix}") for suffix in ("part", "version"))
    failures, most = 0, 0
    while True:
        try:
            _request(url, part, version_file, sha256, size)
            break
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            code, cause = getattr(error, "code", None), getattr(error, "reason", error)
            reason = f"the server answers {code}" if code else "no connection"
            if code and code < 500 and code not in (408, 429):
                raise DataError(f"{url}: {reason} ({cause}); correct the address in the description") from error
            failures = 1 if _length(part) > most else failures + 1
            most = max(most, _length(part))
            if failures >= ATTEMPTS:
                kept = f"; {tqdm.format_sizeof(_length(part), 'B')} are kept" if _length(part) else ""
                raise DataError(
                    f"{url}: {reason} ({cause or type(cause).__name__}), {failures} times in a row{kept}; run again later"
                ) from error
        time.sleep(min(PAUSE_S * 2 ** (failures - 1), 30.0))
    digest = _sha256(part)
    version_file.unlink(missing_ok=True)
    if sha256 not in ("", digest):
        part.unlink()
        raise DataError(
            f"{url}: expected SHA-256 {sha256}, found {digest}; what came is discarded and nothing else is touched; try "
            "again, or correct the description if the publisher replaced the file"
        )
    os.replace(part, target)
    return digest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_space(folder: Path, needed: int, what: str) -> None:
    """DataError where the disk of ``folder`` has fewer free bytes than ``needed``."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        sizes = f"needs {tqdm.format_sizeof(needed, 'B')}, the disk has {tqdm.format_sizeof(free, 'B')} free"
        raise DataError(f"{folder}: {what} {sizes}; free some or choose another --data-root")


def _length(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _request(url: str, part: Path, version_file: Path, sha256: str, size: int | None) -> None:
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
        part.unlink()
        raise changed from error
    with response:
        if url.startswith("https:") and not response.url.startswith("https:"):
            raise DataError(f"{url}: leads to {response.url}, which is not encrypted; correct the address")
        etag, length = response.headers.get("ETag", ""), response.headers.get("Content-Length", "")
        version = (etag if not etag.startswith("W/") else "") or response.headers.get("Last-Modified", "")
        if response.status != http.client.PARTIAL_CONTENT:
            start = 0
        elif version and known not in ("", version):
            part.unlink()
            raise changed
        total = int(length) + start if length.isdigit() else size
        if size not in (None, total):
            raise DataError(
                f"{url}: holds {total} bytes, expected {size}; the publisher replaced the file: correct the description"
            )
        check_space(part.parent, (total or start) - start, part.name)
        version_file.write_text(version if not start else known, encoding="utf-8")
        bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem)
        # Without a buffer: whatever ends the process, the bytes are there to go on from.
        most = start + shutil.disk_usage(part.parent).free // 2 if total is None else total
        with part.open("ab" if start else "wb", buffering=0) as file, bar as progress:
            while chunk := response.read(1 << 18):
                if file.tell() + len(chunk) > most:
                    limit = (
                        "half of what the disk has free" if total is None else "what it said or the description says"
                    )
                    raise DataError(f"{url}: sends more than {most:,} bytes, {limit}; correct the description")
                rest = memoryview(chunk)
                while rest:
                    rest = rest[file.write(rest) :]
                progress.update(len(chunk))
    if total is not None and (received := _length(part)) != total:
        raise ConnectionError(f"the connection ended at byte {received} of {total}")
