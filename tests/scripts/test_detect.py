"""detect.py: whatever it looks at and whichever engine looks, it writes what is there, plays, and says what went wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.images import letterbox, read_image
from data.letterbox import Letterbox
from detection.detector import open_detector
from detection.network import read_network, save_network, start_network
from detection.video.writer import write_image
from detection.write_file import write_file
from tests.data.file_server import serve
from tests.data.videos import SIZE_HW, cut_short, decoded, short_video
from tests.scripts.runs import NAMES, ROOT, Runner
from tests.scripts.test_failures import fails

CONF = ("--conf", 0.2, "--max-det", 8)


@pytest.fixture(scope="module")
def weights(video: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network with strong opinions: after so short a training as a test affords, all scores are alike, and
    rounding decides which boxes are the best."""
    torch.manual_seed(0)
    network = start_network("", str(ROOT / "models" / "yolov5n.yaml"), NAMES)
    frames = torch.stack([image for image, _ in frames_for_the_network(video)]).float() / 255
    norms = [module for module in network.model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        network.model.train()(frames)
        for head in network.model.detect.m:
            head.weight.normal_(0, 0.3)
    for norm in norms:
        norm.momentum = 0.03
    out = tmp_path_factory.mktemp("weights") / "best.pt"
    save_network(out, network.model, network.build)
    return out


@pytest.fixture(scope="module")
def exported(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the network: any.onnx takes every size, fixed.torchscript the video's alone."""
    folder, network = tmp_path_factory.mktemp("exported"), read_network(weights)
    images = torch.rand(1, 3, *SIZE_HW).mul(255).round() / 255
    write_file(network, folder / "any.onnx", images, dynamic=True, uint8_input=True)
    write_file(network, folder / "fixed.torchscript", images)
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short_video(tmp_path_factory.mktemp("videos") / "shapes.mp4")


def found_in(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "detections.json").read_text())
    return rows


def by_picture(rows: list[dict[str, Any]]) -> dict[int, np.ndarray]:
    """[n, 6] by image id: x, y, width, height, score, class."""
    pictures: dict[int, list[list[float]]] = {}
    for row in rows:
        pictures.setdefault(row["image_id"], []).append([*row["bbox"], row["score"], row["category_id"]])
    return {key: np.array(values) for key, values in pictures.items()}


def direct(
    weights: Path, images: list[tuple[torch.Tensor, Letterbox]], conf: float = 0.2, **options: Any
) -> dict[int, np.ndarray]:
    """What the checkpoint finds in letterboxed images, one at a time, without detect.py."""
    found = {}
    with open_detector(str(weights), num_cores=1) as detector:
        for number, (image, geometry) in enumerate(images):
            (rows,) = detector.detections(detector(image[None]), conf=conf, max_detections=8, **options)
            boxes = geometry.to_original(rows[:, :4])
            sides = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2], rows[:, 4:]], 1)
            if len(sides):
                found[number] = sides.numpy()
    return found


def assert_same(found: dict[int, np.ndarray], wanted: dict[int, np.ndarray]) -> None:
    """The same boxes to 0.1 pixels and scores to 0.001, in any order; this network magnifies rounding."""
    assert found.keys() == wanted.keys() and found
    for number, rows in wanted.items():
        assert found[number].shape == rows.shape, number
        scaled = np.array([1, 1, 1, 1, 100, 1000])
        distance = np.abs((found[number][:, None] - rows[None]) * scaled).max(2)
        assert sorted(distance.argmin(0)) == list(range(len(rows))) and distance.min(0).max() < 0.1, number


def frames_for_the_network(video: Path) -> list[tuple[torch.Tensor, Letterbox]]:
    same = Letterbox(1, 1, 0, 0, SIZE_HW)
    return [(torch.from_numpy(frame).permute(2, 0, 1).contiguous(), same) for frame in decoded(video)]


@pytest.mark.parametrize(
    ("engine", "file", "at_once"),
    [
        ("torch", None, 1),
        ("torch", "fixed.torchscript", 2),
        ("onnxruntime", "any.onnx", 2),
        ("openvino", "any.onnx", 1),
        ("openvino", "any.onnx", 2),
    ],
)
def test_a_video_with_each_engine(
    weights: Path, exported: Path, video: Path, script: Runner, tmp_path: Path,
    engine: str, file: str | None, at_once: int,
) -> None:  # fmt: skip
    given = exported / file if file else weights
    how = ("--engine", engine, "--precision", "float32", "--img", *SIZE_HW, "--num-cores", 2, "--at-once", at_once)
    done = script("detect", "--weights", given, "--source", video, *how, *CONF, "--save-json", "--project", tmp_path)
    assert done.code == 0, done.err
    run = tmp_path / "exp"
    before, after = decoded(video), decoded(run / "shapes.mp4")
    assert len(after) == len(before) == 40 and after[0].shape == before[0].shape == (*SIZE_HW, 3)
    found = by_picture(found_in(run))
    assert_same(found, direct(weights, frames_for_the_network(video)))
    changed = [np.abs(a.astype(int) - b).max(2) > 60 for a, b in zip(before, after, strict=True)]
    assert all(changed[number].any() for number in found)
    summary = json.loads((run / "detect.json").read_text())
    assert summary["frames"] == 40 and summary["detections"] == len(found_in(run)) and summary["engine"] == engine
    assert summary["outputs"] == [str(run / "shapes.mp4")] and summary["frames_at_once"] == at_once
    assert "FPS from end to end" in done.out and "| read | pre-process | inference |" in done.out
    assert (run / "config.yaml").is_file()


def test_images_are_seen_as_in_the_evaluation(weights: Path, video: Path, script: Runner, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, frame in enumerate(decoded(video)[::15]):
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 1 else 1
        Image.fromarray(frame).resize((70, 50)).save(folder / f"{number}.jpg", exif=exif)
    flags = ("--weights", weights, "--source", folder, "--img", 64, 64, "--conf", 0.02, "--max-det", 8, "--save-json")
    flags += ("--save-txt", "--save-conf")
    done = script("detect", *flags, "--project", tmp_path / "runs")
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "exp"
    images = [letterbox(read_image(folder / f"{number}.jpg"), 64) for number in range(3)]
    assert_same(by_picture(found_in(run)), direct(weights, images, conf=0.02))
    sizes = [(50, 70), (70, 50), (50, 70)]
    for number, (height, width) in enumerate(sizes):
        drawn = read_image(run / f"{number}.jpg")
        assert drawn.shape == (3, height, width)
        rows = [row for row in found_in(run) if row["image_id"] == number]
        lines = [
            [float(word) for word in line.split()]
            for line in (run / "labels" / f"{number}.txt").read_text().splitlines()
        ]
        assert len(lines) == len(rows) > 0
        for (kind, cx, cy, w, h, score), row in zip(lines, rows, strict=True):
            x, y, row_w, row_h = row["bbox"]
            assert (int(kind), NAMES[int(kind)]) == (row["category_id"], row["name"])
            wanted = [(x + row_w / 2) / width, (y + row_h / 2) / height, row_w / width, row_h / height, row["score"]]
            assert [cx, cy, w, h, score] == pytest.approx(wanted, abs=1e-4)


def test_little_grey_where_the_size_is_free(
    weights: Path, exported: Path, video: Path, script: Runner, tmp_path: Path
) -> None:
    """128 x 96 scaled to 64 x 48, on a canvas of 64 x 64; a picture of another shape beside it on another one."""
    Image.fromarray(decoded(video)[0][:40]).save(tmp_path / "wide.png")
    Image.fromarray(decoded(video)[0]).save(tmp_path / "frame.png")
    flags = ("--img", 128, "--precision", "float32", *CONF, "--save-json", "--project", tmp_path)
    sources = ("--source", tmp_path / "wide.png", tmp_path / "frame.png")
    for name, file in {"torch": weights, "onnxruntime": exported / "any.onnx"}.items():
        done = script("detect", "--weights", file, *sources, *flags, "--name", name)
        assert done.code == 0, done.err
    assert_same(by_picture(found_in(tmp_path / "torch")), by_picture(found_in(tmp_path / "onnxruntime")))
    image = read_image(tmp_path / "wide.png")
    grey = torch.full((3, 64, 128), 114, dtype=torch.uint8)
    grey[:, 12:52] = image
    wanted = direct(weights, [(grey, Letterbox(1, 1, 0, 12, (40, 128)))])
    assert_same({0: by_picture(found_in(tmp_path / "torch"))[0]}, wanted)


def test_each_detection_as_a_picture_of_its_own(weights: Path, video: Path, script: Runner, tmp_path: Path) -> None:
    """Cut out of the picture before anything is drawn on it."""
    Image.fromarray(decoded(video)[0]).save(tmp_path / "frame.png")
    sources = ("--source", tmp_path / "frame.png", video)
    flags = ("--img", *SIZE_HW, *CONF, "--vid-stride", 20, "--line-thickness", 20, "--save-json", "--save-crop")
    done = script("detect", "--weights", weights, *sources, *flags, "--project", tmp_path)
    assert done.code == 0, done.err
    rows, crops = found_in(tmp_path / "exp"), tmp_path / "exp" / "crops"
    assert {row["file"] for row in rows} == {str(tmp_path / "frame.png"), str(video)}
    whole = {None: decoded(video)[0], **dict(enumerate(decoded(video)))}
    for key in {(row["name"], row.get("frame")) for row in rows}:
        stem = "frame" if key[1] is None else f"shapes_{key[1] + 1}"
        of_key = [row for row in rows if (row["name"], row.get("frame")) == key]
        for number, row in enumerate(of_key, start=1):
            crop = read_image(crops / key[0] / f"{stem}{number if number > 1 else ''}.jpg").permute(1, 2, 0).numpy()
            x, y, w, h = row["bbox"]
            left, top = max(0, int(x - w / 100 - 5)), max(0, int(y - h / 100 - 5))
            there = whole[key[1]][top : top + crop.shape[0], left : left + crop.shape[1]]
            assert there.shape == crop.shape and np.abs(there.astype(int) - crop).mean() < 8
    assert len(list(crops.rglob("*.jpg"))) == len(rows) > 3


def test_some_classes_and_frames_and_no_pictures(weights: Path, video: Path, script: Runner, tmp_path: Path) -> None:
    flags = ("--classes", NAMES[2], 0, "--vid-stride", 4, "--nosave", "--save-txt", "--save-json", "--agnostic-nms")
    done = script(
        "detect", "--weights", weights, "--source", video, "--img", *SIZE_HW, *CONF, *flags, "--project", tmp_path
    )
    assert done.code == 0, done.err
    run, rows = tmp_path / "exp", found_in(tmp_path / "exp")
    images = frames_for_the_network(video)[::4]
    assert_same(by_picture(rows), direct(weights, images, classes=[2, 0], class_agnostic=True))
    assert {row["frame"] for row in rows} <= set(range(0, 40, 4)) and {row["name"] for row in rows} <= {
        NAMES[2],
        NAMES[0],
    }
    assert sorted(p.name for p in (run / "labels").iterdir()) == sorted(f"shapes_{n + 1}.txt" for n in range(0, 40, 4))
    assert not (run / "shapes.mp4").exists()


def test_several_sources_of_which_some_are_broken(weights: Path, video: Path, script: Runner, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    cut_short(video, 0.6, folder / "cut.mp4")
    Image.fromarray(decoded(video)[0]).save(folder / "frame.png")
    (folder / "noise.jpg").write_bytes(b"noise")
    flags = ("--weights", weights, "--img", 64, *CONF, "--save-txt", "--project", tmp_path)
    done = script("detect", *flags, "--source", folder, video)
    assert done.code == 0, done.err
    warnings = [line for line in done.err.splitlines() if "warning: " in line]
    assert (
        len(warnings) == 2 and "cut.mp4" in warnings[0] and "of 40 frames" in warnings[0] and "noise.jpg" in warnings[1]
    )
    run = tmp_path / "exp"
    assert {p.name for p in run.iterdir() if p.is_file()} == {
        "config.yaml",
        "detect.json",
        "cut.mp4",
        "frame.png",
        "shapes.mp4",
    }
    assert not (run / "weights").exists()
    written = len(decoded(run / "cut.mp4"))
    assert (
        0 < written < 40
        and len(list((run / "labels").glob("cut_*.txt"))) == written
        and len(decoded(run / "shapes.mp4")) == 40
    )
    assert len(json.loads((run / "detect.json").read_text())["problems"]) == 2


def test_nothing_but_broken_sources(weights: Path, script: Runner, tmp_path: Path) -> None:
    for name in ("a.jpg", "b.png"):
        (tmp_path / name).write_bytes(b"noise")
    done = script("detect", "--weights", weights, "--source", f"{tmp_path}/*.*g", "--img", 64, "--project", tmp_path)
    assert done.code == 1
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "nothing to look at in 2 sources; the first: " in line and "a.jpg: the image cannot be read" in line


def test_a_truncated_video_alone_is_an_error_that_keeps_what_was_read(
    weights: Path, video: Path, script: Runner, tmp_path: Path
) -> None:
    cut = cut_short(video, 0.6, tmp_path / "cut.mp4")
    done = script(
        "detect", "--weights", weights, "--source", cut, "--img", 64, *CONF, "--save-json", "--project", tmp_path
    )
    assert done.code == 1
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    written = len(decoded(tmp_path / "exp" / "cut.mp4"))
    assert f"cut.mp4: {written} of 40 frames could be read, the file is truncated or damaged" in line
    assert json.loads((tmp_path / "exp" / "detect.json").read_text())["frames"] == written > 0
    assert found_in(tmp_path / "exp")


def test_a_stream_over_http(weights: Path, video: Path, script: Runner, tmp_path: Path) -> None:
    with serve({"door.mp4": video.read_bytes()}) as server:
        url = f"{server.url}/door.mp4"
        done = script("detect", "--weights", weights, "--source", url, "--img", 64, "--project", tmp_path)
    assert done.code == 0, done.err
    assert len(decoded(tmp_path / "exp" / "door.mp4")) == 40


def test_an_image_behind_an_address_is_an_image(weights: Path, script: Runner, tmp_path: Path) -> None:
    file = tmp_path / "door.png"
    write_image(torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8), file)
    common = ("--weights", weights, "--img", 64, "--conf", 0.001, "--save-txt", "--project", tmp_path, "--name")
    with serve({"door.png": file.read_bytes(), "noise.png": b"noise"}) as server:
        done = script("detect", *common, "address", "--source", f"{server.url}/door.png")
        noise = script("detect", *common, "noise", "--source", f"{server.url}/noise.png")
        assert noise.code == 1
        assert noise.err.splitlines()[-1].startswith(f"error: {server.url}/noise.png: the image cannot be read")
    assert done.code == 0, done.err
    assert script("detect", *common, "file", "--source", file).code == 0
    for name in ("door.png", "labels/door.txt"):
        assert (tmp_path / "address" / name).read_bytes() == (tmp_path / "file" / name).read_bytes()


def test_sources_that_cannot_be(weights: Path, video: Path, script: Runner, tmp_path: Path) -> None:
    common = ("detect", "--weights", weights, "--img", 64, "--project", tmp_path, "--source")
    (tmp_path / "noise.jpg").write_bytes(b"noise")
    (tmp_path / "empty").mkdir()
    fails(script(*common), "source")
    for source, message in {
        "/dev/video99": "/dev/video99: the camera cannot be opened (No such file",
        str(tmp_path / "empty"): "empty: no image and no video in this folder",
        str(tmp_path / "noise.jpg"): "noise.jpg: the image cannot be read (of no known image format)",
        str(weights): "best.pt: neither an image nor a whole video",
    }.items():
        fails(script(*common, source), message)


def test_what_does_not_go_together(weights: Path, exported: Path, video: Path, script: Runner, tmp_path: Path) -> None:
    def refused(*arguments: object) -> tuple[int, str, str]:
        return script("detect", "--source", video, "--project", tmp_path / "runs", *arguments)

    fixed = exported / "fixed.torchscript"
    fails(refused("--weights", fixed, "--engine", "openvino"), "--engine openvino does not run .torchscript files")
    fails(refused("--weights", weights, "--engine", "openvino"), "best.pt: --engine openvino runs exported files")
    fails(
        refused("--weights", fixed, "--img", 64),
        "fixed.torchscript: takes images of 96 x 128 pixels, 64 x 64 were asked for",
    )
    fails(refused("--weights", weights, "--img", 65), "--img 65: expected a multiple of the largest stride, 32")
    fails(refused("--weights", weights, "--img", 64, 64, 64), "--img 64 64 64: expected one side, or height and width")
    fails(refused("--weights", weights, "--classes", "lion"), "--classes lion: ", "knows circle, square")
    fails(refused("--weights", weights, "--classes", 4), "--classes 4: ", "expected one of these names or 0 to 3")
    fails(refused("--weights", weights, "--conf", 2), "--conf 2: expected 0 to 1")
    fails(refused("--weights", weights, "--vid-stride", 0), "--vid-stride 0")
    fails(refused("--weights", weights, "--save-conf"), "add --save-txt")
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_leaves_whole_files(weights: Path, tmp_path: Path) -> None:
    video, run = short_video(tmp_path / "long.mp4", frames=1500), tmp_path / "exp"
    command = [sys.executable, "detect.py", "--weights", weights, "--source", video, "--img", 128, *CONF, "--save-txt"]
    process = subprocess.Popen(
        [*map(str, command), "--save-json", "--num-cores", "1", "--project", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    until = time.monotonic() + 60
    while not (run / "labels" / "long_5.txt").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted: " in err and "Traceback" not in err, err
    summary = json.loads((run / "detect.json").read_text())
    assert 5 <= summary["frames"] < 1500 and f"{summary['frames']} frames" in out
    assert len(decoded(run / "long.mp4")) == summary["frames"] == len(list((run / "labels").iterdir()))
    assert {row["frame"] for row in found_in(run)} <= set(range(summary["frames"]))
    assert not [path for path in run.rglob("*writing-*")]


@pytest.mark.parametrize("name", ["bus.jpg", "zidane.jpg"])
def test_the_published_network_on_photographs(script: Runner, tmp_path: Path, name: str) -> None:
    shared = ROOT.parent / "shared"
    if not (shared / "reference" / name).is_file():
        pytest.skip("no reference images in ../shared")
    flags = ("--weights", shared / "weights" / "yolov5n.pt", "--img", 640, 640, "--save-json", "--project", tmp_path)
    done = script("detect", *flags, "--source", shared / "reference" / name)
    assert done.code == 0, done.err
    wanted = json.loads((shared / "reference" / "detections.json").read_text())[name]
    found = found_in(tmp_path / "exp")
    assert [row["name"] for row in found] == [row["cls"] for row in wanted]
    for row, (x1, y1, x2, y2) in zip(found, (row["xyxy"] for row in wanted), strict=True):
        x, y, w, h = row["bbox"]
        # Ours shrinks with antialias, the reference without.
        assert np.abs(np.array([x, y, x + w, y + h]) - [x1, y1, x2, y2]).max() < 8
    assert [row["score"] for row in found] == pytest.approx([row["conf"] for row in wanted], abs=0.04)


def test_a_list_names_what_there_is(weights: Path, video: Path, script: Runner, tmp_path: Path) -> None:
    for number, name in enumerate(("a.png", "b.mpo", "c.png")):
        Image.fromarray(decoded(video)[number * 9]).save(tmp_path / name)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "list.txt").write_text(f"{tmp_path / 'c.png'}\n\n../b.mpo\n{video}\n")
    run = tmp_path / "runs" / "exp"
    flags = ("--weights", weights, "--img", 64, *CONF, "--save-json", "--project", tmp_path / "runs")
    done = script("detect", *flags, "--source", tmp_path / "more" / "list.txt", tmp_path / "a.png")
    assert done.code == 0, done.err
    found = found_in(run)
    assert {Path(row["file"]).name for row in found} <= {"c.png", "b.mpo", video.name, "a.png"}
    outputs = json.loads((run / "detect.json").read_text())["outputs"]
    assert [Path(file).name for file in outputs] == ["c.png", "b.mpo", "shapes.mp4", "a.png"]
    for text, said in (
        ("\n", ["list.txt: the list is empty; expected an image"]),
        ("list.txt\n", ["list.txt: it lists list.txt, another list; give both to --source"]),
        ("absent.png\n", ["list.txt: absent.png: no such file or folder"]),
    ):
        (tmp_path / "more" / "list.txt").write_text(text)
        fails(script("detect", *flags, "--source", tmp_path / "more" / "list.txt"), *said)
    with serve({"door.mp4": video.read_bytes()}) as server:
        (tmp_path / "more" / "list.txt").write_text(f"{server.url}/door.mp4\n")
        done = script("detect", *flags, "--source", tmp_path / "more" / "list.txt")
    assert done.code == 0 and "40 frames" in done.out, done.err


def test_16_bits_and_the_limit_of_pixels(weights: Path, video: Path, script: Runner, tmp_path: Path) -> None:
    grey = decoded(video)[0].mean(2).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) << 8 | 99).save(tmp_path / "16.png")
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "float.tiff")
    flags = ("--weights", weights, "--img", *SIZE_HW, "--conf", 0.02, "--project", tmp_path / "runs")
    done = script("detect", *flags, "--save-json", "--source", tmp_path / "8.png", tmp_path / "16.png")
    assert done.code == 0, done.err
    found = by_picture(found_in(tmp_path / "runs" / "exp"))
    assert len(found[0]) and np.array_equal(found[0], found[1])
    fails(script("detect", *flags, "--source", tmp_path / "float.tiff"), "float.tiff: its pixels are floats, expected")
    height, width = grey.shape
    too_few = ("--source", tmp_path / "8.png", "--max-pixels", height * width - 1)
    fails(
        script("detect", *flags, *too_few), f"8.png: {width} x {height} pixels, expected at most {height * width - 1};"
    )
    done = script("detect", *flags, "--source", tmp_path / "8.png", "--max-pixels", height * width)
    assert done.code == 0, done.err
