"""A data set's images and annotations as YOLO text, COCO JSON or Pascal VOC XML in a new folder, with its ``data.yaml``."""

from __future__ import annotations

import json
import os
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from .annotations import Annotations, Row, corners_px

MARK = "# Written by python -m data.convert"
"""The first line of a converted set's data.yaml: what --overwrite may replace."""


@dataclass(frozen=True)
class Labelled:
    """An image of a split on its way."""

    source: Path
    name: str
    """Its file name in the new set."""
    size_hw: tuple[int, int]
    annotations: Annotations

    @property
    def stem(self) -> str:
        return Path(self.name).stem


def _write_yolo(out: Path, splits: dict[str, list[Labelled]], names: Sequence[str], link: bool) -> None:
    for split, images in splits.items():
        _place(images, out / "images" / split, link)
        (out / "labels" / split).mkdir(parents=True)
        for one in images:
            lines = [
                f"{int(row[0])} {' '.join(_decimal(value, 8) for value in row[1:])}\n" for row in one.annotations.rows
            ]
            (out / "labels" / split / f"{one.stem}.txt").write_text("".join(lines), encoding="utf-8")
    _describe(out, names, {split: f"images/{split}" for split in splits})


def _write_coco(out: Path, splits: dict[str, list[Labelled]], names: Sequence[str], link: bool) -> None:
    (out / "annotations").mkdir()
    for split, images in splits.items():
        _place(images, out / "images" / split, link)
        content: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
        for image_id, one in enumerate(images, start=1):
            height, width = one.size_hw
            content["images"].append({"id": image_id, "file_name": one.name, "width": width, "height": height})
            for row, crowd in _objects(one):
                x1, y1, x2, y2 = corners_px(row, one.size_hw)
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]) + 1,
                        "image_id": image_id,
                        "category_id": int(row[0]) + 1,
                        "bbox": [_whole(round(value, 9)) for value in (x1, y1, x2 - x1, y2 - y1)],
                        "area": _whole(round((x2 - x1) * (y2 - y1), 9)),
                        "iscrowd": int(crowd),
                    }
                )
        content["categories"] = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
        (out / "annotations" / f"{split}.json").write_text(json.dumps({"info": {}, **content}), encoding="utf-8")
    _describe(out, names, {split: f"annotations/{split}.json" for split in splits})


def _write_voc(out: Path, splits: dict[str, list[Labelled]], names: Sequence[str], link: bool) -> None:
    (out / "Annotations").mkdir()
    (out / "ImageSets" / "Main").mkdir(parents=True)
    for split, images in splits.items():
        _place(images, out / "JPEGImages", link)
        for one in images:
            root = ET.Element("annotation")
            height, width = one.size_hw
            _grow(root, {"folder": "JPEGImages", "filename": one.name})
            _grow(ET.SubElement(root, "size"), {"width": width, "height": height, "depth": 3})
            for row, difficult in _objects(one):
                x1, y1, x2, y2 = corners_px(row, one.size_hw)
                item = ET.SubElement(root, "object")
                _grow(item, {"name": names[int(row[0])], "truncated": 0, "difficult": int(difficult)})
                corners = {"xmin": x1 + 1, "ymin": y1 + 1, "xmax": x2, "ymax": y2}
                _grow(ET.SubElement(item, "bndbox"), {key: _decimal(value, 9) for key, value in corners.items()})
            ET.indent(root)
            ET.ElementTree(root).write(out / "Annotations" / f"{one.stem}.xml", encoding="utf-8")
        listed = "".join(f"{one.stem}\n" for one in images)
        (out / "ImageSets" / "Main" / f"{split}.txt").write_text(listed, encoding="utf-8")
    _describe(out, names, {split: f"ImageSets/Main/{split}.txt" for split in splits})


def _objects(one: Labelled) -> list[tuple[Row, bool]]:
    """Objects, then those to be ignored."""
    rows = [(one.annotations.rows, False), (one.annotations.ignored, True)]
    return [(tuple(row), ignored) for of_kind, ignored in rows for row in of_kind.tolist()]


def _place(images: Sequence[Labelled], folder: Path, link: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for one in images:
        try:
            if not link:
                raise OSError
            os.link(one.source.resolve(), folder / one.name)
        except OSError:  # or the folders lie on different disks
            shutil.copyfile(one.source, folder / one.name)


def _describe(out: Path, names: Sequence[str], splits: dict[str, str]) -> None:
    """``data.yaml``, whose entries are relative to itself."""
    content = yaml.safe_dump({**splits, "names": list(names)}, sort_keys=False, allow_unicode=True)
    (out / "data.yaml").write_text(f"{MARK}\n{content}", encoding="utf-8")


def _grow(element: ET.Element, children: dict[str, object]) -> None:
    for tag, text in children.items():
        ET.SubElement(element, tag).text = str(text)


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _decimal(value: float, places: int) -> str:
    """Without trailing zeros."""
    text = f"{value:.{places}f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


WRITERS: dict[str, Callable[[Path, dict[str, list[Labelled]], Sequence[str], bool], None]] = {
    "yolo": _write_yolo,
    "coco": _write_coco,
    "voc": _write_voc,
}
"""By format: from an empty folder, the images of each split, the class names and whether to link images, to files."""
