"""What was found, as YOLO's text and as COCO's results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data.images import read_image
from detection.video.writer import DetectionFiles, write_crops

ROW = (10.0, 20.0, 50.0, 40.0, 0.875, 1.0)


def test_text_and_json_of_images_and_frames(tmp_path: Path) -> None:
    with DetectionFiles(tmp_path, ["cat", "hund ä"], text=True, scores=True, as_json=True) as files:
        files.add("some/a.jpg", "a", None, [ROW, (0, 0, 100, 80, 0.5, 0)], (80, 100))
        files.add("b.mp4", "b", 0, [], (80, 100))
        files.add("b.mp4", "b", 1, [ROW], (40, 100))
        assert not (tmp_path / "detections.json").exists()
    labels = {path.name: path.read_text() for path in (tmp_path / "labels").iterdir()}
    assert labels == {
        "a.txt": "1 0.300000 0.375000 0.400000 0.250000 0.875000\n0 0.500000 0.500000 1.000000 1.000000 0.500000\n",
        "b_1.txt": "",
        "b_2.txt": "1 0.300000 0.750000 0.400000 0.500000 0.875000\n",
    }
    found = json.loads((tmp_path / "detections.json").read_text())
    assert found[0] == {
        "image_id": 0,
        "file": "some/a.jpg",
        "category_id": 1,
        "name": "hund ä",
        "bbox": [10, 20, 40, 20],
        "score": 0.875,
    }
    assert [(row["image_id"], row.get("frame")) for row in found] == [(0, None), (0, None), (2, 1)]
    assert (files.pictures, files.detections) == (3, 3)


def test_only_what_is_asked_for_and_none_at_all(tmp_path: Path) -> None:
    with DetectionFiles(tmp_path, ["cat"], text=False, scores=False, as_json=False) as files:
        files.add("a.jpg", "a", None, [], (80, 100))
    assert not list(tmp_path.iterdir())
    with DetectionFiles(tmp_path, ["cat", "dog"], text=True, scores=False, as_json=True) as files:
        files.add("a.jpg", "a", None, [], (80, 100))
    assert json.loads((tmp_path / "detections.json").read_text()) == []


def test_an_error_keeps_what_came_before_it(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        DetectionFiles(tmp_path, ["cat", "dog"], text=False, scores=False, as_json=True) as files,
    ):
        files.add("a.jpg", "a", None, [ROW], (80, 100))
        raise ZeroDivisionError
    assert len(json.loads((tmp_path / "detections.json").read_text())) == 1


def test_crops_by_class_a_little_wider_than_the_boxes(tmp_path: Path) -> None:
    """2 % and 10 pixels in all, cut at the edges; in the colours of what lies there."""
    pixels = torch.zeros(3, 80, 100, dtype=torch.uint8)
    pixels[0, 20:40, 10:50] = 200
    rows = [
        ROW,
        (60.0, 50.0, 80.0, 70.0, 0.5, 1.0),
        (0.0, 0.0, 10.0, 10.0, 0.4, 0.0),
        (95.0, 75.0, 100.0, 80.0, 0.3, 1.0),
    ]
    write_crops(tmp_path, "a", rows, ["../c:t", "dog"], pixels)
    write_crops(tmp_path, "b_1", rows[1:2], ["../c:t", "dog"], pixels)
    sizes = {
        file.relative_to(tmp_path).as_posix(): tuple(read_image(file).shape[1:]) for file in tmp_path.rglob("*.jpg")
    }
    assert sizes == {
        "dog/a.jpg": (31, 51),  # from 14.8 to 45.2 and from 4.6 to 55.4
        "dog/a2.jpg": (31, 31),
        "dog/a3.jpg": (11, 11),
        "dog/b_1.jpg": (31, 31),
        "_c_t/a.jpg": (15, 15),
    }
    red = read_image(tmp_path / "dog" / "a.jpg")[0].float()
    assert red[8:24, 8:44].mean() > 190 > 10 > red[:3].mean()
