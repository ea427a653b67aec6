"""Data sets fetched as their yaml's ``download`` key describes: ``python -m data.download data/coco128.yaml``."""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from filelock import FileLock
from tqdm import tqdm

from .config import data_folder, described_entries, is_there, read_description
from .errors import DataError

TIMEOUT_S = 30.0
ATTEMPTS = 6
"""How many attempts in a row may bring no new byte."""
MAX_LINKS = 1000
"""Of a tar; pictures are files."""
PAUSE_S = 1.0
"""Before the second attempt; doubled for each further one."""

_DEFAULTS: dict[str, Any] = {"url": None, "sha256": "", "size": 0, "from": ".", "into": ".", "voc": {}}


@dataclass(frozen=True)
class Archive:
    """An entry of ``download``: a zip or tar, and where in the data set's folder its content goes."""

    url: str
    sha256: str = ""
    size: int = 0
    """In bytes, where known."""
    origin: str | None = "."
    """The folder of the archive that is wanted; None: the outermost in which the splits' entries are found."""
    into: str = "."
    voc: tuple[tuple[str, str], ...] = ()
    """(split, list) pairs: ``origin`` is in VOC's layout; what ImageSets/Main/LIST.txt names goes to images/SPLIT and
    Annotations/SPLIT, the rest is left out."""

    @property
    def file_name(self) -> str:
        """The archive's name on our disk; two addresses never share one."""
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", unquote(urlsplit(self.url).path.rpartition("/")[2])).lstrip(".")
        return f"{hashlib.sha256(self.url.encode()).hexdigest()[:8]}-{plain}"


def download_data(file: str | Path, data_root: str | Path | None = None, say: Callable[[str], None] = print) -> Path:
    """Download and unpack what a data set's yaml describes, unless it is there already.

    The yaml's ``download`` is an address (as in YOLOv5's files: a zip with the data set's folder inside) or a list of
    archives, each with ``url`` and, where known, ``sha256`` and ``size`` in bytes; ``from`` (the archive's folder that is
    wanted), ``into`` (a folder of the data set) and ``voc`` say where things go (see ``Archive``). A digest that is not given
    is shown and pinned in ``FOLDER.download.json``, against which the next run checks. Nothing that is there is overwritten,
    and no script is ever run. An interrupted run goes on where it stopped; of several processes one downloads and the others
    wait.

    Args:
        file: the yaml.
        data_root: the folder of data sets, see ``find_root``.
        say: gets each line of progress.

    Returns:
        The data set's folder.

    Raises:
        DataError: for everything that goes wrong.
    """
    file = Path(file)
    content = read_description(file)
    archives = _described_archives(content, file)
    folder = data_folder(content, file, data_root)
    if folder.is_symlink():
        folder = folder.resolve()  # what is moved must lie on one disk
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.download.lock")):
            _download(content, file, archives, folder, data_root, say)
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: {error.strerror or error}; what came so far is kept: free some space and run again, or "
            "choose another --data-root"
        ) from error
    return folder


def download_missing(file: str | Path, data_root: str | Path | None = None) -> None:
    """As ``download_data``; nothing to do is also a set that is there whose yaml has no address, such as one's own."""
    content = read_description(Path(file))
    described = content.get("download")
    if isinstance(described, list) or _is_address(described) or not is_there(content, Path(file), data_root):
        download_data(file, data_root)


def _described_archives(content: Mapping[str, Any], file: Path) -> list[Archive]:
    """What ``download`` describes; DataError naming the key that cannot be followed. A script is refused."""
    described = content.get("download")
    if not described:
        raise DataError(
            f"{file}: has no download key, so --download has nowhere to fetch from; put the data there by hand"
        )
    if isinstance(described, str) and _is_address(described.strip()):
        return [Archive(described.strip(), origin=None)]
    if not isinstance(described, list):
        found = repr(described)
        if isinstance(described, str):
            found = f"a script ({described.strip().splitlines()[0][:60]!r}), and scripts are never run"
        raise DataError(f"{file}: download is {found}; expected an http(s) address or a list of archives")
    archives = [_described(entry, f"{file}: download[{i}]") for i, entry in enumerate(described)]
    urls = [archive.url for archive in archives]
    if len(set(urls)) < len(urls):
        raise DataError(f"{file}: download names {max(urls, key=urls.count)} twice; leave one out")
    return archives


def _described(entry: Any, where: str) -> Archive:
    if not isinstance(entry, dict) or not set(entry) <= set(_DEFAULTS):
        raise DataError(f"{where} is {entry!r}, expected a mapping of {', '.join(_DEFAULTS)}")
    given = _DEFAULTS | entry
    lists = given["voc"].items() if isinstance(given["voc"], dict) else ()
    paths = [("from", given["from"]), ("into", given["into"]), *(("voc", part) for pair in lists for part in pair)]
    checks = [
        ("url", given["url"], _is_address(given["url"]), "an http(s) address"),
        ("sha256", given["sha256"], _is_digest(given["sha256"]), "64 hexadecimal digits in quotes"),
        ("size", given["size"], type(given["size"]) is int, "a whole number of bytes"),
        ("voc", given["voc"], isinstance(given["voc"], dict), "a mapping of folders to VOC lists"),
        *((key, path, _is_inside(path), "a relative path without ..") for key, path in paths),
    ]
    for key, value, is_right, expected in checks:
        if not is_right:
            raise DataError(f"{where}: {key} is {value!r}, expected {expected}")
    url, sha256, size, origin, into, _ = given.values()
    return Archive(url, sha256.lower(), size, origin, into, tuple(lists))


def _is_inside(path: Any) -> bool:
    return isinstance(path, str) and not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts


def _is_digest(text: Any) -> bool:
    return isinstance(text, str) and re.fullmatch("([0-9a-fA-F]{64})?", text) is not None


def _is_address(text: Any) -> bool:
    return isinstance(text, str) and re.fullmatch(r"https?://[^\s/]\S*", text) is not None


def _download(
    content: Mapping[str, Any],
    file: Path,
    archives: Sequence[Archive],
    folder: Path,
    data_root: str | Path | None,
    say: Callable[[str], None],
) -> None:
    record_path = folder.with_name(f"{folder.name}.download.json")
    record = _read_record(record_path)
    missing = [archive for archive in archives if not _is_unpacked(archive, record, folder)]
    if not missing or (not record and is_there(content, file, data_root)):
        say(f"{file}: the data set is there already; nothing was downloaded")
        return
    work = folder.with_name(f"{folder.name}.download")
    work.mkdir(exist_ok=True)
    needed = 2 * sum(archive.size for archive in missing)  # pictures are packed as they are
    _check_space(work, needed - sum(f.stat().st_size for f in work.iterdir() if f.is_file()), "the download")
    for archive in missing:
        pinned = record.get(archive.url, {}).get("sha256", "")
        _write_record(record_path, record | {archive.url: {"sha256": pinned, "made": []}})
        try:
            digest = fetch(archive.url, work / archive.file_name, archive.sha256 or pinned, archive.size or None)
        except DataError as error:
            is_pinned = pinned and not archive.sha256 and "SHA-256" in str(error)
            raise DataError(f"{error} ({record_path} pins the digest)" if is_pinned else str(error)) from error
        if not (archive.sha256 or pinned):
            say(f"{archive.url}: no digest is published; pinned in {record_path}: sha256 {digest}")
        count, made = _place(archive, work, folder, described_entries(content, file))
        record[archive.url] = {"sha256": digest, "made": made}
        _write_record(record_path, record)
        (work / archive.file_name).unlink()
        say(f"{archive.url}: {count} files in {folder / archive.into}")
    shutil.rmtree(work)


def _place(archive: Archive, work: Path, folder: Path, entries: Sequence[str]) -> tuple[int, list[str]]:
    """Unpack beside the data set and move it in, or nothing of it; the number of files and the paths that are new."""
    temporary = work / "unpacking"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        unpack(work / archive.file_name, temporary)
        inner, target = _inner(archive, temporary, entries), folder / archive.into
        if archive.voc:
            inner = _voc_splits(archive, inner, temporary / "splits")
        files = sorted(path.relative_to(inner) for path in inner.rglob("*") if not path.is_dir())
        for path in files:
            if os.path.lexists(target / path) and not filecmp.cmp(inner / path, target / path, shallow=False):
                raise DataError(
                    f"{target / path}: is there already and differs from what {archive.url} holds; move it away"
                )
        _move(files, inner, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    tops = dict.fromkeys(PurePosixPath(archive.into, *path.parts[: 2 if archive.voc else 1]) for path in files)
    return len(files), [str(path) for path in tops]


def _move(files: Sequence[Path], source: Path, target: Path) -> None:
    for path in files:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / path, target / path)


def _inner(archive: Archive, temporary: Path, entries: Sequence[str]) -> Path:
    """The folder whose content is wanted."""
    if archive.origin is not None:
        expected, places = archive.origin, [temporary / archive.origin]
        found = [place for place in places if place.is_dir()]
    else:
        expected, places = ", ".join(entries), [temporary]
        while len(children := list(places[-1].iterdir())) == 1 and children[0].is_dir():
            places.append(children[0])
        found = [place for place in places if any((place / entry).exists() for entry in entries)]
    if not found:
        there = ", ".join(sorted(child.name for child in temporary.iterdir())[:5]) or "nothing"
        raise DataError(f"{archive.url}: expected {expected}, found {there} in the archive")
    return found[0]


def _voc_splits(archive: Archive, devkit: Path, arranged: Path) -> Path:
    """Images and XML files moved from VOC's layout into a folder for each split."""
    for split, listed in archive.voc:
        source = devkit / "ImageSets" / "Main" / f"{listed}.txt"
        try:
            names = source.read_text(encoding="utf-8").split()
            for kind, origin, suffix in (("images", "JPEGImages", ".jpg"), ("Annotations", "Annotations", ".xml")):
                (arranged / kind / split).mkdir(parents=True)
                for name in names:
                    os.replace(devkit / origin / f"{name}{suffix}", arranged / kind / split / f"{name}{suffix}")
        except (OSError, ValueError) as error:
            place = Path(getattr(error, "filename", None) or source).relative_to(devkit)
            raise DataError(f"{archive.url}: {place} is missing or damaged in the archive") from error
    return arranged


def _read_record(path: Path) -> dict[str, dict[str, Any]]:
    """Which archives are in the data set: {url: its digest and the paths that it made}."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["archives"])
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is damaged; remove it to download again") from error


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps({"archives": record}, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _is_unpacked(archive: Archive, record: Mapping[str, Any], folder: Path) -> bool:
    """Whether an earlier run unpacked the archive, with the digest described, and nothing was removed since."""
    known = record.get(archive.url, {})
    is_right = archive.sha256 in ("", known.get("sha256"))
    return is_right and bool(known.get("made")) and all((folder / path).exists() for path in known["made"])


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


def _check_space(folder: Path, needed: int, what: str) -> None:
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
        _check_space(part.parent, (total or start) - start, part.name)
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m data.download", description=__doc__)
    parser.add_argument("data", nargs="+", help="data set descriptions (yaml files with a download key)")
    parser.add_argument("--data-root", help="folder of data sets; else $SLIM_DATA_ROOT, else ./datasets")
    arguments = parser.parse_args(argv)
    try:
        for file in arguments.data:
            print(download_data(file, arguments.data_root))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what came so far is kept: run again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
