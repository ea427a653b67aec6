"""Images and videos as the network sees them, and in what ways they can be broken."""

from __future__ import annotations

import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError
from data.images import Canvas, letterbox, read_image, resize
from detection.video.pictures import ImagePicture, VideoPicture, planes_of, read_pictures
from detection.video.sources import MediaSource, find_sources
from tests.data.file_server import serve
from tests.data.videos import SIZE_HW, cut_short, decoded, short_video

SQUARE = Canvas((64, 64))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short_video(tmp_path_factory.mktemp("video") / "shapes.mp4")


def all_of(where: object, stride: int = 1) -> list[VideoPicture]:
    pictures = list(read_pictures(find_sources([str(where)])[0], stride))
    assert all(isinstance(picture, VideoPicture) for picture in pictures)
    return pictures  # type: ignore[return-value]


@pytest.mark.parametrize("size_hw", [(100, 50), (33, 97), (64, 64), (7, 300)])
def test_a_square_canvas_is_the_evaluations_letterbox(size_hw: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (3, *size_hw), dtype=torch.uint8)
    wanted, geometry = letterbox(image, 64)
    found, placed = SQUARE.letterbox(image)
    assert torch.equal(found, wanted) and placed == geometry


def test_a_stride_leaves_as_little_grey_as_it_can() -> None:
    canvas = Canvas((640, 640), 32)
    geometry, resized_hw, input_hw = canvas.place((720, 1280))
    assert (resized_hw, input_hw) == ((360, 640), (384, 640))
    assert (geometry.top_px, geometry.left_px) == (12, 0)
    assert canvas.place((1280, 720))[1:] == ((640, 360), (640, 384))
    assert Canvas((384, 640)).place((1280, 720))[1:] == ((384, 216), (384, 640))


def test_images_are_upright(tmp_path: Path) -> None:
    picture = Image.fromarray(np.arange(20 * 40 * 3, dtype=np.uint8).reshape(20, 40, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    (found,) = read_pictures(find_sources([str(tmp_path / "turned.png")])[0])
    assert isinstance(found, ImagePicture) and found.size_hw == (40, 20)
    wanted, _ = letterbox(read_image(tmp_path / "turned.png"), 64)
    assert torch.equal(found.letterboxed(SQUARE)[0], wanted)


def test_frames_are_the_videos_own(video: Path) -> None:
    pictures = all_of(video)
    assert [picture.number for picture in pictures] == list(range(40))
    assert pictures[0].info.frames == 40 and pictures[0].info.rate == 25
    for picture, wanted in zip(pictures, decoded(video), strict=True):
        image, geometry = picture.letterboxed(Canvas(SIZE_HW))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), wanted)
        assert (geometry.ratio_x, geometry.left_px) == (1, 0)


def test_shrunk_frames_are_nearly_averages_of_areas_as_images_are(video: Path) -> None:
    picture, wanted = all_of(video)[7], torch.from_numpy(decoded(video)[7]).permute(2, 0, 1)
    image, geometry = picture.letterboxed(SQUARE)
    assert image.shape == (3, 64, 64) and (geometry.top_px, geometry.left_px) == (8, 0)
    assert (image[:, :8] == 114).all() and (image[:, 56:] == 114).all()
    difference = (image[:, 8:56].float() - resize(wanted, (48, 64)).float()).abs()
    assert difference.mean() < 3


def test_every_third_frame(video: Path) -> None:
    assert [picture.number for picture in all_of(video, 3)] == list(range(0, 40, 3))


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_videos_are_upright(tmp_path: Path, degrees: int) -> None:
    upright = np.full((48, 80, 3), 60, np.uint8)
    upright[4:20, 10:24] = (220, 40, 40)
    turns = degrees // 90 % 4
    with av.open(str(tmp_path / "turned.mp4"), "w") as container:
        stored = np.ascontiguousarray(np.rot90(upright, -turns))
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = *stored.shape[:2], "yuv420p"
        stream.set_display_rotation(degrees)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(stored, format="rgb24")))
        container.mux(stream.encode(None))
    picture = all_of(tmp_path / "turned.mp4")[1]
    assert picture.size_hw == (48, 80)
    image, _ = picture.letterboxed(Canvas((48, 80)))
    assert (image.permute(1, 2, 0).float() - torch.from_numpy(upright).float()).abs().mean() < 4
    assert (picture.pixels.permute(1, 2, 0).float() - torch.from_numpy(upright).float()).abs().mean() < 4
    luma = planes_of(picture.upright())[0]
    assert luma.shape == (48, 80) and abs(int(luma[12, 16]) - int(luma[40, 60])) > 15 > abs(
        int(luma[40, 16]) - luma[40, 60]
    )


def test_drawing_on_a_frame_does_not_reach_the_next(video: Path) -> None:
    wanted = decoded(video)
    for picture in read_pictures(find_sources([str(video)])[0]):
        assert isinstance(picture, VideoPicture)
        image, _ = picture.letterboxed(Canvas(SIZE_HW))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), wanted[picture.number])
        for plane in planes_of(picture.upright()):
            plane[:] = 0


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_truncated_video_gives_what_it_has_and_says_so(video: Path, tmp_path: Path, share: float) -> None:
    cut, found = cut_short(video, share, tmp_path / "cut.mp4"), []
    with pytest.raises(DataError, match=r"cut\.mp4: (\d+) of 40 frames could be read, the file is truncated") as told:
        for picture in read_pictures(find_sources([str(cut)])[0]):
            found.append(picture)
    assert 0 < len(found) < 40 and f": {len(found)} of 40" in str(told.value)


def test_a_damaged_piece_is_told_at_the_end(video: Path, tmp_path: Path) -> None:
    with av.open(str(video)) as container:
        place = [packet.pos for packet in container.demux(video=0) if packet.size][20]
    content = bytearray(video.read_bytes())
    content[place : place + 4] = b"\xff\xff\xff\xff"
    (tmp_path / "damaged.mp4").write_bytes(content)
    found = []
    with pytest.raises(DataError, match=r"damaged\.mp4: 39 of 40 frames could be read, .* \(Invalid data found"):
        for picture in read_pictures(find_sources([str(tmp_path / "damaged.mp4")])[0]):
            found.append(picture)
    assert len(found) == 39


def test_a_truncated_video_that_does_not_count_its_frames(tmp_path: Path) -> None:
    video = short_video(tmp_path / "shapes.mkv", frames=100)
    assert len(all_of(video)) == 100
    with pytest.raises(DataError, match=r"cut\.mkv: \d+ of 100 frames could be read"):
        all_of(cut_short(video, 0.6, tmp_path / "cut.mkv"))


def test_what_is_no_video(tmp_path: Path, video: Path) -> None:
    (tmp_path / "notes.md").write_text("no picture")
    (tmp_path / "headless.mp4").write_bytes(video.read_bytes()[2000:])
    (tmp_path / "empty.mp4").touch()
    for name in ("notes.md", "headless.mp4", "empty.mp4"):
        with pytest.raises(
            DataError, match=rf"{name}: neither an image nor a whole video \(.+\); restore or remove it"
        ):
            all_of(tmp_path / name)


def test_sound_without_pictures(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "tone.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(DataError, match=r"tone\.mp4: it has no pictures"):
        all_of(tmp_path / "tone.mp4")


def test_absent_cameras_and_streams() -> None:
    with pytest.raises(DataError, match=r"/dev/video99: the camera cannot be opened \(No such file"):
        all_of(99)
    with pytest.raises(DataError, match=r"127\.0\.0\.1:9/x: the stream cannot be opened \(Connection refused\)"):
        all_of("rtsp://127.0.0.1:9/x")
    with pytest.raises(DataError, match="the stream cannot be opened"):
        all_of("nonsense://host")


def test_a_file_behind_an_address_is_read_whole(video: Path) -> None:
    with serve({"shapes.mp4": video.read_bytes()}) as server:
        assert [picture.number for picture in all_of(f"{server.url}/shapes.mp4")] == list(range(40))
        with pytest.raises(DataError, match="the stream cannot be opened"):
            all_of(f"{server.url}/other.mp4")


def test_of_a_source_that_does_not_wait_the_newest_counts(tmp_path: Path) -> None:
    """MPEG-TS over HTTP states no length: as from a camera, whoever is late misses frames, and gets the last one."""
    live = short_video(tmp_path / "live.ts")
    numbers: list[int] = []
    with (
        serve({"live.ts": live.read_bytes()}, length=False, ranges=False) as server,
        pytest.raises(DataError, match=r"live\.ts: it broke off after 40 frames \(Input/output error\)"),
    ):
        for picture in read_pictures(MediaSource(f"{server.url}/live.ts", "stream", "live")):
            numbers.append(picture.number)
            time.sleep(0.5)
    assert len(numbers) < 10 and numbers == sorted(set(numbers)) and numbers[-1] == 39


def test_sources_by_kind_and_order(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.png", "c.MP4", "c_1.jpg", "d_1.png", "notes.txt", "b.mkv", "._a.png"):
        (tmp_path / name).touch()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "d.jpg").touch()
    found = find_sources([str(tmp_path)])
    assert [(Path(s.where).name, s.kind, s.name) for s in found] == [
        ("a.png", "image", "a"),
        ("b.jpg", "image", "b"),
        ("b.mkv", "video", "b-2"),
        ("c.MP4", "video", "c"),
        ("c_1.jpg", "image", "c_1-2"),
        ("d_1.png", "image", "d_1"),
    ]
    assert [Path(s.where).name for s in find_sources([f"{tmp_path}/**/*.jpg"])] == ["b.jpg", "d.jpg", "c_1.jpg"]
    assert [s.kind for s in find_sources([str(tmp_path / "a.png"), "rtsp://user@host/door?x=1"])] == ["image", "stream"]
    assert find_sources(["0"]) == [MediaSource("/dev/video0", "camera", "video0")]
    assert find_sources(["rtsp://host:554/door"])[0].name == "door"
    assert len(find_sources([str(tmp_path / "a.png")] * 2)) == 1


def test_sources_that_are_none(tmp_path: Path) -> None:
    for word, message in {
        str(tmp_path): "no image and no video in this folder",
        f"{tmp_path}/*.jpg": "no image and no video matches",
        "nowhere.jpg": "nowhere.jpg: no such file or folder; expected an image",
    }.items():
        with pytest.raises(DataError, match=message):
            find_sources([word])
    with pytest.raises(DataError, match="--source: none given"):
        find_sources([])
    with pytest.raises(DataError, match="/dev/video1: a camera does not end; give it alone"):
        find_sources(["1", "0"])
