"""Images whose content is known to the pixel, and data sets of them on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data import DataConfig

ROOT = Path(__file__).resolve().parents[2]
BCCD = ROOT.parent / "shared" / "data" / "bccd"
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))
"""Of the rectangle of class 0, 1, 2, 3."""

Box = tuple[int, int, int, int]


def rectangle(height: int, width: int, box_xyxy: Box, kind: int = 0) -> Tensor:
    """A rectangle in its class's colour on black, uint8 [3, height, width]."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    x1, y1, x2, y2 = box_xyxy
    image[:, y1:y2, x1:x2] = torch.tensor(COLOURS[kind], dtype=torch.uint8).view(3, 1, 1)
    return image


def visible_box(image: Tensor, kind: int) -> NDArray[np.float64] | None:
    """x1, y1, x2, y2 of the pixels that are nearer to the class's colour than to black; None without any."""
    distance = (image.float() - torch.tensor(COLOURS[kind]).view(3, 1, 1)).abs().amax(dim=0)
    ys, xs = np.nonzero((distance < 128).numpy())
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], dtype=np.float64) if len(xs) else None


def label_line(height: int, width: int, box_xyxy: Box, kind: int = 0) -> str:
    x1, y1, x2, y2 = box_xyxy
    values = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
    return f"{kind} " + " ".join(f"{value:.6f}" for value in values)


def write_set(
    root: Path, images: Mapping[str, Tensor], labels: Mapping[str, Sequence[str]], num_classes: int = 4
) -> DataConfig:
    """PNG images in ``root/images/train``, label lines by stem in ``root/labels/train``, and the set's description."""
    for kind in ("images", "labels"):
        (root / kind / "train").mkdir(parents=True)
    for stem, image in images.items():
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / "images" / "train" / f"{stem}.png")
    for stem, lines in labels.items():
        (root / "labels" / "train" / f"{stem}.txt").write_text("\n".join(lines), encoding="utf-8")
    names = tuple(f"class{i}" for i in range(num_classes))
    return DataConfig(names=names, train=(root / "images" / "train",), path=root)


def write_rectangles(root: Path, count: int = 6) -> DataConfig:
    """Images of different sizes, each with one rectangle; classes in turn."""
    images, labels = {}, {}
    for i in range(count):
        height, width, box = 40 + 4 * i, 64 - 3 * i, (8 + i, 6 + i, 30, 28 + i)
        images[f"image{i}"] = rectangle(height, width, box, i % 4)
        labels[f"image{i}"] = [label_line(height, width, box, i % 4)]
    return write_set(root, images, labels)
