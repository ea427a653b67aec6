"""Data sets fetched as their yaml's ``download`` key describes: ``python -m data.download data/coco128.yaml``."""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from .archives import unpack
from .config import data_folder, described_entries, is_there, read_description
from .described_archives import Archive, described_archives
from .errors import DataError
from .transfer import Patience, Source, check_space, fetch


def download_data(
    file: str | Path,
    data_root: str | Path | None = None,
    *,
    patience: Patience | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Fetch and unpack what the yaml ``file`` describes, unless it is there; the data set's folder.

    ``download`` is an address (as in YOLOv5's files: a zip with the data set's folder inside) or a list of archives, each
    with ``url`` and, where known, ``sha256``, ``size`` (bytes of the archive) and ``unpacked`` (bytes of its content, at
    most); ``from`` (the archive's folder that is wanted), ``into`` (a folder of the data set) and ``voc`` say where things go
    (``Archive``). A digest that is not given is shown and pinned in ``FOLDER.download.json``, by which the next run checks.
    Nothing that is there is overwritten. An interrupted run goes on where it stopped; of several processes one downloads
    and the others wait. DataError for everything that goes wrong, a script among it: none is ever run.
    """
    file = Path(file)
    content = read_description(file)
    archives = described_archives(content, file)
    folder = data_folder(content, file, data_root)
    if folder.is_symlink():
        folder = folder.resolve()  # what is moved must lie on one disk
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.download.lock")):
            _download(content, file, archives, folder, data_root, patience, say)
    except OSError as error:
        raise DataError(f"{error.filename or folder}: {error.strerror or error}; choose another --data-root") from error
    return folder


def _download(
    content: Mapping[str, Any],
    file: Path,
    archives: Sequence[Archive],
    folder: Path,
    data_root: str | Path | None,
    patience: Patience | None,
    say: Callable[[str], None],
) -> None:
    record = _Record(folder)
    missing = [archive for archive in archives if not record.holds(archive, folder)]
    if not missing or (not record.archives and is_there(content, file, data_root)):
        say(f"{file}: the data set is there already; nothing was downloaded")
        return
    work = folder.with_name(f"{folder.name}.download")
    work.mkdir(exist_ok=True)
    _check_total(missing, work)
    entries = described_entries(content, file)
    for archive in missing:
        source, pinned = record.known(archive.source)
        record.note(archive.source.url)
        try:
            digest = fetch(source, work / archive.file_name, patience)
        except DataError as error:
            raise DataError(
                f"{error} ({record.path} pins the digest)" if pinned and "SHA-256" in str(error) else str(error)
            ) from error
        if not source.sha256:
            say(f"{source.url}: no digest is published; pinned in {record.path}: sha256 {digest}")
        count, made = _place(archive, work, folder, entries)
        record.note(archive.source.url, digest, made)
        (work / archive.file_name).unlink()
        say(f"{source.url}: {count} files in {folder / archive.into}")
    shutil.rmtree(work)


def _check_total(archives: Sequence[Archive], work: Path) -> None:
    """Room for every archive whose size is known, and its content; what an earlier run left counts as there."""
    needed = 0
    for archive in archives:
        size = archive.source.size or 0
        files = (work / archive.file_name, work / f"{archive.file_name}.part")
        needed += size + (archive.unpacked or size) - sum(f.stat().st_size for f in files if f.is_file())
    check_space(work, needed, "the download")


def _place(archive: Archive, work: Path, folder: Path, entries: Sequence[str]) -> tuple[int, list[str]]:
    """Unpack beside the data set and move it in, or nothing of it; the number of files and the paths that are new."""
    temporary = work / "unpacking"
    shutil.rmtree(temporary, ignore_errors=True)
    downloaded = work / archive.file_name
    count = unpack(downloaded, temporary, archive.limit_bytes(downloaded))
    try:
        inner, target = _inner(archive, temporary, entries), folder / archive.into
        if archive.voc:
            inner = _voc_splits(archive, inner, temporary / "splits")
            count = sum(path.is_file() for path in inner.rglob("*"))
        conflict = _conflict(inner, target)
        if conflict:
            raise DataError(
                f"{conflict}: is there already and differs from what {archive.source.url} holds; move it away"
            )
        made = [child.relative_to(inner) for child in sorted(inner.glob("*/*" if archive.voc else "*"))]
        _move(inner, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return count, [str(PurePosixPath(archive.into) / path.as_posix()) for path in made]


def _inner(archive: Archive, temporary: Path, entries: Sequence[str]) -> Path:
    """The folder whose content is wanted."""
    inner, expected = temporary / (archive.origin or "."), archive.origin
    if archive.origin is None:
        expected = ", ".join(entries)
        while not any((inner / entry).exists() for entry in entries):
            children = list(inner.iterdir())
            if len(children) != 1 or not children[0].is_dir():
                break
            inner = children[0]
        else:
            return inner
    elif inner.is_dir():
        return inner
    found = ", ".join(sorted(child.name for child in temporary.iterdir())[:5])
    raise DataError(f"{archive.source.url}: expected {expected}, found {found or 'nothing'} in the archive")


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
            raise DataError(f"{archive.source.url}: {place} is missing or damaged in the archive") from error
    return arranged


def _conflict(source: Path, target: Path) -> Path | None:
    """The first file of the target that would be overwritten by another."""
    if not target.exists():
        return None
    if source.is_dir() and target.is_dir():
        found = (_conflict(child, target / child.name) for child in sorted(source.iterdir()))
        return next((conflict for conflict in found if conflict), None)
    same = source.is_file() and target.is_file() and filecmp.cmp(source, target, shallow=False)
    return None if same else target


def _move(source: Path, target: Path) -> None:
    """Into a target without conflicts; a folder that is new there takes one rename."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
    elif source.is_dir():
        for child in sorted(source.iterdir()):
            _move(child, target / child.name)


class _Record:
    """Beside the data set: which archives are in it, from where and with which digest."""

    def __init__(self, folder: Path) -> None:
        self.path = folder.with_name(f"{folder.name}.download.json")
        self.archives: dict[str, dict[str, Any]] = {}
        try:
            self.archives = dict(json.loads(self.path.read_text(encoding="utf-8"))["archives"])
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path}: is damaged; remove it to download again") from error

    def known(self, source: Source) -> tuple[Source, bool]:
        """The source with the digest that an earlier run pinned, where the description gives none."""
        pinned = self.archives.get(source.url, {}).get("sha256", "")
        if source.sha256 or not pinned:
            return source, False
        return Source(source.url, pinned, source.size), True

    def holds(self, archive: Archive, folder: Path) -> bool:
        """Whether the archive is in the data set: unpacked by an earlier run, with the digest described, and not removed."""
        known = self.archives.get(archive.source.url, {})
        right = not archive.source.sha256 or known.get("sha256") == archive.source.sha256
        made = known.get("made", [])
        return right and bool(made) and all((folder / path).exists() for path in made)

    def note(self, url: str, digest: str | None = None, made: Sequence[str] = ()) -> None:
        entry = self.archives.get(url, {})
        self.archives[url] = {"sha256": digest or entry.get("sha256", ""), "made": list(made)}
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        temporary.write_text(json.dumps({"archives": self.archives}, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
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
