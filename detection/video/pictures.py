"""Pictures on their way from a source to its annotated copy: what the network sees of them, and where to draw.

Videos are decoded, scaled and converted by FFmpeg's libraries through av, in one pass over luma and chroma, which is several
times cheaper than to convert first. It shrinks by averages of areas as `data.images.resize` does; from YUV, values differ by
about one in 255 on average.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.errors import DataError
from data.images import FILL, Canvas, read_image
from data.letterbox import Letterbox
from data.settings import MAX_PIXELS
from data.transfer import fetch

from .sources import MediaSource

if TYPE_CHECKING:
    import av

Plane = NDArray[np.uint8]
OPEN_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 10.0
"""For streams: how long to wait for a connection, and for the next piece."""
_NO_RATE = Fraction(30)
_LATE = 0.02
"""Share of a video's stated length by which its last frame may come early without being missed."""


class ImagePicture:
    """A decoded image file."""

    def __init__(self, source: MediaSource, pixels: Tensor) -> None:
        self.source, self.number, self.pixels = source, 0, pixels

    @property
    def size_hw(self) -> tuple[int, int]:
        return self.pixels.shape[1], self.pixels.shape[2]

    def letterboxed(self, canvas: Canvas) -> tuple[Tensor, Letterbox]:
        """uint8 [3, H, W] for the network, bit for bit as in the evaluation, and its geometry."""
        return canvas.letterbox(self.pixels)

    def planes(self) -> tuple[Plane, ...]:
        """Red, green and blue [H, W], to be drawn on."""
        pixels = self.pixels.permute(1, 2, 0).numpy()
        return tuple(pixels[..., channel] for channel in range(3))


class VideoPicture:
    """A decoded frame of a video; ``number`` counts the source's frames from 0."""

    def __init__(
        self, source: MediaSource, number: int, frame: av.VideoFrame, quarter_turns: int, info: VideoInfo
    ) -> None:
        self.source, self.number, self.quarter_turns, self.info = source, number, quarter_turns, info
        self.frame = frame

    @property
    def size_hw(self) -> tuple[int, int]:
        height, width = self.frame.height, self.frame.width
        return (width, height) if self.quarter_turns % 2 else (height, width)

    def letterboxed(self, canvas: Canvas) -> tuple[Tensor, Letterbox]:
        """uint8 [3, H, W] for the network, and its geometry."""
        geometry, (height, width), input_hw = canvas.place(self.size_hw)
        across, down = (height, width) if self.quarter_turns % 2 else (width, height)
        shrinks = across <= self.frame.width and down <= self.frame.height
        method = "AREA" if shrinks else "BILINEAR"
        # Planes, so that nothing is left to transpose.
        small = self.frame.reformat(across, down, "gbrp", interpolation=method, threads=1)
        image = np.full((3, *input_hw), FILL, dtype=np.uint8)
        top, left = geometry.top_px, geometry.left_px
        for channel, plane in zip((1, 2, 0), planes_of(small), strict=True):
            image[channel, top : top + height, left : left + width] = np.rot90(plane, self.quarter_turns)
        return torch.from_numpy(image), geometry

    @property
    def pixels(self) -> Tensor:
        """Upright, uint8 [3, H, W]."""
        turned = np.rot90(self.frame.to_ndarray(format="rgb24"), self.quarter_turns)
        return torch.from_numpy(turned.copy()).permute(2, 0, 1)

    def upright(self) -> av.VideoFrame:
        """The frame as a video file takes it, in memory of its own: upright, of 8 bits, luma and chroma apart."""
        import av

        format_name = drawable_format(self.size_hw)
        frame = self.frame
        if frame.format.name != format_name:
            frame = frame.reformat(format=format_name, threads=1)
        if self.quarter_turns:
            height, width = self.size_hw
            turned = av.VideoFrame(width, height, format_name)
            for plane, old in zip(planes_of(turned), planes_of(frame), strict=True):
                plane[:] = np.rot90(old, self.quarter_turns)
            turned.pts, turned.time_base = self.frame.pts, self.frame.time_base
            return turned
        frame.make_writable()  # the decoder may still refer to it
        return frame


Picture = ImagePicture | VideoPicture


def planes_of(frame: av.VideoFrame) -> tuple[Plane, ...]:
    """The planes [H, W] of a frame of 8 bits a value, which share its memory."""
    found = []
    for plane in frame.planes:
        rows = np.frombuffer(memoryview(plane), dtype=np.uint8)[: plane.height * plane.line_size]
        found.append(rows.reshape(plane.height, plane.line_size)[:, : plane.width])
    return tuple(found)


def drawable_format(size_hw: tuple[int, int]) -> str:
    """What all players show; it halves the resolution of colours, which odd sizes do not allow."""
    return "yuv444p" if any(side % 2 for side in size_hw) else "yuv420p"


@dataclass(frozen=True)
class VideoInfo:
    """What a video says of itself; ``frames`` 0 where it does not know, as streams and cameras do."""

    rate: Fraction
    time_base: Fraction
    frames: int
    colour: tuple[tuple[str, int], ...]
    """How luma and chroma stand for colours: the attributes of a codec that say so."""


def _image_of(where: str, max_pixels: int) -> Tensor:
    """An image's pixels, of a file or from an address."""
    if "://" not in where:
        return read_image(Path(where), max_pixels)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "image"
        fetch(where, file)
        try:
            return read_image(file, max_pixels)
        except DataError as error:
            raise DataError(str(error).replace(str(file), where)) from error


def read_pictures(source: MediaSource, vid_stride: int = 1, max_pixels: int = MAX_PIXELS) -> Iterator[Picture]:
    """An image, or every ``vid_stride``-th frame of a video; of a source that does not wait, always the newest.

    DataError where it cannot be opened or read; and at the end of a video that ends early or was damaged on the way, when all
    that could be read was given.
    """
    if source.is_image:
        yield ImagePicture(source, _image_of(source.where, max_pixels))
        return
    with _open(source) as container:
        if not container.streams.video:
            raise DataError(f"{source.where}: it has no pictures; expected an image or a video")
        reading = _Reading(source, container)
        if source.kind == "camera" or (source.kind == "stream" and container.duration is None):
            yield from _newest(reading.pictures(vid_stride))
            reading.check_line()
            return
        yield from reading.pictures(vid_stride)
        reading.check_end()


def _open(source: MediaSource) -> Any:
    """The container."""
    import av

    options: dict[str, Any] = {}
    if source.kind == "camera":
        options = {"format": "v4l2"}
    elif source.kind == "stream":
        options = {"timeout": (OPEN_TIMEOUT_S, READ_TIMEOUT_S)}
        if source.where.startswith("rtsp"):
            options["options"] = {"rtsp_transport": "tcp"}
    try:
        return av.open(source.where, **options)
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).strip().rstrip(".")
        text = {
            "camera": "the camera cannot be opened ({}); see which there are with ls /dev/video*, and that none uses it",
            "stream": "the stream cannot be opened ({}); check its address, and that it runs",
            "video": "neither an image nor a whole video ({}); restore or remove it",
        }[source.kind]
        raise DataError(f"{source.where}: {text.format(reason)}") from error


class _Reading:
    """A video's frames, and what went wrong on the way."""

    def __init__(self, source: MediaSource, container: Any) -> None:
        self.source, self.container = source, container
        self.stream = container.streams.video[0]
        self.stream.thread_type = "SLICE"  # threads by frames would cost memory and CPU that the network needs
        self.stream.codec_context.thread_count = 1
        rate = self.stream.average_rate or self.stream.guessed_rate or _NO_RATE
        self.duration_s = self._stated_s()
        self.info = VideoInfo(
            rate=rate,
            time_base=self.stream.time_base,
            frames=self.stream.frames or round((self.duration_s or 0) * rate),
            colour=tuple(
                (name, int(getattr(self.stream.codec_context, name)))
                for name in ("color_range", "colorspace", "color_primaries", "color_trc")
            ),
        )
        self.read, self.end_s, self.damage, self.broken = 0, 0.0, "", ""

    def pictures(self, vid_stride: int) -> Iterator[VideoPicture]:
        """Every so many frames."""
        for frame in self._frames():
            if self.read % vid_stride == 0:
                yield VideoPicture(self.source, self.read, frame, round(frame.rotation / 90) % 4, self.info)
            self.read += 1

    def check_end(self) -> None:
        """DataError for a video that ended early, or was damaged on the way."""
        early = False
        if self.duration_s is not None:
            early = self.end_s < (1 - _LATE) * self.duration_s - 2 / self.info.rate
        if self.damage or early:
            of = f" of {self.info.frames}" if self.info.frames else ""
            reason = f" ({self.damage})" if self.damage else ""
            raise DataError(
                f"{self.source.where}: {self.read}{of} frames could be read, the file is truncated or damaged{reason}; what "
                "could be read is written"
            )

    def check_line(self) -> None:
        """DataError for a camera or a stream that broke off; that it lost pieces on the way is its nature."""
        if self.broken:
            raise DataError(
                f"{self.source.where}: it broke off after {self.read} frames ({self.broken}); what could be read is written"
            )

    def _frames(self) -> Iterator[av.VideoFrame]:
        import av

        packets = self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except (av.FFmpegError, OSError) as error:
                self.damage = self.broken = str(error.strerror or error)
                yield from self._decoded(None)
                return
            yield from self._decoded(packet)

    def _decoded(self, packet: Any) -> Iterator[av.VideoFrame]:
        """The frames that a packet completes; None for those that the decoder still holds."""
        import av

        try:
            frames = self.stream.decode(packet)
        except av.FFmpegError as error:
            self.damage = str(error.strerror or error)
            return
        if packet is not None and packet.is_corrupt:
            self.damage = "a piece is not whole"
        for frame in frames:
            if self.container.format.name == "avi":
                frame.pts = None  # it knows the order of its pieces alone; at a constant rate
            time_s = self.read / self.info.rate if frame.time is None else frame.time - self._start_s
            self.end_s = max(self.end_s, float(time_s + 1 / self.info.rate))
            yield frame

    @property
    def _start_s(self) -> float:
        return float((self.stream.start_time or 0) * self.stream.time_base)

    def _stated_s(self) -> float | None:
        """How long the pictures last, where the file says so. The whole file's length may be that of its sound."""
        import av

        if self.stream.duration:
            return float(self.stream.duration * self.stream.time_base)
        if self.container.duration and not self.container.streams.audio:
            return float(self.container.duration / av.time_base)
        return None


def _newest(pictures: Iterator[VideoPicture]) -> Iterator[VideoPicture]:
    """The newest of pictures that come by themselves: who is slower than the source misses some, and does not lag."""
    came: SimpleQueue[VideoPicture | BaseException | None] = SimpleQueue()
    closed = threading.Event()

    def follow() -> None:
        try:
            for picture in pictures:
                if closed.is_set():
                    return
                came.put(picture)
            came.put(None)
        except BaseException as error:  # it is raised where it is waited for
            came.put(error)

    thread = threading.Thread(target=follow, name="newest picture", daemon=True)
    thread.start()
    try:
        while True:
            waiting = [came.get()]
            while not came.empty():
                waiting.append(came.get())
            yield from [picture for picture in waiting if isinstance(picture, VideoPicture)][-1:]
            last = waiting[-1]
            if isinstance(last, BaseException):
                raise last
            if last is None:
                return
    finally:
        closed.set()
        thread.join(timeout=2)
