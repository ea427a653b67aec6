"""What exported files have in common: one input of images, one output, run on the CPU outside of torch's eager mode."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from slim import SlimError

INPUT = "images"
OUTPUT = "output0"


class ExportedNetwork(nn.Module):
    """A file as a module: images in, float32 out.

    Images are float 0..1 or uint8, [B, 3, H, W]; whichever the file takes (``takes_bytes``), the other is converted. A
    file of a fixed number of images runs any number of them, in turns. Any number of threads may call it.

    ``precision`` is what it computes in: ``float32``, ``bfloat16``, or ``int8`` where a part of it is quantised.
    ``metadata``: what the file says of itself. ``input_shape``: [B, 3, H, W], None for what is free.
    """

    engine: ClassVar[str]

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, str],
        input_shape: tuple[int | None, ...],
        *,
        takes_bytes: bool,
        precision: str,
    ) -> None:
        super().__init__()
        if len(input_shape) != 4:
            raise SlimError(
                f"{path}: its input has {len(input_shape)} axes, expected images as [batch, channels, height, width]"
            )
        self.path, self.metadata, self.input_shape = path, dict(metadata), input_shape
        self.takes_bytes, self.precision = takes_bytes, precision

    def run(self, images: Tensor) -> Tensor:
        """Images exactly as the file takes them: its type, its shape."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        self.check_size(images)
        if images.dtype == torch.uint8:
            prepared = images if self.takes_bytes else images / 255
        else:
            prepared = as_bytes(images) if self.takes_bytes else images.float()
        at_once, count = self.input_shape[0], len(prepared)
        if at_once is None or at_once == count:
            return self.run(prepared.contiguous())
        missing = -count % at_once
        padded = torch.cat([prepared, prepared[-1:].expand(missing, -1, -1, -1)]) if missing else prepared
        return torch.cat([self.run(part.contiguous()) for part in padded.split(at_once)])[:count]

    def check_size(self, images: Tensor) -> None:
        """SlimError for images of a size that the file does not take."""
        wanted, given = self.input_shape[1:], tuple(images.shape[1:])
        if images.ndim != 4 or any(a is not None and a != b for a, b in zip(wanted, given, strict=True)):
            raise SlimError(
                f"{self.path}: images of {size_text(given)} were given, expected {size_text(wanted)}; choose that size, or "
                "export with the one that you want or with --dynamic"
            )

    @property
    def bytes_on_disk(self) -> int:
        """Of all of its files."""
        return sum(part.stat().st_size for part in parts_of(self.path))


def parts_of(path: Path) -> list[Path]:
    """The files of an exported network: OpenVINO keeps the weights beside the graph."""
    return [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]


def as_bytes(images: Tensor) -> Tensor:
    """Float 0..1 -> uint8 0..255."""
    return (images * 255).round().to(torch.uint8)


def existing(path: str | Path, kind: str) -> Path:
    """A file that is there."""
    path = Path(path)
    for part in parts_of(path):
        if not part.is_file():
            raise SlimError(f"{part}: no such file; expected {kind}, such as export.py writes")
    return path


@contextmanager
def torch_threads(count: int = 0) -> Iterator[None]:
    """So many threads for torch in the whole process, 0: as many as it has; at the end of the block those from before."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def size_text(sizes: tuple[int | None, ...]) -> str:
    return " x ".join("any" if size is None else str(size) for size in sizes)


def threads_of(num_cores: int) -> int:
    """The number of threads for ``num_cores``, of which 0 stands for all that this process may use."""
    if num_cores < 0:
        raise SlimError(f"--num-cores {num_cores}: expected 0 (all) or more")
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return num_cores or own


def read_list(metadata: Mapping[str, str], key: str) -> list[int]:
    """A list of whole numbers in the metadata; empty where there is none."""
    try:
        return [int(number) for number in json.loads(metadata.get(key, "[]"))]
    except (ValueError, TypeError):
        return []
