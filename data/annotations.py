"""What is known of one image, whatever the format of the file that says it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DataError

Row = tuple[float, ...]
"""class, cx, cy, w, h: the box as fractions of the image, and inside it"""


class ClassRangeError(ValueError):
    """A class that the data set's names do not cover."""


def as_rows(rows: Sequence[Row]) -> NDArray[np.float64]:
    """[n, 5], also without any row."""
    return np.array(rows, dtype=np.float64).reshape(-1, 5)


@dataclass(frozen=True)
class Annotations:
    """The objects of one image."""

    rows: NDArray[np.float64]
    """[n, 5]: class, cx, cy, w, h, normalised and inside the image"""
    ignored: NDArray[np.float64] = field(default_factory=lambda: as_rows([]))
    """The same of COCO's crowds and VOC's difficult objects: not trained on, and neither right nor wrong when detected."""
    problems: tuple[str, ...] = ()
    """What was left out, and why."""
    out_of_range: tuple[str, ...] = ()
    """The objects of classes that do not exist."""
    unusable: bool = False
    """Whether the image itself is left out, because nobody can tell what is in it."""

    def mapped(self, class_map: Sequence[int] | None) -> Annotations:
        """Class ``i`` becomes ``class_map[i]``; objects of a class that becomes -1 are dropped. None changes nothing."""
        if class_map is None:
            return self
        table = np.asarray(class_map, dtype=np.float64)

        def renumbered(rows: NDArray[np.float64]) -> NDArray[np.float64]:
            rows = rows.copy()
            rows[:, 0] = table[rows[:, 0].astype(np.int64)]
            return rows[rows[:, 0] >= 0]

        return replace(self, rows=renumbered(self.rows), ignored=renumbered(self.ignored))


@dataclass(frozen=True)
class Entry:
    """An image of a split, and how to learn what is in it."""

    image: Path
    read: Callable[[tuple[int, int]], Annotations]
    """From the image's (height, width) to its annotations."""
    labels: Path
    """The file that says what is in it, whether it exists or not."""
    image_id: int | str | None = None
    """The id of a COCO file."""
    category_ids: Mapping[str, int] = field(default_factory=dict)
    """A COCO file's ids of classes by name."""
    sought: Sequence[Path] = ()
    """Where a list's image that is nowhere was looked for."""


class Collector:
    """Gathers objects one by one; an object that cannot be used becomes a line in ``problems``."""

    def __init__(self) -> None:
        self._rows: dict[bool, dict[Row, None]] = {False: {}, True: {}}
        self._problems: list[str] = []
        self._out_of_range: list[str] = []

    @contextlib.contextmanager
    def reading(self, where: str, what: str) -> Iterator[None]:
        """A ValueError inside says why ``what`` at ``where`` is left out."""
        try:
            yield
        except ValueError as error:
            if isinstance(error, ClassRangeError):
                self._out_of_range.append(f"{where}: {error}")
            else:
                self._problems.append(f"{where}: {error}; the {what} was left out")

    def add(self, row: Row, ignored: bool = False) -> None:
        if row in self._rows[ignored]:
            raise ValueError("the same object twice")
        self._rows[ignored][row] = None

    def annotations(self) -> Annotations:
        rows, ignored = (as_rows(list(self._rows[kind])) for kind in (False, True))
        problems = self._problems
        # Without one usable object it would teach that nothing is there.
        unusable = bool(problems) and not len(rows) + len(ignored)
        if unusable:
            problems = [f"{problems[0]}, and as no other can be used, the image"]
        return Annotations(rows, ignored, tuple(problems), tuple(self._out_of_range), unusable)


def unusable_image(problem: str) -> Annotations:
    """An image that is left out for what its annotation says."""
    return Annotations(as_rows([]), problems=(f"{problem}; the image was left out",), unusable=True)


def wrong_size(who: str, stated_hw: tuple[Any, Any], size_hw: tuple[int, int]) -> Annotations | None:
    """An image that is left out because its annotation states another size; some writers leave the size out or at 0."""
    if not all(stated_hw) or stated_hw == size_hw:
        return None
    stated, found = (
        "x".join(f"{side:g}" if isinstance(side, float) else str(side) for side in sides[::-1])
        for sides in (stated_hw, size_hw)
    )
    return unusable_image(f"{who} is said to have {stated} pixels, the file has {found}")


def row_from_pixels(kind: int, corners: Sequence[float], size_hw: tuple[int, int]) -> Row:
    """x1, y1, x2, y2 in pixels of an image of that size -> a row, clipped to the image; ValueError says what is wrong."""
    if not all(math.isfinite(value) for value in corners):
        raise ValueError(f"box {list(corners)}, expected finite numbers")
    x1, y1, x2, y2 = corners
    if x2 <= x1 or y2 <= y1:
        raise ValueError("a box of zero area")
    height, width = size_hw
    x1, x2 = (min(max(x, 0.0), width) / width for x in (x1, x2))
    y1, y2 = (min(max(y, 0.0), height) / height for y in (y1, y2))
    if x2 <= x1 or y2 <= y1:
        raise ValueError(f"a box outside the image of {width}x{height} pixels")
    return (float(kind), (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)


def check_usable(split: str, annotations: Sequence[Annotations], names: Sequence[str]) -> None:
    """DataError where a label is of a class that does not exist, or files hold labels of which none can be used."""
    problems = [problem for one in annotations for problem in one.problems]
    out_of_range = [problem for one in annotations for problem in one.out_of_range]
    usable = sum(len(one.rows) + len(one.ignored) for one in annotations)
    if out_of_range:
        raise DataError(
            f"split {split!r}: {len(out_of_range)} of {usable + len(out_of_range)} labels are of none of the {len(names)} "
            f"classes that the data.yaml names; the first: {out_of_range[0]}; correct names and nc, or the labels"
        )
    if problems and not usable:
        raise DataError(
            f"split {split!r}: not one of its labels can be used: {len(problems)} problems, the first: {problems[0]}"
        )


def no_object(split: str, files: Sequence[Path], images: int) -> str:
    """What is wrong with a split without an object, whose labels were looked for in these files."""
    missing = [file for file in files if not file.is_file()]
    found = f"{len(missing)} do not exist" if missing else "all exist, but none holds one"
    return (
        f"split {split!r}: no object in its {images} images; of their {len(files)} label files {found}, such as "
        f"{(missing or files)[0]}; put the labels there, or correct the data.yaml"
    )
