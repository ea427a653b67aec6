"""What was found, as YOLO's text and as COCO's results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detection.video.writer import DetectionFiles

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
