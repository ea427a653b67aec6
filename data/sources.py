"""The images of a split and where their annotations lie, whatever the format.

What a source is, its path tells:

- a ``.json`` is a COCO annotation file (``data/coco.py``);
- a ``.txt`` in ``ImageSets/Main`` is a VOC list: a name without suffix a line, its image in ``JPEGImages``, its XML in
  ``Annotations`` (a second column of -1, as in VOC's lists of one class, leaves the image out);
- any other ``.txt`` is a list of images, anything else an image or a folder of them. They are VOC if an XML is found for
  one of them (``labels.annotation_path``) and for none a YOLO label file (``labels.label_path``); else YOLO.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from .annotations import Entry
from .coco import coco_categories, coco_entries
from .errors import DataError
from .images import IMAGE_SUFFIXES
from .labels import annotation_path, label_path, read_labels, read_voc, regular, voc_names

logger = logging.getLogger(__name__)


def find_entries(
    sources: Sequence[Path],
    names: Sequence[str],
    base: Path,
    coco_images: Path | None = None,
    labels: str | None = None,
) -> tuple[list[Entry], list[str]]:
    """Images, each once, in the order of the sources, and what was left out of a source as a whole.

    ``base`` is what entries of list files may be relative to, ``coco_images`` the images' folder of COCO sources,
    ``labels`` the format (yolo or voc) of folders and lists where it shall not be looked for.
    """
    entries: dict[Path, Entry] = {}
    problems: list[str] = []
    for source in sources:
        if _is_coco(source):
            found, left_out = coco_entries(source, names, coco_images, base)
            problems += left_out
        else:
            images, labelled = _labelled(source, base, labels)
            found = [replace(_entry(image, names, labelled), sought=sought) for image, sought in images.items()]
            if labelled == "voc" and found and not any(entry.labels.is_file() for entry in found):
                logger.warning("%s: no annotation at all; its %d images count as background", source, len(found))
        for entry in found:
            entries.setdefault(entry.image, entry)
    return list(entries.values()), problems


def class_names(sources: Sequence[Path], base: Path, labels: str | None = None) -> tuple[str, ...]:
    """The classes that annotations name: COCO's categories in the order of their ids, then VOC's in alphabetical order.

    Empty for YOLO's, which are numbers. DataError where COCO files disagree.
    """
    categories: dict[int, str] = {}
    objects: set[str] = set()
    for source in dict.fromkeys(sources):
        if not source.exists():
            continue
        if _is_coco(source):
            for key, name in coco_categories(source).items():
                if categories.setdefault(key, name) != name:
                    raise DataError(
                        f"{source}: category id {key} is {name!r}, in another split {categories[key]!r}; "
                        "say by names in the data.yaml which classes there are"
                    )
        else:
            images, labelled = _labelled(source, base, labels)
            if labelled == "voc":
                objects.update(name for image in images for name in voc_names(annotation_path(image)))
    in_order = dict.fromkeys(name for _, name in sorted(categories.items()))
    return tuple(dict.fromkeys([*in_order, *sorted(objects)]))


def find_images(sources: Sequence[Path], base: Path) -> dict[Path, list[Path]]:
    """Images of folders (searched deeply, links too; sorted), lists and single files, each once, in the sources' order.

    With each that a list names and that is nowhere, the places where it was looked for.
    """
    return {image: sought for source in sources for image, sought in _images_of(source, base)}


def _is_coco(source: Path) -> bool:
    return source.suffix.lower() == ".json"


def _is_voc_list(source: Path) -> bool:
    return source.suffix.lower() == ".txt" and source.parts[-3:-1] == ("ImageSets", "Main")


def _labelled(source: Path, base: Path, labels: str | None) -> tuple[dict[Path, list[Path]], str]:
    """The images of a folder, list or file as ``find_images`` has them, and the format of their annotations."""
    if _is_voc_list(source):
        return {image: [] for image in _voc_images(source)}, "voc"
    images = find_images([source], base)
    if labels is None:
        text = any(label_path(image).is_file() for image in images)
        labels = "voc" if not text and any(annotation_path(image).is_file() for image in images) else "yolo"
    return images, labels


def _entry(image: Path, names: Sequence[str], labelled: str) -> Entry:
    if labelled == "voc":
        file = annotation_path(image)
        return Entry(image, functools.partial(read_voc, file, names), file)
    file = label_path(image)
    return Entry(image, lambda _: read_labels(file, len(names)), file)


def _voc_images(source: Path) -> Iterator[Path]:
    folder = source.parents[2] / "JPEGImages"
    suffixes = (".jpg", *sorted(IMAGE_SUFFIXES - {".jpg"}))
    for line in read_list(source):
        name, _, flag = line.rpartition(" ")
        listed, left_out = (name.strip(), flag == "-1") if flag in ("-1", "0", "1") and name else (line, False)
        if not left_out:
            places = [folder / f"{listed}{suffix}" for suffix in suffixes]
            yield next((place for place in places if place.is_file()), places[0])


def _images_of(source: Path, base: Path) -> Iterator[tuple[Path, list[Path]]]:
    if source.is_dir():
        found = sorted(p for p in _files_below(source) if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        yield from ((image, []) for image in found)
    elif source.suffix.lower() == ".txt":
        for line in read_list(source):
            # Beside the list or below the data set's folder, else, as darknet writes them, from the working folder.
            places = (
                [source.parent / line] if line.startswith("./") else [source.parent / line, base / line, Path(line)]
            )
            yield next(((place, []) for place in places if place.exists()), (places[:2][-1], places))
    else:
        yield source, []


def _files_below(folder: Path) -> Iterator[Path]:
    """Files at any depth, in folders that links lead to as well; of a folder that is reached twice the first way counts.

    Hidden ones, whose names begin with a dot, are left out: what notebooks and file managers put there is no data.
    """

    def refuse(error: OSError) -> NoReturn:
        raise DataError(f"{error.filename}: the folder cannot be read ({error.strerror}); make it readable") from error

    seen: set[str] = set()
    ways = [str(folder)]
    while ways:  # links last: they may lead into folders that have a name of their own
        for place, folders, files in os.walk(ways.pop(0), onerror=refuse):
            if (real := os.path.realpath(place)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            ways += [way for name in folders if os.path.islink(way := os.path.join(place, name))]
            yield from (Path(place, name) for name in files if not name.startswith("."))


def read_list(source: Path) -> list[str]:
    """The lines of a list file that are not empty."""
    try:
        lines = regular(source).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source}: the list cannot be read ({error}); expected a path a line") from error
    return [line.strip() for line in lines if line.strip()]
