"""Pascal VOC annotation files: one XML an image.

http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc: pixels are counted from 1 and the last one belongs to the box, so
that xmin 1, xmax 10 is the box from 0 to 10.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from .annotations import Annotations, ClassRangeError, Collector, as_rows, row_from_pixels, unusable_image
from .errors import DataError

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


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
    stated = tuple(_number(root, f"size/{key}") for key in ("height", "width"))
    # Some writers leave the size out or at 0.
    if all(stated) and stated != size_hw:
        return unusable_image(
            f"{path}: the image is said to have {stated[1]:g}x{stated[0]:g} pixels, the file has {size_hw[1]}x{size_hw[0]}"
        )
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
        root = ET.parse(path).getroot()
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
