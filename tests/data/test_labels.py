"""Every way in which a label file can be wrong, and what is said about it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from data import DataConfig, DataError, DetectionDataset
from data.labels import label_path, parse_label, read_labels
from tests.data.scenes import rectangle, write_set

GOOD = "1 0.5 0.25 0.2 0.1"
BAD = {
    "one 0.5 0.5 0.2 0.2": "found 'one 0.5 0.5 0.2 0.2', expected numbers",
    "1 0.5 nan 0.2 0.2": "found '1 0.5 nan 0.2 0.2', expected finite numbers",
    "1 0.5 0.5 inf 0.2": "found '1 0.5 0.5 inf 0.2', expected finite numbers",
    "1 0.5 0.5 0.2": "found 4 fields, expected 5 (class cx cy w h) or a polygon (class x1 y1 x2 y2 ...)",
    "1 0.5 0.5 0.2 0.2 0.9": "found 6 fields, expected 5 (class cx cy w h) or a polygon (class x1 y1 x2 y2 ...)",
    "1 0.5 1.02 0.2 0.2": "centre y 1.02, expected 0 to 1 (a fraction of the image)",
    "1 0.5 0.5 0.2 1.02": "height 1.02, expected 0 to 1 (a fraction of the image)",
    "1 320 240 64 48": "centre x 320, expected 0 to 1 (a fraction of the image)",
    "1 0.5 0.5 -0.2 0.2": "width -0.2, expected 0 to 1 (a fraction of the image)",
    "1 1.2 0.1 0.9 0.1 1.2 0.4": "centre x 1.05, expected 0 to 1 (a fraction of the image)",
    "1 0.1 0.1 1.3 0.1 0.3 0.4": "width 1.2, expected 0 to 1 (a fraction of the image)",
    "1 100 200 300 200 300 400": "centre x 200, expected 0 to 1 (a fraction of the image)",
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


@pytest.mark.parametrize(
    ("line", "row"),
    [
        ("0 0.9 0.5 0.4 1.0000001", (0, 0.85, 0.5, 0.3, 1.0)),
        ("0 1.0021 0.5 0.4 0.2", (0, 0.90105, 0.5, 0.1979, 0.2)),
        ("0 -0.005 0.5 0.1 1.009", (0, 0.0225, 0.5, 0.045, 1.0)),
        ("0 0.8 0.2 1.0021 0.2 1.0021 0.6", (0, 0.9, 0.4, 0.2, 0.4)),
        ("0 -0.2 0.2 0.4 0.2 0.4 0.6", (0, 0.2, 0.4, 0.4, 0.4)),
    ],
)
def test_what_reaches_over_the_edge_is_clipped(line: str, row: tuple[float, ...]) -> None:
    """Boxes and the boxes around polygons alike."""
    assert parse_label(line, 1) == pytest.approx(row)


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
    file = tmp_path / "labels" / "train" / "a.txt"
    with pytest.raises(DataError) as error:
        dataset.check_objects()
    assert str(error.value) == (
        f"split 'train': no object in its 1 images; of their 1 label files 1 do not exist, such as {file}; put the labels "
        "there, or correct the data.yaml"
    )
    file.touch()
    with pytest.raises(DataError, match="of their 1 label files all exist, but none holds one, such as "):
        DetectionDataset(DataConfig(("a",), train=(tmp_path / "images",)), "train", 32).check_objects()
    file.write_text("0 0.5 0.5 0.2 0.2")
    DetectionDataset(DataConfig(("a",), train=(tmp_path / "images",)), "train", 32).check_objects()


@pytest.mark.parametrize("wrong", ["7", "-1", "1.5"])
def test_classes_out_of_range_are_counted_and_an_error(tmp_path: Path, wrong: str) -> None:
    image = rectangle(32, 32, (8, 8, 20, 20))
    lines = {"a": ["0 0.5 0.5 0.2 0.2", f"{wrong} 0.5 0.5 0.2 0.2"], "b": ["2 0.5 0.5 0.2 0.2", GOOD]}
    with pytest.raises(DataError) as error:
        DetectionDataset(write_set(tmp_path, {"a": image, "b": image}, lines, num_classes=2), "train", 32)
    file = tmp_path / "labels" / "train" / "a.txt"
    assert str(error.value) == (
        "split 'train': 2 of 4 labels are of none of the 2 classes that the data.yaml names; the first: "
        f"{file}:2: class {wrong}, expected 0 to 1; correct names and nc, or the labels"
    )


def test_labels_in_pixels_are_an_error_not_an_empty_set(tmp_path: Path) -> None:
    image = rectangle(32, 32, (8, 8, 20, 20))
    with pytest.raises(DataError, match=r"^split 'train': not one of its labels can be used: 1 problems, the first: "):
        lines = ["1 16 16 12 12", "0 16 16 12 12"]
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


@pytest.mark.parametrize(
    "content", [b"0 0.5 0.5 0.2 0.2 0.9\n" * 12, "0 0.5 0.5 0.2 0.2\n".encode("utf-16"), b"0 0.5 0.5 0 0\n"]
)
def test_an_image_of_whose_lines_none_can_be_used_is_left_out(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    found = read_labels(file, 1)
    assert found.unusable and len(found.rows) == 0 and len(found.problems) == 1 and "the image" in found.problems[0]
    file.write_bytes(b"0 0.5 0.5 0.2 0.2\n1 2 3\n")
    found = read_labels(file, 1)
    assert not found.unusable and len(found.rows) == 1 and "the image" not in found.problems[-1]


def test_an_image_without_a_usable_line_is_no_background(tmp_path: Path) -> None:
    image = rectangle(32, 32, (8, 8, 20, 20))
    config = write_set(tmp_path, {"a": image, "b": image, "c": image}, {"a": [GOOD], "b": ["1 2 3", "4"], "c": [" "]})
    dataset = DetectionDataset(config, "train", 32)
    assert [file.stem for file in dataset.files] == ["a", "c"]
    assert dataset.problems == [
        f"{tmp_path / 'labels' / 'train' / 'b.txt'}:1: found 3 fields, expected 5 (class cx cy w h) or a polygon (class x1 y1 "
        "x2 y2 ...); the line was left out, and as no other can be used, the image"
    ]
