"""A data set as this project's scripts mean it: opened by its settings, and images of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from data import Augment, DataConfig, DataError, DataSettings, DetectionDataset, build_loader, load_data_config
from data.dataset import Draw
from data.download import download_missing
from data.shapes import make_described_shapes


def open_data(settings: DataSettings) -> DataConfig:
    """Read the description of a data set, where it says so after drawing or fetching the images.

    A synthetic set (``make_described_shapes``) is drawn first unless it is there already; with ``download`` others are
    fetched, with progress printed. DataError where the description, or the data that it describes, cannot be used.
    """
    if settings.data is None:
        raise DataError("--data: none given; name the description of a data set, such as data/bccd.yaml")
    if not make_described_shapes(settings.data, settings.data_root) and settings.download:
        download_missing(settings.data, settings.data_root)
    config = load_data_config(settings.data, settings.data_root)
    config = replace(config, max_pixels=settings.images.max_pixels)
    config = config.select(settings.classes) if settings.classes else config
    return config.single() if settings.single_cls else config


def data_digest(config: DataConfig, split: str, img: int) -> str:
    """`DetectionDataset.digest` of a split; no pixel is decoded."""
    return DetectionDataset(config, split, img, cache="none").digest()


def training_batches(
    config: DataConfig, img: int, batch_size: int, *, seed: int, augment: Augment, labelled: bool = False
) -> Iterator[Any]:
    """Shuffled and augmented batches of the training split; with ``labelled`` DataError where it holds no object."""
    dataset = DetectionDataset(config, "train", img, augment, seed)
    if labelled:
        dataset.check_objects()
    return iter(build_loader(dataset, batch_size, shuffle=True, seed=seed))


def real_images(dataset: DetectionDataset, count: int, canvas_hw: tuple[int, int] | None = None) -> Tensor:
    """The first images as a network input, float [count, 3, img, img], or of the height and width of ``canvas_hw``."""
    count = min(count, len(dataset))
    return torch.stack([dataset[Draw(i, canvas_hw)].image for i in range(count)]).float() / 255


def so_many_images(dataset: DetectionDataset, count: int, sides_px: tuple[int, int]) -> Tensor:
    """As ``real_images``, again from the first where there are too few."""
    found = real_images(dataset, count, sides_px)
    return found[torch.arange(count) % len(found)]
