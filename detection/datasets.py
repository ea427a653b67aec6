"""A data set as this project's scripts mean it: opened by its flags, and images of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data import Augment, DataConfig, DetectionDataset, build_loader, find_root, load_data_config, make_shapes
from data.download import download_data
from data.sampling import Draw

from .command import RunFlags, flag

SHAPES = {"train": 400, "val": 120, "test": 120, "image_size_px": 160, "seed": 0}


@dataclass(frozen=True)
class DataFlags(RunFlags):
    """What every script takes that reads a data set."""

    data: str = flag("data/bccd.yaml", "data set description (a YOLOv5 data.yaml)")
    download: bool = flag(False, "fetch the data set first where it is missing, as its yaml's download key says")
    data_root: str | None = flag(None, "folder of data sets; else $SLIM_DATA_ROOT, else ./datasets")
    classes: list[int | str] = flag([], "names or numbers of the classes to look at, in their new order; else all")  # noqa: RUF009
    single_cls: bool = flag(False, "all classes as one, named object")

    def open_data(self) -> DataConfig:
        """The data set that the flags describe."""
        return open_data(
            self.data, self.data_root, download=self.download, classes=self.classes, single_cls=self.single_cls
        )


def open_data(
    data: str,
    data_root: str | None,
    *,
    download: bool = False,
    classes: Sequence[int | str] = (),
    single_cls: bool = False,
) -> DataConfig:
    """A data set's description, of some of its classes or of all as one where that is asked.

    Synthetic shapes are drawn first where they are not there yet, with ``download`` others are fetched (progress is printed).
    """
    if Path(data).stem == "shapes":
        make_shapes(find_root(data_root) / "shapes", **SHAPES)
    elif download:
        download_data(data, data_root)
    config = load_data_config(data, data_root)
    config = config.select(classes) if classes else config
    return config.single() if single_cls else config


def data_digest(config: DataConfig, split: str, img: int) -> str:
    """`DetectionDataset.digest` of a split; no pixel is decoded."""
    return DetectionDataset(config, split, img, cache="none").digest()


def training_images(config: DataConfig, img: int, batch_size: int, batches: int, seed: int) -> Iterator[Tensor]:
    """Shuffled training images, augmented as in training: float [B, 3, img, img]."""
    dataset = DetectionDataset(config, "train", img, Augment(), seed)
    for batch in itertools.islice(build_loader(dataset, batch_size, shuffle=True, seed=seed), batches):
        yield batch.images.float() / 255


def real_images(dataset: DetectionDataset, count: int, canvas_hw: tuple[int, int] | None = None) -> Tensor:
    """The first images as a network input, float [count, 3, img, img], or of the height and width of ``canvas_hw``."""
    count = min(count, len(dataset))
    return torch.stack([dataset[Draw(i, canvas_hw)].image for i in range(count)]).float() / 255


def so_many_images(dataset: DetectionDataset, count: int, sides_px: tuple[int, int]) -> Tensor:
    """As ``real_images``, again from the first where there are too few."""
    found = real_images(dataset, count, sides_px)
    return found[torch.arange(count) % len(found)]
