"""Write a data set in another format: YOLO text, COCO JSON or Pascal VOC XML, each from each.

    python -m data.convert data/bccd.yaml --to voc --out bccd-voc

The new folder holds the images, their annotations and a ``data.yaml`` that trains as it is. It appears whole or not at all.
Boxes are written to 1e-9 pixels (COCO, VOC) or 1e-8 of the image's side (YOLO), so that YOLO labels of up to 8 decimals
survive any way round unchanged. YOLO text cannot say crowd or difficult: such objects are left out, and counted.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import shutil
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from .annotations import Annotations, Row, as_rows, check_usable, corners_px
from .config import ROOT_VARIABLE, SPLITS, DataConfig, load_data_config
from .errors import DataError
from .images import read_size
from .sources import FORMATS, source_format

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


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    images: dict[str, int]
    """By split."""
    objects: int
    ignored: int
    """Crowds and difficult objects, in the new set only where its format can say it."""
    problems: tuple[str, ...]


def convert(
    config: DataConfig,
    to: str,
    out: str | Path,
    *,
    overwrite: bool = False,
    link: bool = False,
    source: str | None = None,
) -> Conversion:
    """Write every split of ``config`` to the new folder ``out`` in the format ``to``: yolo, coco or voc.

    ``overwrite`` replaces a folder that an earlier conversion wrote, and no other; ``link`` makes hard links of the images
    instead of copies where it can. ``source`` is the format that the set must have, where given. DataError if the folder is
    taken, cannot be written, or a split cannot be read.
    """
    out = Path(out)
    if to not in FORMATS or source not in (None, *FORMATS):
        raise DataError(f"format {to if to not in FORMATS else source!r}, expected one of {', '.join(FORMATS)}")
    _check_target(out, overwrite)
    splits, problems = _read_splits(config, to, source)
    for split in splits.values():
        for one in split:
            if overwrite and out.resolve() in one.source.resolve().parents:
                raise DataError(
                    f"{out}: holds the images that are converted, such as {one.source}; choose another folder"
                )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            new = Path(folder, "new")
            new.mkdir()
            _WRITERS[to](new, splits, config.names, link)
            _swap(new, out, Path(folder, "old"))
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror or error}); what was there is untouched") from error
    every = [one for split in splits.values() for one in split]
    return Conversion(
        {split: len(images) for split, images in splits.items()},
        sum(len(one.annotations.rows) for one in every),
        sum(len(one.annotations.ignored) for one in every),
        tuple(problems),
    )


def _swap(new: Path, out: Path, old: Path) -> None:
    """Put ``new`` in the place of ``out``, which goes to ``old``."""
    replaced = out.exists()
    if replaced:
        os.replace(out, old)
    try:
        os.replace(new, out)
    except OSError:
        if replaced:
            os.replace(old, out)
        raise


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise DataError(
            f"{out}: is already there; choose another --out, or --overwrite what an earlier conversion wrote"
        )
    try:
        ours = (out / "data.yaml").read_text(encoding="utf-8").startswith(MARK)
    except (OSError, UnicodeDecodeError):
        ours = False
    if not ours:
        raise DataError(f"{out}: was not written by a conversion, so it is not replaced; choose another --out")


def _read_splits(config: DataConfig, to: str, source: str | None) -> tuple[dict[str, list[Labelled]], list[str]]:
    """The images of every split that is on the disk, and what was left out."""
    splits: dict[str, list[Labelled]] = {}
    problems: list[str] = []
    taken: collections.Counter[str] = collections.Counter()
    for split in (split for split in SPLITS if getattr(config, split) is not None):
        try:
            places = config.split(split)
        except DataError as error:
            problems.append(str(error))
            continue
        for place in places:
            found = source_format(place, config.path, config.format)
            if source not in (None, found):
                raise DataError(f"{place}: its annotations are {found}, not {source}")
        if to != "voc":  # which alone keeps all splits in one folder
            taken.clear()
        splits[split], left_out = _read_split(config, split, taken)
        problems += left_out
    return splits, problems


def _read_split(config: DataConfig, split: str, taken: collections.Counter[str]) -> tuple[list[Labelled], list[str]]:
    entries, left_out = config.entries(split)
    images: list[Labelled] = []
    read = [Annotations(as_rows([]), problems=tuple(left_out))]
    for entry in entries:
        try:
            size = read_size(entry.image)
        except DataError as error:
            left_out.append(f"{error}; the image was left out")
            continue
        annotations = entry.read(size)
        read.append(annotations)
        left_out += annotations.problems
        if annotations.unusable:
            continue
        if config.class_map is not None:
            annotations = annotations.mapped(config.class_map)
        # A label file goes by the stem, so that a second one of the same needs another name.
        stem = entry.image.stem
        taken[stem] += 1
        name = entry.image.name if taken[stem] == 1 else f"{split}_{taken[stem]}_{entry.image.name}"
        taken[Path(name).stem] += taken[stem] > 1
        images.append(Labelled(entry.image, name, size, annotations))
    check_usable(split, read, config.label_names or config.names)
    if not images:
        raise DataError(f"split {split!r}: no image that can be used{': ' + left_out[0] if left_out else ''}")
    return images, left_out


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


_WRITERS: dict[str, Callable[[Path, dict[str, list[Labelled]], Sequence[str], bool], None]] = {
    "yolo": _write_yolo,
    "coco": _write_coco,
    "voc": _write_voc,
}


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


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data.convert", description="Write a data set in another format, images and all."
    )
    parser.add_argument("data", help="data set description (a data.yaml)")
    parser.add_argument(
        "--from", dest="source", choices=FORMATS, help="format that it must have; else told from its files"
    )
    parser.add_argument("--to", required=True, choices=FORMATS, help="format to write")
    parser.add_argument("--out", required=True, help="new folder")
    parser.add_argument("--data-root", help=f"folder of data sets; else ${ROOT_VARIABLE}, else ./datasets")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if an earlier conversion wrote it")
    parser.add_argument(
        "--link", action="store_true", help="hard links instead of copies of the images, where possible"
    )
    flags = parser.parse_args(argv)
    try:
        config = load_data_config(flags.data, flags.data_root)
        done = convert(config, flags.to, flags.out, overwrite=flags.overwrite, link=flags.link, source=flags.source)
    except (DataError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    for problem in done.problems[:10]:
        print(f"left out: {problem}")
    if len(done.problems) > 10:
        print(f"left out: {len(done.problems) - 10} more")
    if done.ignored and flags.to == "yolo":
        print(f"left out: {done.ignored} crowd or difficult objects, which YOLO text cannot say")
    counts = ", ".join(f"{count} {split}" for split, count in done.images.items())
    print(f"{flags.out}: {counts} images, {done.objects} objects; use it by --data {Path(flags.out) / 'data.yaml'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
