"""detection.load and the examples for the engines alone: what detect.py finds, in a program of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import detection
from data import DataError
from detection.network import read_network, save_network
from slim import SlimError
from tests.examples.test_examples import run
from tests.scripts.runs import NAMES, SMALL_ANCHORS, Runner


@pytest.fixture
def picture(tiny: Path) -> Path:
    return sorted(tiny.parent.rglob("images/val/*"))[0]


@pytest.fixture
def wanted(small_weights: Path, picture: Path, script: Runner, tmp_path: Path) -> list[list[float]]:
    """x, y, width, height, score, class of what detect.py finds."""
    given = ("--weights", small_weights, "--source", picture, "--img", 64, "--conf", 0.02, "--save-json", "--nosave")
    done = script("detect", *given, "--project", tmp_path, "--name", "found")
    assert done.code == 0, done.err
    rows = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert len(rows) > 2
    return [[*row["bbox"], row["score"], row["category_id"]] for row in rows]


def rows_of(found: detection.Detections) -> list[list[float]]:
    boxes = found.boxes_xyxy
    assert found.names == [NAMES[kind] for kind in found.classes.tolist()]
    sides = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2], found.scores[:, None], found.classes[:, None]], 1)
    return sides.tolist()


def test_any_kind_of_image_gives_what_detect_finds(
    small_weights: Path, exported: Path, picture: Path, wanted: list[list[float]]
) -> None:
    with Image.open(picture) as image:
        pillow = image.convert("RGB")
    array = np.asarray(pillow)
    predictor = detection.load(small_weights, img=64, num_cores=1)
    for image in (picture, str(picture), pillow, array, torch.from_numpy(array.copy()).permute(2, 0, 1)):
        assert rows_of(predictor.predict(image, conf=0.02)) == pytest.approx(np.array(wanted), abs=1e-3)
    grey = np.asarray(pillow.convert("L"))
    in_colours = predictor.predict(np.repeat(grey[..., None], 3, 2), conf=0.001)
    assert rows_of(predictor.predict(grey, conf=0.001)) == rows_of(in_colours)
    kind = int(wanted[0][5])
    assert rows_of(predictor.predict(picture, conf=0.02, classes=[NAMES[kind]], max_det=1)) == pytest.approx(
        np.array(wanted[:1]), abs=1e-3
    )
    for weights, engine in ((exported / "net.onnx", None), (small_weights, "onnxruntime")):
        found = detection.load(weights, engine, img=64).predict(picture, conf=0.02)
        assert rows_of(found) == pytest.approx(np.array(wanted), abs=0.01)


def test_what_is_no_image_is_told(exported: Path, tmp_path: Path) -> None:
    predictor = detection.load(exported / "net.onnx")
    with pytest.raises(SlimError, match=r"an image of float32 \[64, 64, 3\], expected uint8 \[H, W, 3\]"):
        predictor.predict(np.zeros((64, 64, 3), np.float32))
    with pytest.raises(SlimError, match=r"expected uint8 \[3, H, W\]"):
        predictor.predict(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"none\.png"):
        predictor.predict(tmp_path / "none.png")
    with pytest.raises(SlimError, match="--classes dog"):
        predictor.predict(np.zeros((64, 64, 3), np.uint8), classes=["dog"])


@pytest.mark.parametrize(("example", "kind"), [("onnx_runtime.py", "onnx"), ("open_vino.py", "openvino")])
def test_the_engines_alone(
    example: str, kind: str, small_weights: Path, picture: Path, script: Runner, tiny: Path, tmp_path: Path
) -> None:
    """Of a network that is surer of itself than so short a training makes it, and on a picture wider than high."""
    network = read_network(small_weights)
    with torch.no_grad():
        for conv in network.model.detect.m:
            conv.bias.view(len(SMALL_ANCHORS[0]) // 2, -1)[:, 4:] += 2  # type: ignore[union-attr]
    save_network(tmp_path / "sure.pt", network.model, network.build)
    with Image.open(picture) as image:
        image.convert("RGB").crop((0, 16, 64, 48)).save(tmp_path / "wide.png")
    suffix = {"onnx": ".onnx", "openvino": ".xml"}[kind]
    given = ("--weights", tmp_path / "sure.pt", "--include", kind, "--img", 64, "--nms", "--data", tiny)
    done = script("export", *given, "--out", tmp_path / f"net{suffix}", "--project", tmp_path)
    assert done.code == 0, done.err
    found = detection.load(tmp_path / f"net{suffix}").predict(tmp_path / "wide.png")
    printed = [line.split() for line in run(example, tmp_path, f"net{suffix}", "wide.png").splitlines()]
    assert [line[0] for line in printed] == found.names and len(printed) > 1
    numbers = torch.tensor([[float(word) for word in line[1:]] for line in printed])
    assert torch.allclose(numbers[:, 0], found.scores, atol=0.001)
    clipped = torch.minimum(numbers[:, 1:].clamp(min=0), torch.tensor([64.0, 32, 64, 32]))
    assert torch.allclose(clipped, found.boxes_xyxy, atol=0.5)
