"""Videos made for tests, and what is wrong with some of them."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from data.moving_shapes import write_video

SIZE_HW = (96, 128)


def short_video(path: Path, frames: int = 40, size_hw: tuple[int, int] = SIZE_HW) -> Path:
    """Moving shapes at 25 frames a second."""
    write_video(path, frames, size_hw)
    return path


def cut_short(path: Path, share: float, out: Path) -> Path:
    """A copy of a part of its bytes, from the first on."""
    content = path.read_bytes()
    out.write_bytes(content[: int(len(content) * share)])
    return out


def decoded(path: Path) -> list[NDArray[np.uint8]]:
    """All frames, RGB [H, W, 3]."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
