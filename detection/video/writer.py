"""What is found, on disk: annotated images in their own format, videos as MP4, detections as text and JSON."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from PIL import Image
from torch import Tensor

from data.errors import DataError
from slim import SlimError, write_text_atomically

from .pictures import VideoInfo, drawable_format

if TYPE_CHECKING:
    import av

_CODECS = (
    ("libx264", {"preset": "ultrafast", "qp": "22"}),
    ("libopenh264", {"b": "8M"}),
    ("mpeg4", {"qmin": "2", "qmax": "5"}),
)
"""The first one that this build of av has. On few cores the time of the encoder is the network's: ultrafast, and one
quantiser for all, since to choose them costs a quarter more."""
_SECONDS_TO_LOSE = 2
"""Of a video whose writer was killed: as often it is made playable up to there."""
_QUALITY = {".webp": 90}
"""Of 100, where it is not 95; formats without loss do not look at it."""


def write_image(pixels: Tensor, path: Path) -> None:
    """uint8 [3, H, W] as a file of the kind that the suffix names; DataError if it cannot be written."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    try:
        picture.save(path, quality=_QUALITY.get(path.suffix.lower(), 95))
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); free disk space") from error


class VideoWriter:
    """An MP4 file that grows frame by frame, as long as the frames came: H.264 where av has an encoder of it.

    ``encoder``: the name of one of FFmpeg's encoders, and its options as KEY=VALUE; ``check_encoder`` says whether it works.

    It plays up to the last two seconds or so even when the process is killed, and whole once it is closed. Frames keep
    their times; those of another size than the first one's are scaled to it.
    """

    def __init__(
        self, path: Path, size_hw: tuple[int, int], info: VideoInfo, vid_stride: int = 1, encoder: Sequence[str] = ()
    ) -> None:
        import av

        self.path, self.size_hw, self.frames = path, size_hw, 0
        self.format = drawable_format(size_hw)
        codec, settings = (
            (encoder[0], dict(option.split("=", 1) for option in encoder[1:]))
            if encoder
            else next(known for known in _CODECS if known[0] in av.codecs_available)
        )
        rate = info.rate / vid_stride
        # A fragment at each key frame, put together to a plain MP4 at the end.
        options = {"movflags": "hybrid_fragmented", "flush_packets": "1"}
        self.container = av.open(str(path), "w", format="mp4", container_options=options)
        self.stream = cast(Any, self.container.add_stream(codec, rate=rate))
        self.stream.height, self.stream.width = size_hw
        taken = [kind.name for kind in av.Codec(codec, "w").video_formats or ()]
        self.stream.pix_fmt = self.format if self.format in taken or not taken else taken[0]  # av converts
        self.stream.options = settings
        context = self.stream.codec_context
        context.thread_count = 1
        context.gop_size = max(1, round(_SECONDS_TO_LOSE * rate))
        context.time_base = info.time_base if info.time_base > 0 else 1 / rate
        for name, value in info.colour:
            setattr(context, name, value)
        self.step = int(max(1, round(1 / rate / context.time_base)))
        self.first: int | None = None
        self.last = -self.step

    def write(self, frame: av.VideoFrame) -> None:
        """A frame of the format and with the time base of the video; DataError if the disk does not take it."""
        height, width = self.size_hw
        if (frame.height, frame.width, frame.format.name) != (height, width, self.format):
            time, base = frame.pts, frame.time_base
            frame = frame.reformat(width, height, self.format, threads=1)
            frame.pts, frame.time_base = time, base
        frame.pts = self.last = self._time_of(frame)
        frame.time_base = self.stream.codec_context.time_base
        frame.pict_type = 0  # the encoder's to choose, not what the source had
        self._mux(frame)
        self.frames += 1

    def close(self) -> None:
        """Write what the encoder still holds, and finish the file."""
        try:
            if self.frames:
                self._mux(None)
        finally:
            self.container.close()

    def _time_of(self, frame: av.VideoFrame) -> int:
        """Its own time after the first one's; a step after the last one's where it has none or goes back."""
        if frame.pts is None:
            return self.last + self.step
        own = int(frame.pts)
        if frame.time_base and frame.time_base != self.stream.codec_context.time_base:
            own = round(Fraction(own) * frame.time_base / self.stream.codec_context.time_base)
        if self.first is None:
            self.first = own - (self.last + self.step)  # the first ones may have had no time
        return own - self.first if own - self.first > self.last else self.last + self.step

    def _mux(self, frame: av.VideoFrame | None) -> None:
        import av

        try:
            for packet in self.stream.encode(frame):
                self.container.mux(packet)
        except (av.FFmpegError, OSError) as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror or error}); free disk space") from error


def check_encoder(encoder: Sequence[str]) -> None:
    """Write a frame with it; SlimError where av has no such encoder, or the machine not what it needs."""
    import av

    try:
        with TemporaryDirectory() as folder:
            writer = VideoWriter(
                Path(folder) / "try.mp4", (256, 256), VideoInfo(Fraction(25), Fraction(1, 25), 0, ()), 1, encoder
            )
            writer.write(av.VideoFrame(256, 256, writer.format))
            writer.close()
            unknown = ", ".join(writer.stream.codec_context.options)
            if unknown:
                raise ValueError(f"no option {unknown}")
    except (av.FFmpegError, ValueError, DataError) as error:
        raise SlimError(
            f"--encoder {' '.join(encoder)}: it does not work here ({error.__cause__ or error}); expected an encoder of FFmpeg's "
            "that this machine has, and its options as KEY=VALUE, or none for the quickest of CPUs"
        ) from error


def stem_of(name: str, frame: int | None) -> str:
    """Of what is written of a picture: a source's name, and of a video's frame (from 0) also its number, from 1."""
    return name if frame is None else f"{name}_{frame + 1}"


def write_crops(folder: Path, name: str, rows: Sequence[Sequence[float]], names: Sequence[str], pixels: Tensor) -> None:
    """Each detection of a picture as CLASS/NAME.jpg in a folder, further ones of its class as NAME2.jpg, NAME3.jpg ...

    As YOLOv5 cuts them out: 2 % and 10 pixels wider and higher than the box, as far as the picture goes.
    """
    height, width = pixels.shape[1:]
    for x1, y1, x2, y2, _, kind in rows:
        half_w, half_h = (1.02 * (x2 - x1) + 10) / 2, (1.02 * (y2 - y1) + 10) / 2
        (left, right), (top, bottom) = (
            (max(0, int(middle - half)), min(size, int(middle + half)))
            for middle, half, size in (((x1 + x2) / 2, half_w, width), ((y1 + y2) / 2, half_h, height))
        )
        of_class = folder / (re.sub(r'[\\/:*?"<>|\0-\x1f]', "_", names[int(kind)]).strip(". ") or "_")
        of_class.mkdir(parents=True, exist_ok=True)
        numbers = itertools.chain([""], itertools.count(2))
        free = (path for number in numbers if not (path := of_class / f"{name}{number}.jpg").exists())
        write_image(pixels[:, top:bottom, left:right], next(free))


class DetectionFiles:
    """``labels/NAME.txt`` (of videos ``NAME_FRAME.txt``, from 1) and ``detections.json`` in a folder, each where asked for.

    A line of text is class, centre x, centre y, width, height, normalised to 0..1, and with ``scores`` the score; pictures
    without a detection have an empty file. The JSON appears when it is closed: of each detection image_id (counts pictures
    over all sources, from 0), file, frame (of videos, from 0), category_id and name of the class, bbox (x, y, width, height
    in pixels of the picture) and score.
    """

    def __init__(self, folder: Path, names: Sequence[str], *, text: bool, scores: bool, as_json: bool) -> None:
        self.folder, self.names, self.text, self.scores, self.as_json = folder, names, text, scores, as_json
        self.pictures = self.detections = 0
        self.labels = folder / "labels"
        self.lines: list[str] = []

    def __enter__(self) -> DetectionFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.as_json:
            write_text_atomically(self.folder / "detections.json", "[\n" + ",\n".join(self.lines) + "\n]\n")

    def add(
        self, file: str, name: str, frame: int | None, rows: Sequence[Sequence[float]], size_hw: tuple[int, int]
    ) -> None:
        """Write a picture's detections (x1, y1, x2, y2 in pixels, score, class); ``name`` is that of its text file."""
        if self.text:
            self._write_text(stem_of(name, frame), rows, size_hw)
        for x1, y1, x2, y2, score, kind in rows if self.as_json else ():
            place = {"image_id": self.pictures, "file": file, **({} if frame is None else {"frame": frame})}
            what = {"category_id": int(kind), "name": self.names[int(kind)]}
            bbox = [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)]
            row = {**place, **what, "bbox": bbox, "score": round(score, 6)}
            self.lines.append(json.dumps(row, ensure_ascii=False))
        self.detections += len(rows)
        self.pictures += 1

    def _write_text(self, name: str, rows: Sequence[Sequence[float]], size_hw: tuple[int, int]) -> None:
        height, width = size_hw
        lines = []
        for x1, y1, x2, y2, score, kind in rows:
            shape = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
            values = [*shape, score] if self.scores else shape
            lines.append(f"{int(kind)} " + " ".join(f"{value:.6f}" for value in values) + "\n")
        self.labels.mkdir(exist_ok=True)
        # Not flushed to the disk each: a video has thousands, and the disk would be slower than the network.
        (self.labels / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
