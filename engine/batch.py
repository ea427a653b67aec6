"""What the engine expects from a data loader, and how images enter a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Letterbox(Protocol):
    """How an image was resized and padded to what the network sees."""

    def to_original(self, boxes_xyxy: Tensor) -> Tensor:
        """[n, 4] pixels of the network's input -> [n, 4] pixels of the original image."""
        ...


class Batch(Protocol):
    """One step's images and labels.

    images: uint8 [B, 3, H, W]; targets: float [M, 6] of image in the batch, class, cx, cy, w, h (0..1 of the
    network's input); one id and one letterbox (None where the image was not resized) for each image.
    """

    @property
    def images(self) -> Tensor: ...

    @property
    def targets(self) -> Tensor: ...

    @property
    def image_ids(self) -> Sequence[int]: ...

    @property
    def letterboxes(self) -> Sequence[Letterbox | None]: ...


def network_input(images: Tensor, device: torch.device, *, channels_last: bool) -> Tensor:
    """uint8 [B, 3, H, W] on any device -> float32 0..1 on `device`."""
    images = images.to(device, non_blocking=True).float().div_(255)
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images
