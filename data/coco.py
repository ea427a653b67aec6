"""COCO annotation files: one JSON with the images, boxes and categories of a split.

https://cocodataset.org/#format-data: ``bbox`` is [x, y, width, height] in pixels from the upper left corner.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .annotations import Annotations, ClassRangeError, Collector, Entry, row_from_pixels, wrong_size
from .errors import DataError
from .labels import regular

logger = logging.getLogger(__name__)

_LISTS = ("images", "annotations", "categories")


def read_coco(path: Path) -> dict[str, Any]:
    """The file's content; DataError unless it has COCO's lists of images, annotations and categories."""
    try:
        content: dict[str, Any] = json.loads(regular(path, math.inf).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"cannot read the annotations {path}: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); export the annotations again") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); export the annotations again") from error
    for key in _LISTS:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{path}: no list {key!r}; expected a COCO annotation file with {', '.join(_LISTS)}")
        for number, item in enumerate(content[key]):
            if not isinstance(item, dict) or (key != "annotations" and "id" not in item):
                raise DataError(f"{path}: {key}[{number}] is {str(item)[:60]!r}, expected a mapping with an id")
    return content


def coco_categories(path: Path, content: Mapping[str, Any] | None = None) -> dict[Any, str]:
    """{category id: name}, without ids that no annotation has where another one has their name."""
    content = read_coco(path) if content is None else content
    found: dict[Any, str] = {}
    for category in content["categories"]:
        if not isinstance(category.get("name"), str) or not isinstance(category["id"], int):
            raise DataError(f"{path}: category {str(category)[:60]}, expected an id, a whole number, and a name")
        if found.setdefault(category["id"], category["name"]) != category["name"]:
            raise DataError(
                f"{path}: category id {category['id']} is both {found[category['id']]!r} and {category['name']!r}"
            )
    used = {key for annotation in content["annotations"] if isinstance(key := annotation.get("category_id"), int)}
    by_name: dict[str, int] = {}
    for key, name in found.items():
        other = by_name.get(name)
        if other in used and key in used:
            raise DataError(
                f"{path}: category ids {other} and {key} are both named {name!r}; give each class a name of its own"
            )
        if other is None or key in used:
            by_name[name] = key
    return {key: name for key, name in found.items() if by_name[name] == key}


def coco_entries(path: Path, names: Sequence[str], folder: Path | None, base: Path) -> tuple[list[Entry], list[str]]:
    """The images of an annotation file, sorted by path, and what is wrong with the file as a whole.

    Categories are matched with ``names`` by name, whatever their ids. ``folder`` holds the images; None: it is looked
    for where such files usually have it (``image_folder``).
    """
    content = read_coco(path)
    found = _images(path, content)
    categories = coco_categories(path, content)
    folder = folder or image_folder(path, [str(image["file_name"]) for image in found.values()], base)
    objects, problems = _objects(path, content, found)
    ids = {name: key for key, name in categories.items()}
    entries = [
        Entry(
            folder / image["file_name"],
            functools.partial(_read, path, image, objects[image_id], categories, names),
            path,
            image_id,
            ids,
        )
        for image_id, image in found.items()
    ]
    return sorted(entries, key=lambda entry: entry.image), problems


def image_folder(path: Path, file_names: Sequence[str], base: Path) -> Path:
    """The folder of an annotation file's images: the first usual place that holds one of them; DataError if none does.

    For ``D/annotations/instances_val2017.json`` these are ``images/val2017``, ``val2017/images``, ``val2017``, ``images``
    and the folder itself, each in ``D``, in the file's own folder and in ``base``.
    """
    names = dict.fromkeys((path.stem.removeprefix("instances_"), path.stem.rpartition("_")[2], path.stem))
    folders = [form.format(name) for name in names if name for form in ("images/{}", "{}/images", "{}")]
    roots = dict.fromkeys((path.parent.parent, path.parent, base))
    places = [root / folder for root in roots for folder in (*folders, "images", "")]
    # An image or two may be missing; a folder without any of the first ones is another split's.
    for place in places:
        if any((place / name).is_file() for name in file_names[:20]):
            return place
    looked = ", ".join(str(place) for place in places[:4])
    raise DataError(
        f"{path}: its images ({', '.join(file_names[:2])}, ...) are not found; looked in {looked} and {len(places) - 4} more "
        "folders; say where they are by the key images: of the data.yaml"
    )


def _images(path: Path, content: Mapping[str, Any]) -> dict[Any, dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    by_name: dict[str, Any] = {}
    for image in content["images"]:
        image_id, name = image["id"], image.get("file_name")
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}: image id {image_id}: file_name is {name!r}, expected the image's file")
        if not isinstance(image_id, (int, str)) or image_id in found:
            raise DataError(
                f"{path}: image id {image_id!r} is no number or given twice; each image needs one of its own"
            )
        if name in by_name:
            raise DataError(
                f"{path}: image ids {by_name[name]} and {image_id} are both {name}; give each image one entry"
            )
        found[image_id] = image
        by_name[name] = image_id
    if not found:
        raise DataError(f"{path}: no image; its list 'images' is empty")
    return found


def _objects(
    path: Path, content: Mapping[str, Any], images: Mapping[Any, Any]
) -> tuple[dict[Any, list[tuple[int, dict[str, Any]]]], list[str]]:
    """The annotations of each image with their places in the list, and what is said of those that belong to none."""
    found: dict[Any, list[tuple[int, dict[str, Any]]]] = {image_id: [] for image_id in images}
    problems: list[str] = []
    if not content["annotations"]:
        logger.warning("%s: no annotation at all; its %d images count as background", path, len(images))
    for number, annotation in enumerate(content["annotations"]):
        image_id = annotation.get("image_id")
        where = f"{path}: annotation {annotation.get('id', f'number {number}')}"
        if not isinstance(image_id, (int, str)) or image_id not in found:
            problems.append(f"{where}: image id {image_id!r} is not among its images; the annotation was left out")
        else:
            found[image_id].append((number, annotation))
    return found, problems


def _read(
    path: Path,
    image: Mapping[str, Any],
    objects: Sequence[tuple[int, Mapping[str, Any]]],
    categories: Mapping[Any, str],
    names: Sequence[str],
    size_hw: tuple[int, int],
) -> Annotations:
    wrong = wrong_size(f"{path}: {image['file_name']}", (image.get("height"), image.get("width")), size_hw)
    if wrong:
        return wrong
    found = Collector()
    for number, annotation in objects:
        with found.reading(f"{path}: annotation {annotation.get('id', f'number {number}')}", "annotation"):
            key, box = annotation.get("category_id"), annotation.get("bbox")
            category = categories.get(key) if isinstance(key, int) else None
            if category is None:
                raise ClassRangeError(f"category id {key!r} is not among its categories")
            if category not in names:
                raise ClassRangeError(f"category {category!r} is not among the names of the data.yaml")
            if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
                raise ValueError(f"bbox is {box!r}, expected [x, y, width, height] in pixels")
            x, y, w, h = (float(value) for value in box)
            row = row_from_pixels(names.index(category), (x, y, x + w, y + h), size_hw)
            found.add(row, bool(annotation.get("iscrowd")))
    return found.annotations()
