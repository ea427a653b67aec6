"""Detection data sets: found, checked, cached, and served as letterboxed or augmented samples."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from .annotations import Annotations, Entry, as_rows, check_usable, no_object
from .augment import MIXUP_BETA, Labels, Tile, colour_and_flip, mix, mosaic_tiles, random_view, render
from .cache import DiskCache, MemoryCache, available_bytes, find_folder
from .config import DataConfig
from .errors import DataError
from .images import IMAGE_SUFFIXES, grey, letterbox_of, read_image, read_size, resize
from .letterbox import Letterbox
from .settings import Augment, Cache

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One image as the network sees it, before division by 255."""

    image: Tensor
    """uint8 [3, H, W], RGB, channels last in memory"""
    targets: Tensor
    """float32 [n, 5]: class, cx, cy, w, h normalised to [0, 1] of that"""
    image_id: int
    """The index in the data set; of a mosaic, that of its first image."""
    letterbox: Letterbox | None
    """How to get back to the original image; None for an augmented sample."""
    original_hw: tuple[int, int]
    """Height and width of the image file."""


@dataclass(frozen=True)
class Draw:
    """One sample that a batch asks for."""

    index: int
    """Of the image in its data set."""
    canvas_hw: tuple[int, int] | None = None
    """Height and width of the sample in pixels; None for the data set's own square."""
    turn: int = 0
    """How often the epoch drew the image before: each time it is augmented differently."""


class DetectionDataset(Dataset[Sample]):
    """A split of a data set: YOLO text, COCO or VOC (``data/sources.py`` says how the format is told).

    Without ``augment``, item i is image i letterboxed to a grey square of ``image_size_px``, as YOLOv5 evaluates: shrunk by
    averages of areas. With it, item i is a random sample that depends on (seed, epoch, i) alone, of images shrunk bilinearly,
    as YOLOv5 trains. Opening a data set reads image sizes and labels, and decodes only what ``read_size`` must. Bad label
    lines, images of whose labels none can be used and unreadable images are left out and listed in ``problems``.

    Args:
        config: the data set, see ``load_data_config``.
        split: train, val or test.
        image_size_px: the longer side of a resized image.
        augment: how training samples vary; None for evaluation, calibration and the like.
        seed: of all random choices, at least 0.
        cache: what becomes of images once they are decoded and resized. ``ram``: kept in memory, which loader workers share,
            unless all images would take more than half of what is available. ``disk``: kept in a folder ``.slim-cache``, for
            later starts too (``data/cache.py``); where that cannot be written, as ``ram``. ``none``: decoded whenever they are
            needed.
        mosaic_epochs: from this epoch on neither mosaic nor mixup is applied; None for always.
        image_weights: shuffled epochs and the other images of a mosaic are drawn with replacement by
            ``weigh_images``, so that classes occur alike.
        holders: how many processes of this machine keep images of their own in memory.

    Raises:
        DataError: an argument is out of range, no image is left, or none of the labels that the files hold.
    """

    def __init__(
        self,
        config: DataConfig,
        split: str,
        image_size_px: int,
        augment: Augment | None = None,
        seed: int = 0,
        cache: Cache = "ram",
        *,
        mosaic_epochs: int | None = None,
        image_weights: bool = False,
        holders: int = 1,
    ) -> None:
        if image_size_px < 1:
            raise DataError(f"image size {image_size_px}, expected a positive number of pixels")
        if seed < 0:
            raise DataError(f"seed {seed}, expected a whole number of at least 0")
        if cache not in get_args(Cache):
            raise DataError(f"cache {cache!r}, expected one of {', '.join(get_args(Cache))}")
        self.names = config.names
        self.split = split
        self.image_size_px = image_size_px
        self._holders = holders
        self.augment = augment
        self.seed = seed
        self.mosaic_epochs = mosaic_epochs
        self.image_weights = image_weights
        # Shared memory: persistent workers see the epoch that the main process sets.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._base, self._max_pixels = config.path, config.max_pixels
        entries, self.problems = config.entries(split)
        if not entries:
            sources = ", ".join(str(source) for source in config.split(split))
            raise DataError(f"split {split!r}: no image in {sources}; known are {', '.join(sorted(IMAGE_SUFFIXES))}")
        folder = find_folder(self._base) if cache == "disk" else None
        self._open(entries, config)
        self._cache = self._make_cache(cache, folder)
        if self.problems:
            logger.warning("split %r: %d problems, the first: %s", split, len(self.problems), self.problems[0])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, wanted: int | Draw) -> Sample:
        draw = wanted if isinstance(wanted, Draw) else Draw(wanted)
        if not 0 <= draw.index < len(self):
            raise IndexError(f"sample {draw.index} of {len(self)}")
        return self._plain(draw) if self.augment is None else self._augmented(draw, self.augment)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that augmentation and order are drawn for; call it before iterating. Reaches all workers."""
        self._epoch.fill_(epoch)

    def check_objects(self) -> None:
        """DataError unless the split holds an object: without any, nothing is learned from it, and no AP measured on it."""
        if self._no_object:
            raise DataError(self._no_object)

    def digest(self) -> str:
        """SHA-256 of classes, file names, image sizes and labels; of pixels only their number counts."""
        found = hashlib.sha256(json.dumps([self.names, [file.name for file in self.files]]).encode())
        found.update(np.asarray(self._sizes, dtype=np.int64).tobytes())
        for labels in (*self._labels, *self._ignored):
            found.update(np.asarray(labels.shape, dtype=np.int64).tobytes() + np.ascontiguousarray(labels).tobytes())
        return found.hexdigest()

    def ground_truth(self) -> dict[str, Any]:
        """The labels as a COCO dict: boxes in original pixels, image ids = indices, category ids = class indices.

        COCO's crowds and VOC's difficult objects have iscrowd 1, the one mark by which pycocotools ignores: a detection
        that lies in one is neither right nor wrong.
        """
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image_id, (file, (height, width), labels) in enumerate(
            zip(self.files, self._sizes, zip(self._labels, self._ignored, strict=True), strict=True)
        ):
            images.append({"id": image_id, "file_name": file.name, "width": width, "height": height})
            for k, row in enumerate(np.concatenate(labels).astype(np.float64)):
                w, h = float(row[3]) * width, float(row[4]) * height
                x, y = float(row[1]) * width - w / 2, float(row[2]) * height - h / 2
                annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": int(row[0])}
                annotations.append(
                    {**annotation, "bbox": [x, y, w, h], "area": w * h, "iscrowd": int(k >= len(labels[0]))}
                )
        categories = [{"id": i, "name": name} for i, name in enumerate(self.names)]
        return {"info": {"description": ""}, "images": images, "annotations": annotations, "categories": categories}

    def original_hw(self, index: int) -> tuple[int, int]:
        """Height and width of an image file in pixels."""
        return self._sizes[index]

    def draw_indices(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """So many images with replacement: all alike, or by their weights."""
        if not self.image_weights:
            return rng.integers(0, len(self), size=count)
        return np.searchsorted(self._cumulative_weights, rng.random(count), side="right")

    @cached_property
    def _cumulative_weights(self) -> NDArray[np.float64]:
        cumulative: NDArray[np.float64] = np.cumsum(weigh_images(self._labels))
        cumulative /= cumulative[-1]
        return cumulative

    def _plain(self, draw: Draw) -> Sample:
        size = self._sizes[draw.index]
        canvas_hw = draw.canvas_hw or (self.image_size_px, self.image_size_px)
        geometry, (height, width) = letterbox_of(size, self.image_size_px, canvas_hw)
        top, left = geometry.top_px, geometry.left_px
        part, labels = self._resized(draw.index, canvas_hw)
        image = grey(*canvas_hw)
        image[:, top : top + height, left : left + width] = part
        labels[:, 1:] += np.array([left, top] * 2, dtype=np.float32)
        return Sample(image, _targets(labels, canvas_hw), draw.index, geometry, size)

    def _augmented(self, draw: Draw, augment: Augment) -> Sample:
        rng = np.random.default_rng((self.seed, self.epoch, draw.index, draw.turn))
        if self.mosaic_epochs is not None and self.epoch >= self.mosaic_epochs:
            augment = replace(augment, mosaic=0.0, mixup=0.0)
        size_px, width = draw.canvas_hw or (self.image_size_px, self.image_size_px)
        assert size_px == width, "augmented samples are square"
        scene = self._scene(draw.index, size_px, augment, rng)
        # Without mixup nothing is drawn for it.
        if augment.mixup and rng.random() < augment.mixup:
            share = rng.beta(MIXUP_BETA, MIXUP_BETA)
            scene = mix(scene, self._scene(int(self.draw_indices(1, rng)[0]), size_px, augment, rng), share)
        image, labels = colour_and_flip(*scene, augment, rng)
        return Sample(image, _targets(labels, (size_px, size_px)), draw.index, None, self._sizes[draw.index])

    def _scene(self, index: int, size_px: int, augment: Augment, rng: np.random.Generator) -> tuple[Tensor, Labels]:
        """A mosaic that begins with the image, or the image alone, under a random view."""
        size = self.image_size_px
        if rng.random() < augment.mosaic:
            members = [index, *(int(i) for i in self.draw_indices(3, rng))]
            order = rng.permutation(4)
            canvas_px = 2 * size
            tiles = mosaic_tiles([self._resized(members[i]) for i in order], size, rng)
        else:
            geometry, _ = letterbox_of(self._sizes[index], size)
            canvas_px = size
            tiles = [Tile(*self._resized(index), geometry.left_px, geometry.top_px)]
        return render(tiles, random_view(augment, canvas_px, size_px, rng, zoom=size_px / size))

    def _resized(self, index: int, canvas_hw: tuple[int, int] | None = None) -> tuple[Tensor, Labels]:
        """The image with its longer side at image_size_px (without padding), and its labels in those pixels.

        On a canvas that is too small for that it is as large as fits. The image may be a view into the cache, the labels
        are new.
        """
        resized_hw = self._resized_hw(index)
        height, width = letterbox_of(self._sizes[index], self.image_size_px, canvas_hw)[1] if canvas_hw else resized_hw
        cache = self._cache if (height, width) == resized_hw else None
        image = cache.get(index) if cache else None
        if image is None:
            image = resize(self._read(index), (height, width), area=self.augment is None)
            if cache:
                cache.put(index, image)
        return image, _to_pixels(self._labels[index], width, height)

    def _resized_hw(self, index: int) -> tuple[int, int]:
        return letterbox_of(self._sizes[index], self.image_size_px)[1]

    def _read(self, index: int) -> Tensor:
        image = read_image(self.files[index], self._max_pixels)
        if tuple(image.shape[1:]) != self._sizes[index]:
            raise DataError(f"{self.files[index]}: the image changed since the data set was opened; start again")
        return image

    def _make_cache(self, cache: Cache, folder: Path | None) -> MemoryCache | DiskCache | None:
        if cache == "none":
            return None
        sizes_hw = [self._resized_hw(index) for index in range(len(self))]
        if folder is not None:
            how = "evaluated" if self.augment is None else "trained"
            return DiskCache(folder / f"{how}-{self.image_size_px}", self.files, sizes_hw, self._base)
        need, free = self._holders * sum(3 * height * width for height, width in sizes_hw), available_bytes()
        if free is None or need <= free / 2:
            return MemoryCache(sizes_hw)
        message = "split %r: %.1f GiB for its %d images are more than half of the %.1f GiB available: not cached"
        logger.warning(message, self.split, need / 2**30, len(self), free / 2**30)
        return None

    def _open(self, entries: Sequence[Entry], config: DataConfig) -> None:
        """Sizes and labels of the entries; those that cannot be used are left out."""
        of_sources = Annotations(as_rows([]), problems=tuple(self.problems))
        names = config.label_names or config.names
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            found = list(pool.map(lambda entry: _read_size_and_labels(entry, config.max_pixels), entries))
        self.problems += [f"{reason}; the image was left out" for reason in found if isinstance(reason, str)]
        readable = [(e, *row) for e, row in zip(entries, found, strict=True) if not isinstance(row, str)]
        self.problems += [problem for _, _, labels in readable for problem in labels.problems]
        check_usable(self.split, [*(labels for _, _, labels in readable), of_sources], names)
        kept = [
            (entry, size, labels.mapped(config.class_map)) for entry, size, labels in readable if not labels.unusable
        ]
        if not kept:
            raise DataError(
                f"split {self.split!r}: none of its {len(entries)} images can be used; the first: {self.problems[0]}"
            )
        before = sum(len(labels.rows) for _, _, labels in readable)
        if before and not any(len(labels.rows) for _, _, labels in kept):
            raise DataError(f"split {self.split!r}: no object of {', '.join(config.names)}; choose other classes")
        self.files: tuple[Path, ...] = tuple(entry.image for entry, _, _ in kept)
        self._sizes: list[tuple[int, int]] = [size for _, size, _ in kept]
        self._labels = [labels.rows.astype(np.float32) for _, _, labels in kept]
        self._ignored = [labels.ignored.astype(np.float32) for _, _, labels in kept]
        self._no_object = ""
        if not any(map(len, self._labels)):
            self._no_object = no_object(
                self.split, list(dict.fromkeys(entry.labels for entry, _, _ in kept)), len(kept)
            )


def _read_size_and_labels(entry: Entry, max_pixels: int) -> tuple[tuple[int, int], Annotations] | str:
    """The (height, width) and annotations of an image, or why its file cannot be read."""
    try:
        size = read_size(entry.image, max_pixels)
    except DataError as error:
        places = ", ".join(str(place) for place in dict.fromkeys(entry.sought))
        return f"{error}; looked for it at {places}" if places else str(error)
    return size, entry.read(size)


def _to_pixels(labels: NDArray[np.float32], width: float, height: float) -> Labels:
    """class, cx, cy, w, h (normalised) -> class, x1, y1, x2, y2 in pixels of an image of that size; a new array."""
    size, half, corners = np.array([width, height], dtype=np.float32), labels[:, 3:] / 2, labels.copy()
    corners[:, 1:3] = (labels[:, 1:3] - half) * size
    corners[:, 3:] = (labels[:, 1:3] + half) * size
    return corners


def _targets(labels: Labels, canvas_hw: tuple[int, int]) -> Tensor:
    """class, x1, y1, x2, y2 in pixels of a canvas -> float32 [n, 5]: class, cx, cy, w, h normalised to it."""
    cls, x1, y1, x2, y2 = labels.T
    height, width = canvas_hw
    scale = np.array([width, height, width, height], dtype=np.float32)
    boxes = np.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], axis=1) / scale
    return torch.from_numpy(np.concatenate([cls[:, None], boxes], axis=1))


def weigh_images(labels: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Weigh images so that classes are drawn alike: labels [n, 5] of each image -> probabilities [images], sum 1.

    An object weighs 1 / (number of objects of its class in all images), an image as much as its objects together;
    so all classes that occur have the same weight, however rare. An image without an object weighs as much as the mean
    of those that have one: the share of such images stays.
    """
    classes = [rows[:, 0].astype(np.int64) for rows in labels]
    counts = np.bincount(np.concatenate([np.zeros(0, np.int64), *classes]))
    weights: NDArray[np.float64] = np.array([(1 / counts[found]).sum() for found in classes])
    empty = np.array([len(found) == 0 for found in classes])
    if empty.any():
        weights[empty] = 1.0 if empty.all() else weights[~empty].mean()
    weights /= weights.sum()
    return weights
