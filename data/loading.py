"""Batches: collation, epoch-dependent order and sizes, and reproducible loading."""

from __future__ import annotations

import itertools
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from .dataset import DetectionDataset, Draw, Sample
from .errors import DataError
from .images import letterbox_of
from .letterbox import Letterbox


@dataclass
class Batch:
    """Samples side by side."""

    images: Tensor
    """uint8 [B, 3, H, W], channels last in memory"""
    targets: Tensor
    """float32 [M, 6]: position in the batch, class, cx, cy, w, h normalised"""
    image_ids: list[int]
    letterboxes: list[Letterbox | None]

    def pin_memory(self) -> Batch:
        """Called by the DataLoader when it pins."""
        return Batch(self.images.pin_memory(), self.targets.pin_memory(), self.image_ids, self.letterboxes)


def collate(samples: Sequence[Sample]) -> Batch:
    """Put samples of one size together into a batch."""
    positions = [sample.targets.new_full((len(sample.targets), 1), i) for i, sample in enumerate(samples)]
    targets = torch.cat([torch.cat([p, s.targets], dim=1) for p, s in zip(positions, samples, strict=True)])
    # Not torch.stack: it would change the memory format, and the network's input would have to change it back.
    shape = (len(samples), *samples[0].image.shape)
    images = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
    for image, sample in zip(images, samples, strict=True):
        image.copy_(sample.image)
    return Batch(images, targets, [s.image_id for s in samples], [s.letterbox for s in samples])


@dataclass(eq=False)
class EpochBatches(Sampler[list[Draw]]):
    """What each batch holds, and in which size; depends on (seed, the data set's epoch) alone.

    Ranks take equal disjoint shares of one order. It is continued from its start until it divides evenly, so that all
    take equally many steps. A data set with image weights is shuffled by drawing as many images with replacement.
    """

    dataset: DetectionDataset
    batch_size: int
    shuffle: bool
    seed: int = 0
    drop_last: bool = False
    rank: int = 0
    num_ranks: int = 1
    sizes_px: Sequence[int] = ()
    """Each batch of augmented samples is drawn at one of these sizes, the same on all ranks."""
    rect_stride_px: int | None = None
    """Images in order of their shape, each batch on a canvas of multiples of this stride that leaves at least half a stride
    of grey along both sides together, as in YOLOv5: detectors find cut objects better beside a border."""
    canvas_hw: tuple[int, int] | None = None
    """Every image on a canvas of this height and width, as large as fits."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.seed < 0:
            raise DataError(f"batch size {self.batch_size}, seed {self.seed}: expected at least 1 and at least 0")
        plain = self.dataset.augment is None
        assert 0 <= self.rank < self.num_ranks
        assert not self.sizes_px or (not plain and min(self.sizes_px) >= 1), "sizes are for augmented samples"
        if self.rect_stride_px is not None or self.canvas_hw is not None:
            assert plain and not self.shuffle, "rectangles and canvases are for evaluation"
            assert self.rect_stride_px is None or (self.rect_stride_px >= 1 and self.canvas_hw is None)
            assert self.canvas_hw is None or min(self.canvas_hw) >= 1

    def __len__(self) -> int:
        share = self._share()
        return share // self.batch_size if self.drop_last else -(-share // self.batch_size)

    def __iter__(self) -> Iterator[list[Draw]]:
        seen: defaultdict[int, Iterator[int]] = defaultdict(itertools.count)
        mine = [(index, next(seen[index])) for index in self._order().tolist()][self.rank :: self.num_ranks]
        for number in range(len(self)):
            members = mine[number * self.batch_size : (number + 1) * self.batch_size]
            canvas_hw = self._canvas(number, [index for index, _ in members])
            yield [Draw(index, canvas_hw, turn) for index, turn in members]

    def _share(self) -> int:
        return -(-len(self.dataset) // self.num_ranks)

    def _order(self) -> NDArray[np.int64]:
        """Indices of all ranks."""
        count, total = len(self.dataset), self._share() * self.num_ranks
        if self.shuffle:
            rng = np.random.default_rng((self.seed, self.dataset.epoch))
            if self.dataset.image_weights:
                return self.dataset.draw_indices(total, rng)
            order = rng.permutation(count)
        elif self.rect_stride_px is not None:
            shapes = (self.dataset.original_hw(i) for i in range(count))
            order = np.argsort([height / width for height, width in shapes], kind="stable")
        else:
            order = np.arange(count)
        return np.resize(order, total)

    def _canvas(self, number: int, indices: Sequence[int]) -> tuple[int, int] | None:
        if self.sizes_px:
            # The last word keeps this generator apart from those of the samples.
            rng = np.random.default_rng((self.seed, self.dataset.epoch, number, 0, 1))
            size_px = self.sizes_px[int(rng.integers(len(self.sizes_px)))]
            return size_px, size_px
        if self.rect_stride_px is not None:
            stride = self.rect_stride_px
            resized = [letterbox_of(self.dataset.original_hw(i), self.dataset.image_size_px)[1] for i in indices]
            height, width = (math.ceil(max(sides) / stride + 0.5) * stride for sides in zip(*resized, strict=True))
            return height, width
        return self.canvas_hw


class BatchLoader(DataLoader[Sample]):
    """A DataLoader whose workers' DataErrors arrive as they were raised, in one line.

    torch gives the exception's type back with a traceback for its message.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names its own iterators
        try:
            yield from super().__iter__()
        except DataError as error:
            last = str(error).strip().splitlines()[-1]
            raise DataError(last.removeprefix(f"{DataError.__module__}.DataError: ")) from error


def build_loader(
    dataset: DetectionDataset,
    batch_size: int,
    shuffle: bool,
    workers: int = 0,
    seed: int = 0,
    drop_last: bool = False,
    **options: Any,
) -> DataLoader[Sample]:
    """Make a loader of ``Batch``es that are the same for any number of workers; call ``dataset.set_epoch`` before each pass.

    Args:
        dataset: the images.
        batch_size: images at once.
        shuffle: in an order that the seed and the epoch decide.
        workers: processes that load, each with one thread. They stay alive between passes, and leave signals to the main
            process, which ends them.
        seed: at least 0.
        drop_last: leave out a last batch that is not full.
        options: the other fields of ``EpochBatches``, about ranks and sizes.

    Raises:
        DataError: batch size, seed or workers are out of range.

    >>> import tempfile
    >>> from data import DetectionDataset, load_data_config, make_shapes
    >>> with tempfile.TemporaryDirectory() as root:
    ...     make_shapes(f"{root}/shapes", train=4, val=1, test=1, image_size_px=32)
    ...     dataset = DetectionDataset(load_data_config("data/shapes.yaml", root), "train", image_size_px=64)
    ...     batch = next(iter(build_loader(dataset, batch_size=2, shuffle=False)))
    >>> batch.images.shape, batch.images.dtype, batch.targets.shape[1]
    (torch.Size([2, 3, 64, 64]), torch.uint8, 6)
    """
    if workers < 0:
        raise DataError(f"{workers} workers: expected at least 0")
    return BatchLoader(
        dataset,
        batch_sampler=EpochBatches(dataset, batch_size, shuffle, seed, drop_last, **options),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_set_up_worker,
        generator=torch.Generator().manual_seed(seed),
    )


def _set_up_worker(worker: int) -> None:
    # Ctrl-C and torchrun's SIGTERM reach all processes of a group, and a run that ends politely needs its workers.
    os.setpgrp()
    # One thread each, as torch has there; OpenCV's own would not survive the fork.
    cv2.setNumThreads(0)


def multi_scale_sizes(image_size_px: int, stride_px: int) -> tuple[int, ...]:
    """List the multiples of the largest stride from half of the image size to one and a half of it, all in pixels.

    DataError if there is none but the image size itself.

    >>> multi_scale_sizes(96, 32)
    (64, 96, 128)
    """
    first, last = max(1, math.ceil(image_size_px / 2 / stride_px)), math.floor(image_size_px * 1.5 / stride_px)
    sizes = tuple(stride_px * k for k in range(first, last + 1))
    if len(sizes) < 2:
        raise DataError(
            f"multi-scale: image size {image_size_px} leaves no multiple of the stride {stride_px} to choose from between "
            f"half and one and a half of it; expected at least {2 * stride_px}"
        )
    return sizes
