"""Write a data set in another format: YOLO text, COCO JSON or Pascal VOC XML, each from each.

    python -m data.convert data/bccd.yaml --to voc --out bccd-voc

The new folder holds the images, their annotations and a ``data.yaml`` that trains as it is. It appears whole or not at all.
Boxes are written to 1e-9 pixels (COCO, VOC) or 1e-8 of the image's side (YOLO), so that YOLO labels of up to 8 decimals
survive any way round unchanged. YOLO text cannot say crowd or difficult: such objects are left out, and counted.
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .annotations import Annotations, as_rows, check_usable
from .config import ROOT_VARIABLE, SPLITS, DataConfig, load_data_config
from .errors import DataError
from .images import read_size
from .sources import FORMATS, source_format
from .writers import MARK, WRITERS, Labelled


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
            WRITERS[to](new, splits, config.names, link)
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
