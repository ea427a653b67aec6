"""Label files of one image: YOLO's text and Pascal VOC's XML.

YOLO: one object a line, ``class cx cy w h`` normalised to the image, or a polygon ``class x1 y1 x2 y2 ...``, which counts as the
box around it. Boxes are clipped to the image. What no annotator draws is refused: a centre or a side that is by more than 0.01
outside of 0 to 1.

VOC (http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc): pixels are counted from 1 and the last one belongs to the box, so
that xmin 1, xmax 10 is the box from 0 to 10.
"""

from __future__ import annotations

import errno
import math
import stat
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from .annotations import (
    Annotations,
    ClassRangeError,
    Collector,
    Row,
    as_rows,
    row_from_pixels,
    unusable_image,
    wrong_size,
)
from .errors import DataError

_TOLERANCE = 0.01
"""By how much a centre may lie outside of the image, or a side be longer than it: tools draw and round over the edge."""
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_MAX_BYTES = 1 << 28
"""Of a text that says what images hold; a list of a million names has a tenth of it."""


def regular(path: Path, most_bytes: float = _MAX_BYTES) -> Path:
    """The path; OSError where reading it could go on for ever, or take all memory: a pipe, a device, a file without end."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    if found.st_size > most_bytes:
        raise OSError(errno.EFBIG, f"{found.st_size:,} bytes, expected at most {most_bytes:,}")
    return path


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
    """Labels of one image, boxes clipped to it. A missing or empty file means that nothing is in the image.

    An image of whose lines none can be used is left out: it would teach that nothing is there.
    """
    try:
        lines = regular(path).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        lines = []
    except (OSError, UnicodeDecodeError) as error:
        return unusable_image(f"{path}: cannot be read as text ({error})")
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
    if len(coordinates) == 4:
        cx, cy, w, h = coordinates
        corners = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
    else:
        xs, ys = coordinates[0::2], coordinates[1::2]
        corners = (min(xs), min(ys), max(xs), max(ys))
        cx, cy, w, h = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2, max(xs) - min(xs), max(ys) - min(ys)
    for what, value in (("centre x", cx), ("centre y", cy), ("width", w), ("height", h)):
        if not -_TOLERANCE <= value <= 1 + _TOLERANCE:
            raise ValueError(f"{what} {value:g}, expected 0 to 1 (a fraction of the image)")
    return row_from_pixels(int(kind), corners, (1, 1))


def annotation_path(image: Path) -> Path:
    """Where an image's XML lies: an existing folder ``Annotations`` in place of the path's last ``JPEGImages`` or ``images``.

    Without one, in ``Annotations`` beside the image's folder; without that, beside the image.
    """
    parts = list(image.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] in ("JPEGImages", "images"):
            root = Path(*parts[:i], "Annotations")
            if root.is_dir():
                return Path(root, *parts[i + 1 :]).with_suffix(".xml")
            break
    beside = image.parent.parent / "Annotations"
    return (beside / image.name if beside.is_dir() else image).with_suffix(".xml")


def read_voc(path: Path, names: Sequence[str], size_hw: tuple[int, int]) -> Annotations:
    """Objects of one image of that (height, width), boxes clipped to it. Without the file nothing is in the image."""
    try:
        root = _parse(path)
    except FileNotFoundError:
        return Annotations(as_rows([]))
    except DataError as error:
        return unusable_image(str(error))
    stated_hw = _number(root, "size/height"), _number(root, "size/width")
    wrong = wrong_size(f"{path}: the image", stated_hw, size_hw)
    if wrong:
        return wrong
    found = Collector()
    for number, item in enumerate(root.iterfind("object"), start=1):
        name = (item.findtext("name") or "").strip()
        with found.reading(f"{path}: object {number} ({name})", "object"):
            if name not in names:
                raise ClassRangeError(f"class {name!r} is not among the names of the data.yaml")
            corners = [_number(item, f"bndbox/{corner}") for corner in _CORNERS]
            if None in corners:
                raise ValueError(f"no number for {_CORNERS[corners.index(None)]} in its bndbox")
            x1, y1, x2, y2 = (float(value) for value in corners if value is not None)
            row = row_from_pixels(names.index(name), (x1 - 1, y1 - 1, x2, y2), size_hw)
            found.add(row, bool(_number(item, "difficult")))
    return found.annotations()


def voc_names(path: Path) -> set[str]:
    """The classes of a file's objects; none where it is absent or broken."""
    try:
        return {(item.findtext("name") or "").strip() for item in _parse(path).iterfind("object")} - {""}
    except (FileNotFoundError, DataError):
        return set()


def _parse(path: Path) -> ET.Element:
    try:
        root = ET.parse(regular(path)).getroot()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"cannot read the annotations {path}: {error.strerror or error}") from error
    except ET.ParseError as error:
        raise DataError(f"{path}:{error.position[0]}: not valid XML ({str(error).partition(':')[0]})") from error
    except ValueError as error:  # an unknown encoding
        raise DataError(f"{path}: not valid XML ({error})") from error
    if root.tag != "annotation":
        raise DataError(f"{path}: the outermost element is {root.tag!r}, expected a VOC 'annotation'")
    return root


def _number(element: ET.Element, place: str) -> float | None:
    try:
        return float(element.findtext(place) or "")
    except ValueError:
        return None
