"""Videos made for tests, and what is wrong with some of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from data.shapes import draw_scene

SIZE_HW = (96, 128)
_COLOURS = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4")


def draw_frames(count: int, size_hw: tuple[int, int], seed: int = 0) -> Iterator[NDArray[np.uint8]]:
    """RGB uint8 [H, W, 3]: squares and circles on closed paths, one loop in about four seconds at 25 frames a second."""
    height, width = size_hw
    rng = np.random.default_rng(seed)
    scene, _ = draw_scene(max(size_hw), rng)
    behind = np.ascontiguousarray(scene[:height, :width])
    paths = rng.uniform(0, 2 * math.pi, size=(len(_COLOURS), 2))
    radii = rng.uniform(0.06, 0.12, size=len(_COLOURS)) * min(size_hw)
    for number in range(count):
        picture = Image.fromarray(behind)
        canvas = ImageDraw.Draw(picture)
        turn = 2 * math.pi * number / 100
        for index, ((phase_x, phase_y), radius) in enumerate(zip(paths, radii, strict=True)):
            x = width * (0.5 + 0.38 * math.sin(turn * (1 + index % 2) + phase_x))
            y = height * (0.5 + 0.38 * math.sin(turn + phase_y))
            draw = canvas.ellipse if index % 2 else canvas.rectangle
            draw((x - radius, y - radius, x + radius, y + radius), fill=_COLOURS[index])
        yield np.asarray(picture)


def write_video(path: Path, frames: int, size_hw: tuple[int, int], rate: int = 25, seed: int = 0) -> None:
    """Write ``draw_frames`` as a video of the kind that the suffix names."""
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream("libx264" if "libx264" in av.codecs_available else "mpeg4", rate=Fraction(rate))
        stream.height, stream.width, stream.pix_fmt = *size_hw, "yuv420p"
        for pixels in draw_frames(frames, size_hw, seed):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


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
