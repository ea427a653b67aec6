"""Annotated copies: as long, as large and as fast as their sources, and playable whatever happens."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError
from detection.video.pictures import VideoInfo, VideoPicture, read_pictures
from detection.video.sources import find_sources
from detection.video.writer import VideoWriter, check_encoder, write_image
from slim import SlimError
from tests.data.scenes import ROOT
from tests.data.videos import decoded, short_video

INFO = VideoInfo(Fraction(25), Fraction(1, 12800), 0, ())


def copied(path: Path, out: Path, stride: int = 1) -> None:
    """A video through reader and writer, nothing drawn."""
    writer = None
    for picture in read_pictures(find_sources([str(path)])[0], stride):
        assert isinstance(picture, VideoPicture)
        writer = writer or VideoWriter(out, picture.size_hw, picture.info, stride)
        writer.write(picture.upright())
    assert writer is not None
    writer.close()


def frame_of(size_hw: tuple[int, int], pts: int | None, value: int = 90) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(np.full((*size_hw, 3), value, np.uint8), format="rgb24")
    frame.pts, frame.time_base = pts, INFO.time_base
    return frame


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_copy_has_its_sources_size_rate_and_pictures(tmp_path: Path, suffix: str) -> None:
    video, out = short_video(tmp_path / f"shapes{suffix}"), tmp_path / "copy.mp4"
    copied(video, out)
    before, after = decoded(video), decoded(out)
    assert len(after) == 40 and after[0].shape == before[0].shape
    assert np.mean([np.abs(a.astype(int) - b).mean() for a, b in zip(before, after, strict=True)]) < 6
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.frames, stream.codec_context.name) == (25, 40, "h264")


@pytest.mark.parametrize("words", [["mjpeg", "strict=unofficial", "qmin=3", "qmax=3"], ["mpeg4", "qmin=3", "qmax=3"]])
def test_an_encoder_by_name_with_its_options(tmp_path: Path, words: list[str]) -> None:
    check_encoder(words)
    for size in ((64, 96), (33, 47)):
        with contextlib.closing(VideoWriter(tmp_path / "by-name.mp4", size, INFO, 1, words)) as writer:
            writer.write(frame_of(size, 0))
        (frame,) = decoded(tmp_path / "by-name.mp4")
        assert frame.shape[:2] == size and abs(frame.mean() - 90) < 2
        with av.open(str(tmp_path / "by-name.mp4")) as container:
            assert container.streams.video[0].codec_context.name == words[0]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["h265_of_nobody"], "h265_of_nobody"),
        (["libx264", "preset"], "length 1"),
        (["libx264", "presett=fast"], "no option presett"),
        (["libx264", "preset=hasty"], "Invalid argument"),
    ],
)
def test_encoders_that_do_not_work_are_found_before_the_first_frame(words: list[str], reason: str) -> None:
    with pytest.raises(SlimError, match=f"^--encoder {' '.join(words)}: it does not work here \\(.*{reason}.*expected"):
        check_encoder(words)


def test_fewer_frames_last_as_long(tmp_path: Path) -> None:
    copied(short_video(tmp_path / "shapes.mp4"), tmp_path / "copy.mp4", stride=4)
    with av.open(str(tmp_path / "copy.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate) == (10, Fraction(25, 4))


def test_odd_sizes_and_times_that_go_back(tmp_path: Path) -> None:
    with contextlib.closing(VideoWriter(tmp_path / "odd.mp4", (33, 47), INFO)) as writer:
        for pts in (512, 1024, None, 100, 9000):
            writer.write(frame_of((33, 47), pts))
        writer.write(frame_of((66, 94), 9512))
    with av.open(str(tmp_path / "odd.mp4")) as container:
        frames = list(container.decode(video=0))
    assert [(f.height, f.width) for f in frames] == [(33, 47)] * 6
    assert [round(f.time * 12800) for f in frames] == [0, 512, 1024, 1536, 8488, 9000]


def test_a_killed_writer_leaves_what_it_wrote_until_two_seconds_before(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from tests.detection.test_writer import INFO, VideoWriter, frame_of\n"
        "writer = VideoWriter(Path(sys.argv[1]), (64, 64), INFO)\n"
        "for number in range(130):\n    writer.write(frame_of((64, 64), 512 * number, number))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "killed.mp4"], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(decoded(tmp_path / "killed.mp4")) == 100


def test_images_keep_their_kind(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    write_image(pixels, tmp_path / "a.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), pixels.permute(1, 2, 0).numpy())
    for suffix in (".jpg", ".webp", ".bmp", ".tif"):
        write_image(pixels, tmp_path / f"a{suffix}")
        with Image.open(tmp_path / f"a{suffix}") as image:
            assert image.size == (30, 20)
    with pytest.raises(DataError, match=r"a\.jpg: cannot be written"):
        write_image(pixels, tmp_path / "nowhere" / "a.jpg")
