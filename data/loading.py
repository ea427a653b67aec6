"""Batches: collation, epoch-dependent order and reproducible loading."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from boxes import Letterbox

from .dataset import DetectionDataset, Sample
from .errors import DataError


@dataclass
class Batch:
    """Samples side by side."""

    images: Tensor
    """uint8 [B, 3, S, S]"""
    targets: Tensor
    """float32 [M, 6]: position in the batch, class, cx, cy, w, h normalised"""
    image_ids: list[int]
    letterboxes: list[Letterbox | None]

    def pin_memory(self) -> Batch:
        """Called by the DataLoader when it pins."""
        return Batch(self.images.pin_memory(), self.targets.pin_memory(), self.image_ids, self.letterboxes)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one size."""
    positions = [sample.targets.new_full((len(sample.targets), 1), i) for i, sample in enumerate(samples)]
    targets = torch.cat([torch.cat([p, s.targets], dim=1) for p, s in zip(positions, samples, strict=True)])
    images = torch.stack([sample.image for sample in samples])
    return Batch(images, targets, [s.image_id for s in samples], [s.letterbox for s in samples])


class EpochSampler(Sampler[int]):
    """Indices in an order that depends on (seed, the data set's epoch) alone; for ranks, equal disjoint shares of it.

    With several ranks the order is continued from its start until it divides evenly, so that all take equally many steps.
    """

    def __init__(
        self, dataset: DetectionDataset, shuffle: bool, seed: int = 0, rank: int = 0, num_ranks: int = 1
    ) -> None:
        self.dataset, self.shuffle, self.seed, self.rank, self.num_ranks = dataset, shuffle, seed, rank, num_ranks

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.num_ranks)

    def __iter__(self) -> Iterator[int]:
        count = len(self.dataset)
        rng = np.random.default_rng((self.seed, self.dataset.epoch))
        order = rng.permutation(count) if self.shuffle else np.arange(count)
        return iter(np.resize(order, len(self) * self.num_ranks)[self.rank :: self.num_ranks].tolist())


class BatchLoader(DataLoader[Sample]):
    """A DataLoader whose workers' DataErrors arrive as they were raised, in one line.

    torch gives the exception's type back with a traceback for its message.
    """

    def __iter__(self) -> Iterator[Any]:
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
    *,
    rank: int = 0,
    num_ranks: int = 1,
) -> DataLoader[Sample]:
    """A loader of ``Batch`` whose content depends on (seed, epoch) and not on ``workers``.

    Call ``dataset.set_epoch`` before each pass. Workers (processes) stay alive between passes and use one thread each.
    """
    if batch_size < 1 or workers < 0:
        raise DataError(f"batch size {batch_size} and {workers} workers: expected at least 1 and at least 0")
    if not 0 <= rank < num_ranks or seed < 0:
        raise DataError(f"rank {rank} of {num_ranks}, seed {seed}: expected 0 <= rank < ranks and a seed of at least 0")
    return BatchLoader(
        dataset,
        batch_size=batch_size,
        sampler=EpochSampler(dataset, shuffle, seed, rank, num_ranks),
        num_workers=workers,
        collate_fn=collate,
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(seed),
    )
