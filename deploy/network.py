"""A network under an engine: one input of images, one output."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, get_args

import numpy as np
import torch
from torch import Tensor, nn

from slim import SlimError

from .profiling import LayerTime
from .settings import Engine

INPUT, OUTPUT = "images", "output0"
ENGINES: tuple[Engine, ...] = get_args(Engine)


class EngineNetwork(nn.Module):
    """A network that an engine runs, as a module: images in, float32 out.

    Images are float 0..1 or uint8, [B, 3, H, W]; whichever the network takes (``takes_bytes``), the other is converted. A
    file of a fixed number of images runs any number of them, one batch after another. Any number of threads may call it.

    Attributes:
        path: the file, an exported one or a checkpoint
        bytes_on_disk: the size of all of its files together, of a checkpoint without training state
        metadata: what the file says of itself
        input_shape: [B, 3, H, W], None for an axis of any size
        takes_bytes: whether the file takes uint8
        precision: what it computes in: ``float32``, ``bfloat16``, or ``int8`` where a part of it is quantised
        columns: the size of its output's last axis, None where the file does not say
        warning: what a user must know of this file on this CPU; '' if nothing
    """

    engine: ClassVar[Engine]
    warning: str = ""

    @property
    def device(self) -> torch.device:
        """Where its images belong."""
        return torch.device("cpu")

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, str],
        input_shape: tuple[int | None, ...],
        *,
        takes_bytes: bool,
        precision: str,
        columns: int | None = None,
    ) -> None:
        super().__init__()
        if len(input_shape) != 4:
            raise SlimError(
                f"{path}: its input has {len(input_shape)} axes, expected images as [batch, channels, height, width]"
            )
        self.path, self.metadata, self.input_shape = path, dict(metadata), input_shape
        self.takes_bytes, self.precision, self.columns = takes_bytes, precision, columns
        self.bytes_on_disk = sum(part.stat().st_size for part in parts_of(path) if part.is_file())

    def run(self, images: Tensor) -> Tensor:
        """The output for images of exactly the type and shape that the file takes."""
        raise NotImplementedError

    def layer_times(self, images: Tensor, runs: int) -> list[list[LayerTime]]:
        """The operators of each of several runs on ``images``, by the engine's own clock; none where it has none."""
        return []

    def forward(self, images: Tensor) -> Tensor:
        self.check_size(images)
        images = self.as_taken(images)
        at_once, count = self.input_shape[0], len(images)
        if at_once is None or at_once == count:
            return self.run(images.contiguous())
        missing = -count % at_once
        padded = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)]) if missing else images
        return torch.cat([self.run(part.contiguous()) for part in padded.split(at_once)])[:count]

    def as_taken(self, images: Tensor) -> Tensor:
        """Images, float 0..1 or uint8, in the type that the file takes."""
        if images.dtype == torch.uint8:
            return images if self.takes_bytes else as_floats(images)
        return as_bytes(images) if self.takes_bytes else images.float()

    def one_batch(self, images: Tensor) -> Tensor:
        """As many images as the file takes at once, the first ones again where there are too few."""
        count = self.input_shape[0] or len(images)
        return self.as_taken(images)[torch.arange(count) % len(images)].contiguous()

    def check_size(self, images: Tensor) -> None:
        """Raise SlimError for images of a size that the file does not take."""
        wanted, given = self.input_shape[1:], tuple(images.shape[1:])
        if images.ndim != 4 or any(a is not None and a != b for a, b in zip(wanted, given, strict=True)):
            raise SlimError(
                f"{self.path}: images of {size_text(given)} were given, expected {size_text(wanted)}; choose that size, or "
                "export with the one that you want or with --dynamic"
            )


def parts_of(path: Path) -> list[Path]:
    """The files of an exported network: OpenVINO keeps the weights beside the graph."""
    return [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]


def digest_file(path: Path) -> Path:
    """Where an export leaves the SHA-256 of a file that is a program, as sha256sum writes it."""
    return path.with_name(f"{path.name}.sha256")


def files_of(path: Path) -> list[Path]:
    """``parts_of``, and what an export leaves beside them."""
    return [*parts_of(path), *(file for file in [digest_file(path)] if file.is_file())]


def index_of_boxes(path: Path, shapes: Sequence[tuple[int | None, ...]]) -> int:
    """Which of a file's outputs holds the boxes, [batch, boxes, 5 + classes]: a lone one, or the one of three axes.

    Exports of others also give the maps that boxes are decoded from, [batch, anchors, rows, columns, 5 + classes].
    """
    found = [0] if len(shapes) == 1 else [index for index, shape in enumerate(shapes) if len(shape) == 3]
    if len(found) != 1:
        raise SlimError(
            f"{path}: its outputs are {', '.join(map(size_text, shapes)) or 'none'}; expected one of batch x boxes x "
            "(5 + classes), as export.py and YOLOv5's own export write"
        )
    return found[0]


def as_floats(images: Tensor) -> Tensor:
    """Convert uint8 0..255 to float 0..1, on a CPU by NumPy, in half of torch's time."""
    if images.device.type != "cpu":
        return images / 255
    return torch.from_numpy(np.divide(images.numpy(), np.float32(255), dtype=np.float32))


def as_bytes(images: Tensor) -> Tensor:
    """Convert float 0..1 to uint8 0..255."""
    return (images * 255).round().to(torch.uint8)


def existing(path: str | Path, kind: str) -> Path:
    """The path of a network whose files are all there; SlimError names the one that is missing."""
    path = Path(path)
    for part in parts_of(path):
        if not part.is_file():
            raise SlimError(f"{part}: no such file; expected {kind}, such as export.py writes")
    return path


@contextmanager
def whole_or_nothing(path: Path) -> Iterator[Path]:
    """Give a temporary path; what the block writes there becomes ``path``, with all of its parts, if the block succeeds."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
            temporary = Path(folder) / path.name
            yield temporary
            # The graph comes last: it is what others look for. Whoever dies in between leaves halves that do not fit each
            # other, which whoever opens them finds by the digest that one has of the other.
            for made in reversed(files_of(temporary)):
                with made.open("rb+") as file:
                    os.fsync(file.fileno())
                made.replace(path.with_name(made.name))
    except OSError as error:
        raise SlimError(
            f"{path}: cannot be written ({error.strerror or error}); the previous file, if any, is untouched; free disk "
            "space or choose another folder"
        ) from error


@contextmanager
def torch_threads(count: int = 0) -> Iterator[None]:
    """Set torch's threads for the whole process, 0 leaves them; at the end of the block those from before return."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def size_text(sizes: tuple[int | None, ...]) -> str:
    """Axes as a user reads them, ``1 x 3 x any x any``."""
    return " x ".join("any" if size is None else str(size) for size in sizes)


def threads_of(num_cores: int) -> int:
    """The number of threads for ``--num-cores``, of which 0 stands for all cores that this process may use."""
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
