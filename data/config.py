"""Data set descriptions: YOLOv5's ``data.yaml``, read as it is, with COCO and VOC annotations as well.

A split is a folder of images, a list file, a COCO ``.json``, or a list of these; ``data/sources.py`` says how the format
is told. The same set as YOLO text, COCO and VOC:

    path: cells                  path: cells                         path: cells
    train: images/train          train: annotations/train.json       train: ImageSets/Main/train.txt
    val: images/val              val: annotations/val.json           val: ImageSets/Main/val.txt
    names: [RBC, WBC]            images: {train: jpg, val: jpg}

``names`` may be left out for COCO (its categories in the order of their ids) and VOC (the classes of its objects in
alphabetical order). ``images``, a folder or one for each split, is needed only where COCO's images lie in an unusual place;
``format``, yolo or voc, only where folders or lists have both kinds of files.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from .annotations import Entry
from .errors import DataError
from .labels import regular
from .settings import MAX_PIXELS
from .sources import class_names, find_entries

SPLITS = ("train", "val", "test")
ROOT_VARIABLE = "SLIM_DATA_ROOT"
DEFAULT_ROOT = "datasets"
MAX_ALIASES = 16
_WHERE = f"--data-root or ${ROOT_VARIABLE} says where data sets lie"


@dataclass(frozen=True)
class DataConfig:
    """A data set: class names by class index, and for each split its sources (``None``: not described)."""

    names: tuple[str, ...]
    train: tuple[Path, ...] | None = None
    val: tuple[Path, ...] | None = None
    test: tuple[Path, ...] | None = None
    can_download: bool = False
    """Whether the description says where the data set is to be had."""
    path: Path = Path()
    """The data set's folder: what relative entries of a list file may be relative to."""
    images: Mapping[str, Path] = field(default_factory=dict)
    """The images' folder of splits whose source is a COCO file, where it is not at a usual place."""
    format: str | None = None
    """yolo or voc for folders and lists; ``None``: told from the files that are there."""
    label_names: tuple[str, ...] | None = None
    """The classes as the files number or name them; ``None``: ``names``."""
    class_map: tuple[int, ...] | None = None
    """For each of ``label_names`` its index in ``names``, -1 for a class that is not looked at; ``None``: the same."""
    max_pixels: int = MAX_PIXELS
    """An image of more pixels is not read."""

    def select(self, classes: Sequence[str | int]) -> DataConfig:
        """Keep these classes alone, by name or index (a name that is a number wins), in this order; others are background."""
        chosen: list[int] = []
        for one in classes:
            text = str(one)
            index = self.names.index(text) if text in self.names else int(text) if text.isdigit() else -1
            if not 0 <= index < len(self.names):
                raise DataError(
                    f"class {text!r} is not there; expected names or numbers of {', '.join(self.names[:20])} "
                    f"(0 to {len(self.names) - 1})"
                )
            if index in chosen:
                raise DataError(f"class {text!r} is chosen twice; give each class once")
            chosen.append(index)
        if not chosen:
            raise DataError(f"no class is chosen; expected some of {', '.join(self.names[:20])}")
        places = [chosen.index(i) if i in chosen else -1 for i in range(len(self.names))]
        return self._regrouped(tuple(self.names[i] for i in chosen), places)

    def single(self, name: str = "object") -> DataConfig:
        """Take all classes as one."""
        return self._regrouped((name,), [0] * len(self.names))

    def _regrouped(self, names: tuple[str, ...], places: Sequence[int]) -> DataConfig:
        before = self.class_map or range(len(self.names))
        class_map = tuple(places[i] if i >= 0 else -1 for i in before)
        return replace(self, names=names, label_names=self.label_names or self.names, class_map=class_map)

    def entries(self, split: str) -> tuple[list[Entry], list[str]]:
        """List the images of a split with their annotations, and what was left out of its files; DataError as ``split``."""
        names = self.label_names or self.names
        folder = self.images.get(split)
        if folder is not None and not folder.is_dir():
            raise DataError(f"split {split!r}: images: {folder} is no folder; {_where(self.can_download)}")
        return find_entries(self.split(split), names, self.path, folder, self.format)

    def split(self, name: str) -> tuple[Path, ...]:
        """Return the sources of the split ``name``; DataError if it is unknown, not described, or not on the disk."""
        if name not in SPLITS:
            raise DataError(f"unknown split {name!r}: use one of {', '.join(SPLITS)}")
        sources: tuple[Path, ...] | None = getattr(self, name)
        if not sources:
            described = [split for split in SPLITS if getattr(self, split)]
            raise DataError(f"the data set has no {name!r} split: it describes {', '.join(described) or 'none'}")
        for source in sources:
            if not source.exists():
                raise DataError(f"split {name!r}: {source} does not exist; {_where(self.can_download)}")
        return sources


def load_data_config(path: str | Path, data_root: str | Path | None = None) -> DataConfig:
    """Read the description of a data set.

    A relative ``path`` in it is looked for under ``data_root``, then beside the YAML, then in the working folder; without one
    the splits are, beside the YAML first. The first place that holds one of the splits is taken. Its keys ``download`` and
    ``synthetic`` are not followed (``data.download`` and ``data.shapes`` do).

    Args:
        path: a YOLOv5 ``data.yaml``.
        data_root: the folder of data sets; None: ``$SLIM_DATA_ROOT``, else ``./datasets``.

    Raises:
        DataError: the file or the data is missing, or names and ``nc`` disagree.

    >>> import tempfile
    >>> from data import make_shapes
    >>> with tempfile.TemporaryDirectory() as root:
    ...     make_shapes(f"{root}/shapes", train=1, val=1, test=1, image_size_px=32)
    ...     load_data_config("data/shapes.yaml", root).names
    ('circle', 'square', 'triangle', 'cross')
    """
    file = Path(path)
    content = read_description(file)
    described = {split: _entries(content, split, file) for split in SPLITS}
    if not any(described.values()):
        coco = "; a COCO file is a split of a data.yaml: val: FILE.json" if file.suffix == ".json" else ""
        raise DataError(
            f"{file}: no train, val or test is given; each is a folder, a list file or a list of these{coco}"
        )
    can_download = bool(content.get("download"))
    candidates = _base_candidates(content, file, data_root)
    base = next((c for c in candidates if any(_locate(c, e).exists() for es in described.values() for e in es)), None)
    if base is None:
        places = ", ".join(str(candidate) for candidate in candidates)
        entries = ", ".join(entry for es in described.values() for entry in es)
        raise DataError(f"{file}: none of {entries} exists; looked in {places}; {_where(can_download)}")
    train, val, test = (tuple(_locate(base, entry) for entry in described[split]) or None for split in SPLITS)
    labels = content.get("format")
    if labels not in (None, "yolo", "voc"):
        raise DataError(f"{file}: format is {labels!r}, expected yolo or voc (a COCO file is known by its .json)")
    names = content.get("names")
    if names is None:
        names = list(class_names([*(train or ()), *(val or ()), *(test or ())], base, labels)) or None
    return DataConfig(
        names=_names(names, content.get("nc"), file),
        train=train,
        val=val,
        test=test,
        path=base,
        images=_image_folders(content, base, file),
        format=labels,
        can_download=can_download,
    )


def read_description(file: Path) -> Mapping[str, Any]:
    """A description as it is written, unchecked but for being a mapping.

    ``data/NAME`` and ``NAME`` that are missing are those of this folder: an installed command runs anywhere.
    """
    own = Path(__file__).with_name(file.name)
    if not file.exists() and file.parent in (Path(), Path("data")) and own.is_file():
        file = own
    try:
        text = regular(file).read_text(encoding="utf-8")
        aliases = sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)) if "*" in text else 0
        if aliases > MAX_ALIASES:
            raise DataError(f"{file}: {aliases} aliases, which can expand without end; write out all but {MAX_ALIASES}")
        content = yaml.safe_load(text)
    except OSError as error:
        raise DataError(f"cannot read the data set description {file}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: found {type(content).__name__}, expected keys such as path, train, val and names")
    return content


def described_names(path: str | Path) -> tuple[str, ...]:
    """The classes that a data set's description names, whether the data set is there or not; DataError where it does not."""
    content = read_description(Path(path))
    return _names(content.get("names"), content.get("nc"), Path(path))


def _names(names: Any, count: Any, file: Path) -> tuple[str, ...]:
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise DataError(f"{file}: nc is {count!r}, expected the number of classes, a whole number of at least 1")
    if isinstance(names, dict):
        keys = [str(key) for key in names]
        missing = [i for i in range(len(keys)) if str(i) not in keys]
        if missing:
            raise DataError(
                f"{file}: names do not cover class {missing[0]}; {len(keys)} names need the keys 0 to {len(keys) - 1}"
            )
        names = [name for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
    if not isinstance(names, list) or not names:
        raise DataError(f"{file}: names is {names!r}, expected a list of class names or a mapping like {{0: person}}")
    if count is not None and count != len(names):
        raise DataError(f"{file}: nc is {count} but there are {len(names)} names; correct one of them or leave nc out")
    found = tuple(str(name) for name in names)
    twice, count = Counter(found).most_common(1)[0]
    if count > 1:
        numbers = " and ".join(str(i) for i, name in enumerate(found) if name == twice)
        raise DataError(f"{file}: classes {numbers} are both named {twice!r}; give each class a name of its own")
    return found


def _image_folders(content: Mapping[str, Any], base: Path, file: Path) -> dict[str, Path]:
    given = content.get("images")
    folders = given if isinstance(given, dict) else dict.fromkeys(SPLITS, given) if given else {}
    for split, folder in folders.items():
        if split not in SPLITS or not isinstance(folder, str):
            raise DataError(
                f"{file}: images holds {split!r}: {folder!r}, expected a folder, or one for train, val and test"
            )
    return {split: _locate(base, folder) for split, folder in folders.items()}


def _entries(content: Mapping[str, Any], split: str, file: Path) -> tuple[str, ...]:
    value = content.get(split)
    values = value if isinstance(value, list) else [value] if value else []
    for entry in values:
        if not isinstance(entry, str):
            raise DataError(f"{file}: {split} holds {entry!r}, expected a folder, a list file or a list of these")
    return tuple(values)


def find_root(data_root: str | Path | None = None) -> Path:
    """Return the folder of data sets: ``data_root``, else ``$SLIM_DATA_ROOT``, else ``./datasets``."""
    return Path(data_root or os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT).expanduser()


def _base_candidates(content: Mapping[str, Any], file: Path, data_root: str | Path | None) -> list[Path]:
    folder = content.get("path") or ""
    if not isinstance(folder, str):
        raise DataError(f"{file}: path is {folder!r}, expected a folder")
    given = Path(folder).expanduser()
    if given.is_absolute():
        return [given]
    root = find_root(data_root)
    if given == Path():
        # Another data set may lie in the root itself. Entries may begin with the name of the folder in which the YAML lies.
        return [file.parent, *([] if folder else [file.absolute().parent.parent]), given, root]
    places = [root / given]
    if given.parts[:1] == ("..",):
        # YOLOv5's own files say ../datasets/NAME, its name for the place that --data-root sets here.
        places.append(root / given.name)
    return [*places, file.parent / given, given]


def _locate(base: Path, entry: str) -> Path:
    """``base / entry``; exports whose YAML lies inside the data set write ``../train/images`` for ``train/images``."""
    plain = base / Path(entry).expanduser()
    inside = base / entry[3:]
    return inside if entry.startswith("../") and not plain.exists() and inside.exists() else plain


def _where(can_download: bool) -> str:
    return f"{_WHERE}, --download fetches the data set" if can_download else _WHERE


def described_entries(content: Mapping[str, Any], file: Path, splits: Sequence[str] = SPLITS) -> tuple[str, ...]:
    """What the splits are made of, as the YAML says it."""
    return tuple(entry for split in splits for entry in _entries(content, split, file))


def is_there(content: Mapping[str, Any], file: Path, data_root: str | Path | None) -> bool:
    """Whether all that train and val are made of (without them: test) exists in one of the places where it is looked for."""
    entries = described_entries(content, file, ("train", "val")) or described_entries(content, file)
    places = _base_candidates(content, file, data_root)
    return bool(entries) and any(all(_locate(base, entry).exists() for entry in entries) for base in places)


def data_folder(content: Mapping[str, Any], file: Path, data_root: str | Path | None) -> Path:
    """Where a download puts the data set; DataError if the YAML names no folder of its own for it."""
    places = _base_candidates(content, file, data_root)
    given = Path(content.get("path") or "")
    if not given.name or given.name == "..":
        raise DataError(f"{file}: path is {content.get('path')!r}, expected the data set's folder to download into")
    return places[1] if given.parts[:1] == ("..",) else places[0]
