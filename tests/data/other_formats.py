"""A split of a data set, written again as COCO JSON or as Pascal VOC XML."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml

from data import DataConfig
from data.images import read_size


def write_again(config: DataConfig, to: str, out: Path) -> Path:
    """The description of a copy of the splits train and val in the format ``to``: coco or voc; without ignored objects."""
    sources = {}
    for split in ("train", "val"):
        if getattr(config, split) is not None:
            sources[split] = (_write_coco if to == "coco" else _write_voc)(config, split, out)
    file = out / "data.yaml"
    file.write_text(yaml.safe_dump({"path": str(out), **sources, "names": list(config.names)}))
    return file


def _objects(config: DataConfig, split: str, images: Path) -> list[tuple[Path, tuple[int, int], list[list[float]]]]:
    """Each image's copy, its (height, width) and its objects: class, x1, y1, x2, y2 in pixels."""
    images.mkdir(parents=True, exist_ok=True)
    found = []
    for entry in config.entries(split)[0]:
        height, width = size = read_size(entry.image)
        rows = entry.read(size).rows.tolist()
        boxes = [
            [c, (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
            for c, x, y, w, h in rows
        ]
        place = images / entry.image.name
        place = place.with_name(f"{split}_{place.name}") if place.exists() else place
        found.append((Path(shutil.copy(entry.image, place)), size, boxes))
    return found


def _write_coco(config: DataConfig, split: str, out: Path) -> str:
    images, annotations = [], []
    for number, (path, (height, width), boxes) in enumerate(_objects(config, split, out / "images" / split)):
        images.append({"id": number, "file_name": path.name, "height": height, "width": width})
        for kind, x1, y1, x2, y2 in boxes:
            box = [round(value, 9) for value in (x1, y1, x2 - x1, y2 - y1)]
            annotations.append(
                {"id": len(annotations), "image_id": number, "category_id": int(kind) + 1, "bbox": box, "iscrowd": 0}
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(config.names, start=1)]
    file = out / "annotations" / f"{split}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return f"annotations/{split}.json"


def _write_voc(config: DataConfig, split: str, out: Path) -> str:
    for folder in ("Annotations", "ImageSets/Main"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    names = []
    for path, (height, width), boxes in _objects(config, split, out / "JPEGImages"):
        names.append(path.stem)
        objects = "".join(
            f"<object><name>{config.names[int(kind)]}</name><bndbox><xmin>{x1 + 1:.9f}</xmin><ymin>{y1 + 1:.9f}</ymin>"
            f"<xmax>{x2:.9f}</xmax><ymax>{y2:.9f}</ymax></bndbox></object>"
            for kind, x1, y1, x2, y2 in boxes
        )
        size = f"<size><width>{width}</width><height>{height}</height></size>"
        (out / "Annotations" / f"{path.stem}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    (out / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
    return f"ImageSets/Main/{split}.txt"
