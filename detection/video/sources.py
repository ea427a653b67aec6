"""What can be looked at: image and video files, folders, globs and lists of them, cameras and network streams."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from data.errors import DataError
from data.images import IMAGE_SUFFIXES
from data.sources import read_list

_KINDS = "3gp asf avi flv gif m2ts m4v mkv mov mp4 mpeg mpg mts ogv ts webm wmv y4m"
VIDEO_SUFFIXES = frozenset(f".{kind}" for kind in _KINDS.split())
_EXPECTED = "expected an image, a video, a folder, a glob or a .txt list of them, the number of a camera or an address such as rtsp://"


@dataclass(frozen=True)
class MediaSource:
    """An image or a video to look at."""

    where: str
    """A path, or the address of a stream."""
    kind: Literal["image", "video", "camera", "stream"]
    name: str
    """For what is written of it: the file's name without suffix, with a number where another source has it already."""

    @property
    def suffix(self) -> str:
        return Path(self.where.partition("?")[0] if "://" in self.where else self.where).suffix

    @property
    def is_image(self) -> bool:
        return self.kind == "image"


def find_sources(given: Sequence[str]) -> list[MediaSource]:
    """What the words of a command line name, in their order, a folder's and a glob's files sorted by name.

    A number or ``/dev/video...`` is a camera, what holds ``://`` a stream, or by its suffix an image; a ``.txt`` is a list of
    all these, one a line, with paths from the working folder or the list's own. DataError where a word names nothing.
    """
    found = dict.fromkeys(source for word in given for source in _named(word))
    if not found:
        raise DataError(f"--source: none given; {_EXPECTED}")
    if len(found) > 1:
        for source in found:
            if source.kind == "camera":
                raise DataError(
                    f"--source {source.where}: a camera does not end; give it alone, in a process of its own"
                )
    moving = {source.name for source in found if not source.is_image}
    # clip_1.jpg beside clip.mp4 has the name of that video's first frame.
    like_frames = (re.fullmatch(r"(.*)_\d+", source.name) for source in found)
    wanted = [
        f"{match[0]}-2" if match and match[1] in moving else s.name for s, match in zip(found, like_frames, strict=True)
    ]
    return [replace(source, name=name) for source, name in zip(found, distinct(wanted), strict=True)]


def distinct(names: Iterable[str]) -> list[str]:
    """The names, with a number where another one before is the same.

    >>> distinct(["a", "b", "a"])
    ['a', 'b', 'a-2']
    """
    given: dict[str, None] = {}
    for wanted in names:
        name, number = wanted, 2
        while name in given:
            name, number = f"{wanted}-{number}", number + 1
        given[name] = None
    return list(given)


def _named(word: str) -> list[MediaSource]:
    path = Path(word)
    if word.isdecimal() or word.startswith("/dev/video"):
        device = f"/dev/video{word}" if word.isdecimal() else word
        return [MediaSource(device, "camera", Path(device).name)]
    if "://" in word:
        last = Path(word.split("://", 1)[1].split("?", 1)[0].rstrip("/"))
        is_image = word.startswith("http") and last.suffix.lower() in IMAGE_SUFFIXES
        return [MediaSource(word, "image" if is_image else "stream", last.stem.replace(":", "-") or "stream")]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _is_known(file) and not file.name.startswith("."))
        if not files:
            raise DataError(f"{word}: no image and no video in this folder; folders below it are not looked at")
        return [_of_file(file) for file in files]
    if path.is_file():
        return _listed(path) if path.suffix.lower() == ".txt" else [_of_file(path)]
    if glob.has_magic(word):
        files = [file for file in map(Path, sorted(glob.glob(word, recursive=True))) if _is_known(file)]
        if not files:
            raise DataError(f"{word}: no image and no video matches")
        return [_of_file(file) for file in files]
    raise DataError(f"{word}: no such file or folder; {_EXPECTED}")


def _listed(file: Path) -> list[MediaSource]:
    found: list[MediaSource] = []
    for line in read_list(file):
        beside = file.parent / line
        word = str(beside) if beside.exists() and not Path(line).exists() else line
        if Path(word).suffix.lower() == ".txt":
            raise DataError(f"{file}: it lists {line}, another list; give both to --source")
        try:
            found += _named(word)
        except DataError as error:
            raise DataError(f"{file}: {error}") from error
    if not found:
        raise DataError(f"{file}: the list is empty; {_EXPECTED}")
    return found


def _is_known(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and path.is_file()


def _of_file(path: Path) -> MediaSource:
    return MediaSource(str(path), "image" if path.suffix.lower() in IMAGE_SUFFIXES else "video", path.stem)
