"""The ids by which COCO's own tools know the images and classes of a data set."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import DataConfig, read_description
from .errors import DataError

_COCO_UNUSED = frozenset((12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
"""Of COCO's category ids 1 to 90 those that stand for nothing since 2014."""


@dataclass(frozen=True)
class ResultIds:
    """For each image and each class of a data set, by its index, the id in COCO's results."""

    images: tuple[int | str, ...]
    categories: tuple[int, ...]

    def results(self, detections: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The same detections, of which image_id and category_id are indices, with these ids."""
        return [
            {**found, "image_id": self.images[found["image_id"]], "category_id": self.categories[found["category_id"]]}
            for found in detections
        ]

    def indices(self, results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The way back from ``results``; an id that is none of these stays, as older files have indices."""
        images, classes = ({key: i for i, key in enumerate(ids)} for ids in (self.images, self.categories))
        return [
            {
                **found,
                "image_id": images.get(found["image_id"], found["image_id"]),
                "category_id": classes.get(found["category_id"], found["category_id"]),
            }
            for found in results
        ]


def result_ids(config: DataConfig, split: str, files: Sequence[Path]) -> ResultIds:
    """Ids of the images ``files`` of a split and of the classes, as its annotation file or YOLOv5 has them.

    A COCO file's own ids; else an image's is the number that its stem is, or the stem, and a class's is its index. COCO's own
    images, which are known by their stems of 12 digits, have COCO's category ids, 1 to 90, for classes that are COCO's by name.
    A class without an id, such as all classes as one, gets one that is free.

    Raises:
        DataError: two images have one id, or annotation files give two ids to one class.
    """
    entries = {entry.image: entry for entry in config.entries(split)[0]}
    by_id: dict[int | str, Path] = {}
    known: dict[str, int] = {}
    for file in files:
        given, stem = entries[file].image_id, file.stem
        image_id = given if given is not None else int(stem) if stem.isdecimal() else stem
        if by_id.setdefault(image_id, file) != file:
            raise DataError(
                f"--save-json: {by_id[image_id]} and {file} both have the id {image_id}; evaluate the parts of the split one "
                "by one, or rename the images"
            )
        for name, key in entries[file].category_ids.items():
            if known.setdefault(name, key) != key:
                raise DataError(
                    f"--save-json: the class {name!r} has the category ids {known[name]} and {key} in the files of the split; "
                    "evaluate them one by one"
                )
    if not known and all(len(file.stem) == 12 and file.stem.isdecimal() for file in files):
        known = _coco_categories()
    return ResultIds(tuple(by_id), _category_ids(config, known))


def _category_ids(config: DataConfig, known: Mapping[str, int]) -> tuple[int, ...]:
    before = config.label_names or config.names
    class_map = config.class_map or range(len(before))
    origins = [
        [name for name, place in zip(before, class_map, strict=True) if place == i] for i in range(len(config.names))
    ]
    if not any(name in known for name in before):
        return tuple(range(len(config.names)))
    free = itertools.count(max(known.values()) + 1)
    return tuple(known[names[0]] if len(names) == 1 and names[0] in known else next(free) for names in origins)


def _coco_categories() -> dict[str, int]:
    names = read_description(Path(__file__).with_name("coco.yaml"))["names"]
    return dict(zip(names.values(), (key for key in range(1, 91) if key not in _COCO_UNUSED), strict=True))
