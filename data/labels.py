"""YOLO label files: one object a line, ``class cx cy w h`` normalised to the image, or a polygon ``class x1 y1 x2 y2 ...``."""

from __future__ import annotations

import math
from pathlib import Path

from .annotations import Annotations, ClassRangeError, Collector, Row, as_rows

_TOLERANCE = 1e-6
"""Writers round: 1.0000001 is 1."""


def label_path(image: Path) -> Path:
    """Where an image's labels lie: the last folder ``images`` of its path becomes ``labels``, the suffix ``.txt``.

    Without such a folder they lie beside the image.
    """
    parts = list(image.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def read_labels(path: Path, num_classes: int) -> Annotations:
    """Labels of one image, boxes clipped to it. A missing or empty file means that nothing is in the image."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        lines = []
    except (OSError, UnicodeDecodeError) as error:
        return Annotations(
            as_rows([]), problems=(f"{path}: cannot be read as text ({error}); all its lines were left out",)
        )
    found = Collector()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            with found.reading(f"{path}:{number}", "line"):
                found.add(parse_label(line, num_classes))
    return found.annotations()


def parse_label(line: str, num_classes: int) -> Row:
    """One line -> (class, cx, cy, w, h), normalised and clipped to the image; ValueError says what is wrong with it."""
    fields = line.split()
    if len(fields) != 5 and (len(fields) < 7 or len(fields) % 2 == 0):
        raise ValueError(
            f"found {len(fields)} fields, expected 5 (class cx cy w h) or a polygon (class x1 y1 x2 y2 ...)"
        )
    try:
        values = [float(field) for field in fields]
    except ValueError:
        raise ValueError(f"found {line.strip()[:40]!r}, expected numbers") from None
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"found {line.strip()[:40]!r}, expected finite numbers")
    kind, *coordinates = values
    if kind != int(kind) or not 0 <= kind < num_classes:
        raise ClassRangeError(f"class {kind:g}, expected 0 to {num_classes - 1}")
    wrong = [value for value in coordinates if not -_TOLERANCE <= value <= 1 + _TOLERANCE]
    if wrong:
        raise ValueError(f"coordinate {wrong[0]:g}, expected 0 to 1 (a fraction of the image)")
    if len(coordinates) == 4:
        cx, cy, w, h = coordinates
        x1, y1, x2, y2 = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
    else:
        xs, ys = coordinates[0::2], coordinates[1::2]
        x1, y1, x2, y2 = min(xs), min(ys), max(xs), max(ys)
    x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in (x1, y1, x2, y2))
    if x2 <= x1 or y2 <= y1:
        raise ValueError("a box of zero area")
    return (kind, (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)
