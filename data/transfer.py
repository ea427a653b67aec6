"""Files over HTTP: resumed where they broke off, tried again, and verified before they bear their name."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from .errors import DataError

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 18
_LONGEST_PAUSE_S = 30.0
_TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


@dataclass(frozen=True)
class Source:
    """A file in the network and what is known of it: digest ('' and None: not known) and bytes."""

    url: str
    sha256: str = ""
    size: int | None = None


@dataclass(frozen=True)
class Patience:
    """How long a server may be silent, and how many attempts in a row may bring no new byte."""

    timeout_s: float = 30.0
    attempts: int = 6
    pause_s: float = 1.0
    """Before the second attempt; doubled for each further one."""


def fetch(source: Source, target: Path, patience: Patience | None = None) -> str:
    """Bring ``source`` to ``target``; its SHA-256. A file that is there already is verified and kept.

    Until the digest is right the bytes lie in ``target.part``, with what is needed to go on later in ``target.part.json``.
    An interruption of any kind leaves these two; the next call asks for the missing bytes alone (HTTP's Range with
    If-Range, RFC 9110), and starts afresh where the server knows no ranges or holds another file by now. DataError for an
    address that answers otherwise, a wrong digest or size, and a full disk.
    """
    if target.is_file():
        digest = sha256_of(target)
        if digest == source.sha256 or not source.sha256:
            return digest
        target.unlink()
    partial = _Partial(target, source)
    for last in (False, True):
        resumed = partial.size > 0
        _receive(source, partial, patience or Patience())
        digest = sha256_of(partial.path)
        if not source.sha256 or digest == source.sha256:
            break
        partial.discard()
        if last or not resumed:
            raise DataError(
                f"{source.url}: expected SHA-256 {source.sha256}, found {digest}; what came is discarded and nothing else is "
                "touched; try again, or correct the description if the publisher replaced the file"
            )
        logger.warning("%s: the resumed file has a wrong digest and is fetched anew", source.url)
    os.replace(partial.path, target)
    partial.discard()
    return digest


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


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


class _Restart(Exception):
    """What is there belongs to another version of the file."""


class _Partial:
    """The bytes so far, and the server's marks of the version that they belong to."""

    def __init__(self, target: Path, source: Source) -> None:
        self.path = target.with_name(f"{target.name}.part")
        self._note_path = target.with_name(f"{target.name}.part.json")
        self.source = source
        self.note = self._read_note()

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    @property
    def total(self) -> int | None:
        return self.note.get("total")

    @property
    def validator(self) -> str:
        """For If-Range, which takes no weak ETag."""
        etag = self.note.get("etag") or ""
        return etag if etag and not etag.startswith("W/") else self.note.get("last_modified") or ""

    def start(self) -> int:
        """Where to go on: 0 unless the bytes can be told to belong to the same file."""
        known = self.note and (self.validator or self.source.sha256)
        return self.size if known and (self.total is None or self.size <= self.total) else 0

    def begin(self, note: dict[str, Any]) -> None:
        """Forget the bytes so far; note what the server says of the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.open("wb").close()
        temporary = self._note_path.with_name(f"{self._note_path.name}.tmp")
        temporary.write_text(json.dumps(note), encoding="utf-8")
        os.replace(temporary, self._note_path)
        self.note = note

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._note_path.unlink(missing_ok=True)
        self.note = {}

    def _read_note(self) -> dict[str, Any]:
        try:
            note = json.loads(self._note_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) and note.get("url") == self.source.url else {}


def _receive(source: Source, partial: _Partial, patience: Patience) -> None:
    """All bytes of ``source`` into ``partial``, over as many connections as it takes."""
    failures, most = 0, partial.start()
    while partial.total is None or partial.start() < partial.total:
        try:
            _connect(source, partial, patience.timeout_s)
            return
        except _Restart:
            partial.discard()
            error: BaseException = ConnectionError("the file changed while it was fetched")
        except _BROKEN as broken:
            error = broken
            if not _worth_another(broken):
                raise DataError(f"{source.url}: {_reason(broken)}; correct the address in the description") from broken
        failures = 1 if partial.size > most else failures + 1
        most = max(most, partial.size)
        if failures >= patience.attempts:
            kept = f"; {readable(partial.size)} are kept: run again to go on" if partial.size else "; run again later"
            raise DataError(f"{source.url}: {_reason(error)}, {failures} times in a row{kept}") from error
        time.sleep(min(patience.pause_s * 2 ** (failures - 1), _LONGEST_PAUSE_S))


def _connect(source: Source, partial: _Partial, timeout_s: float) -> None:
    """One request; returns when the file is whole."""
    start = partial.start()
    headers = {"User-Agent": "slim-data/1", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if partial.validator:
            headers["If-Range"] = partial.validator
    request = urllib.request.Request(source.url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            raise _Restart from error
        raise
    with response:
        if urlsplit(source.url).scheme == "https" and urlsplit(response.url).scheme != "https":
            raise DataError(f"{source.url}: leads to {response.url}, which is not encrypted; correct the address")
        note = _note_of(response, source.url, start)
        if start and response.status == http.client.PARTIAL_CONTENT:
            if any(value and partial.note.get(key) not in (None, value) for key, value in note.items()):
                raise _Restart
        else:
            start = 0
            if source.size is not None and note["total"] not in (None, source.size):
                raise DataError(
                    f"{source.url}: holds {note['total']} bytes, expected {source.size}; the publisher replaced the file: "
                    "correct the description"
                )
            with _guarded(partial):
                partial.begin(note)
        _copy(response, partial, start, note["total"] if note["total"] is not None else source.size)


def _note_of(response: Any, url: str, start: int) -> dict[str, Any]:
    """What tells one version of a file from another."""
    total = response.headers.get("Content-Length")
    if response.status == http.client.PARTIAL_CONTENT:
        ranged = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if not ranged or int(ranged[1]) != start:
            raise _Restart
        total = ranged[2]
    elif response.status != http.client.OK:
        raise DataError(f"{url}: answers with status {response.status}, expected a file; correct the address")
    return {
        "url": url,
        "etag": response.headers.get("ETag"),
        "last_modified": response.headers.get("Last-Modified"),
        "total": int(total) if total and total.isdigit() else None,
    }


def _copy(response: Any, partial: _Partial, start: int, total: int | None) -> None:
    if total is not None:
        check_space(partial.path.parent, total - start, partial.path.name)
    # Without a buffer: whatever ends the process, the bytes are there to go on from.
    with _guarded(partial):
        file = partial.path.open("ab", buffering=0)
    name = urlsplit(partial.source.url).path.rpartition("/")[2]
    with file, tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=name) as progress:
        while chunk := response.read(_CHUNK_BYTES):
            with _guarded(partial):
                rest = memoryview(chunk)
                while rest:
                    rest = rest[file.write(rest) :]
            progress.update(len(chunk))
        received = int(progress.n)
    if total is not None and received < total:
        raise ConnectionError(f"the connection ended at byte {received} of {total}")
    if total is not None and received > total:
        partial.discard()
        raise ConnectionError(f"{received} bytes came, expected {total}")


@contextmanager
def _guarded(partial: _Partial) -> Iterator[None]:
    """A full disk or a folder that may not be written to ends in one line; what came so far stays."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{partial.path}: cannot be written ({error.strerror}); what came so far is kept: free some space and run again"
        ) from error


def _worth_another(error: BaseException) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code in _TRY_AGAIN
    reason = getattr(error, "reason", error)
    return not isinstance(reason, ssl.SSLCertVerificationError) and "unknown url type" not in str(reason)


def _reason(error: BaseException) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} ({error.reason})"
    reason = getattr(error, "reason", error)
    return f"no connection ({reason or type(reason).__name__})"
