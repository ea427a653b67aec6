"""Data sets fetched as their yaml's ``download`` key describes: ``python -m data.download data/coco128.yaml``."""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from .archives import unpack
from .config import data_folder, described_entries, is_there, read_description
from .errors import DataError
from .transfer import check_space, fetch

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
    check_space(work, needed - sum(f.stat().st_size for f in work.iterdir() if f.is_file()), "the download")
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
