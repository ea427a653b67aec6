"""Every way in which a label file can be wrong, and what is said about it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from data import DataError, DetectionDataset
from data.labels import label_path, parse_label, read_labels
from tests.data.scenes import rectangle, write_set

GOOD = "1 0.5 0.25 0.2 0.1"
BAD = {
    "one 0.5 0.5 0.2 0.2": "found 'one 0.5 0.5 0.2 0.2', expected numbers",
    "1 0.5 nan 0.2 0.2": "found '1 0.5 nan 0.2 0.2', expected finite numbers",
    "1 0.5 0.5 inf 0.2": "found '1 0.5 0.5 inf 0.2', expected finite numbers",
    "1 0.5 0.5 0.2": "found 4 fields, expected 5 (class cx cy w h) or a polygon (class x1 y1 x2 y2 ...)",
    "1 0.5 0.5 0.2 0.2 0.9": "found 6 fields, expected 5 (class cx cy w h) or a polygon (class x1 y1 x2 y2 ...)",
    "4 0.5 0.5 0.2 0.2": "class 4, expected 0 to 3",
    "-1 0.5 0.5 0.2 0.2": "class -1, expected 0 to 3",
    "1.5 0.5 0.5 0.2 0.2": "class 1.5, expected 0 to 3",
    "1 0.5 1.01 0.2 0.2": "coordinate 1.01, expected 0 to 1 (a fraction of the image)",
    "1 320 240 64 48": "coordinate 320, expected 0 to 1 (a fraction of the image)",
    "1 0.5 0.5 -0.2 0.2": "coordinate -0.2, expected 0 to 1 (a fraction of the image)",
    "1 0.5 0.5 0 0.2": "a box of zero area",
    "1 0.1 0.1 0.2 0.1 0.3 0.1": "a box of zero area",
    GOOD: "the same object twice",
}


@pytest.mark.parametrize(("line", "reason"), BAD.items())
def test_a_bad_line_is_named_and_left_out(tmp_path: Path, line: str, reason: str) -> None:
    image = rectangle(32, 32, (8, 8, 20, 20))
    config = write_set(tmp_path, {"a": image, "b": image}, {"a": [GOOD], "b": [GOOD, "", line, "0 0.5 0.5 1 1"]})
    dataset = DetectionDataset(config, "train", 32)
    file = tmp_path / "labels" / "train" / "b.txt"
    assert dataset.problems == [f"{file}:3: {reason}; the line was left out"]
    assert dataset[1].targets[:, 0].tolist() == [1, 0]


def test_a_polygon_becomes_its_box() -> None:
    assert parse_label("2 0.1 0.5 0.3 0.2 0.6 0.4 0.2 0.9", 3) == pytest.approx((2, 0.35, 0.55, 0.5, 0.7))


def test_a_box_is_clipped_to_the_image_and_rounding_is_forgiven() -> None:
    assert parse_label("0 0.9 0.5 0.4 1.0000001", 1) == pytest.approx((0, 0.85, 0.5, 0.3, 1.0))


def test_a_file_with_windows_marks_reads_like_any(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n")
    read = read_labels(tmp_path / "a.txt", 2)
    np.testing.assert_allclose(read.rows, [[1, 0.5, 0.25, 0.2, 0.1]], atol=1e-6)
    assert read.problems == () and read.rows.dtype == np.float64


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    read = read_labels(tmp_path / "a.txt", 2)
    assert len(read.rows) == 0 and read.problems[0].startswith(f"{tmp_path / 'a.txt'}: cannot be read as text")


def test_a_missing_or_empty_file_means_background(tmp_path: Path) -> None:
    image = rectangle(32, 32, (8, 8, 20, 20))
    config = write_set(tmp_path, {"a": image, "b": image, "c": image}, {"a": [GOOD], "b": [""]})
    dataset = DetectionDataset(config, "train", 32)
    assert [len(dataset[i].targets) for i in range(3)] == [1, 0, 0]
    assert dataset.problems == []
    assert dataset[2].targets.shape == (0, 5)


def test_a_set_without_any_label_is_background(tmp_path: Path) -> None:
    dataset = DetectionDataset(write_set(tmp_path, {"a": rectangle(32, 32, (8, 8, 20, 20))}, {}), "train", 32)
    assert len(dataset) == 1 and dataset.ground_truth()["annotations"] == []


def test_classes_that_are_all_out_of_range_mean_a_wrong_class_count(tmp_path: Path) -> None:
    image = rectangle(32, 32, (8, 8, 20, 20))
    lines = {"a": ["7 0.5 0.5 0.2 0.2"], "b": ["5 0.5 0.5 0.2 0.2"]}
    with pytest.raises(DataError) as error:
        DetectionDataset(write_set(tmp_path, {"a": image, "b": image}, lines, num_classes=2), "train", 32)
    file = tmp_path / "labels" / "train" / "a.txt"
    assert str(error.value) == (
        "split 'train': the class of every label is outside 0 to 1, so the class count is wrong: the data.yaml names 2 "
        f"classes; for example {file}:1: class 7, expected 0 to 1; the line was left out"
    )


def test_labels_in_pixels_are_an_error_not_an_empty_set(tmp_path: Path) -> None:
    image = rectangle(32, 32, (8, 8, 20, 20))
    with pytest.raises(DataError, match=r"^split 'train': not one of its labels can be used: 2 problems, 1 of them cl"):
        lines = ["1 16 16 12 12", "9 16 16 12 12"]
        DetectionDataset(write_set(tmp_path, {"a": image}, {"a": lines}), "train", 32)


@pytest.mark.parametrize(
    ("image", "labels"),
    [
        ("root/images/train/a.jpg", "root/labels/train/a.txt"),
        ("root/train/images/a.b.png", "root/train/labels/a.b.txt"),
        ("images/x/images/a.jpg", "images/x/labels/a.txt"),
        ("images/a.jpg", "labels/a.txt"),
        ("pictures/images.jpg", "pictures/images.txt"),
    ],
)
def test_where_the_labels_of_an_image_lie(image: str, labels: str) -> None:
    assert label_path(Path(image)) == Path(labels)


@pytest.mark.parametrize("kind", ["pipe", "device", "endless"])
def test_a_label_file_that_never_ends_is_a_problem_and_no_hang(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "a.txt"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        with file.open("wb") as sparse:
            sparse.truncate(1 << 33)
    (problem,) = read_labels(file, 4).problems
    assert problem.startswith(f"{file}: cannot be read as text (")
