"""The synthetic set: the same bytes again, whole or made anew, with labels that fit."""

from __future__ import annotations

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from data import DataError, DetectionDataset, load_data_config, make_shapes
from data.labels import parse_label
from data.shapes import RECORD, SHAPE_NAMES, _paint_shape, draw_scene, make_described_shapes
from tests.data.scenes import ROOT

SMALL = {"train": 4, "val": 2, "test": 1, "image_size_px": 48, "seed": 3}


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def times(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    make_shapes(tmp_path / "one", **SMALL)
    make_shapes(tmp_path / "two", **SMALL)
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "two")
    counts = Counter(Path(name).parent.as_posix() for name in one)
    assert counts == {
        "images/train": 4, "images/val": 2, "images/test": 1, "labels/train": 4, "labels/val": 2, "labels/test": 1, ".": 1,
    }  # fmt: skip
    assert len(set(one.values())) == len(one)


def test_other_seeds_give_other_images(tmp_path: Path) -> None:
    make_shapes(tmp_path / "one", **SMALL)
    make_shapes(tmp_path / "two", **{**SMALL, "seed": 4})
    assert not set(contents(tmp_path / "one").values()) & set(contents(tmp_path / "two").values())


def test_a_whole_set_is_left_alone(tmp_path: Path) -> None:
    make_shapes(tmp_path, **SMALL)
    before = times(tmp_path)
    make_shapes(tmp_path, **SMALL)
    assert times(tmp_path) == before


def test_of_two_at_once_one_draws_and_the_other_waits(tmp_path: Path) -> None:
    root = tmp_path / "shapes"
    with ThreadPoolExecutor(1) as pool:
        with FileLock(tmp_path / "shapes.lock"):
            waiting = pool.submit(make_shapes, root, **SMALL)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.5)
            assert not root.exists()
            make_shapes(tmp_path / "other", **SMALL)
            (tmp_path / "other").rename(root)
            before = times(root)
        waiting.result(timeout=60)
    assert times(root) == before


@pytest.mark.parametrize("interruption", ["no record", "lost image", "lost labels", "damaged record"])
def test_an_interrupted_set_is_made_anew(tmp_path: Path, interruption: str) -> None:
    make_shapes(tmp_path, **SMALL)
    whole = contents(tmp_path)
    image, labels = tmp_path / "images/train/shapes_000000.jpg", tmp_path / "labels/val/shapes_000001.txt"
    if interruption == "lost image":
        image.unlink()
    elif interruption == "lost labels":
        labels.unlink()
    elif interruption == "damaged record":
        (tmp_path / RECORD).write_text("{")
        image.write_bytes(b"")
    else:
        image.write_bytes(b"")
        (tmp_path / RECORD).unlink()
    make_shapes(tmp_path, **SMALL)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("change", [{"train": 2}, {"image_size_px": 64}, {"seed": 1}], ids=str)
def test_other_arguments_make_it_anew(tmp_path: Path, change: dict[str, int]) -> None:
    make_shapes(tmp_path / "changed", **SMALL)
    make_shapes(tmp_path / "changed", **{**SMALL, **change})
    make_shapes(tmp_path / "fresh", **{**SMALL, **change})
    assert contents(tmp_path / "changed") == contents(tmp_path / "fresh")


@pytest.mark.parametrize(
    "name", ["shapes_of_mine.png", "notes.txt", "images/train/shapes_000000.gif", "shapes.json.bak"]
)
def test_foreign_files_are_never_touched(tmp_path: Path, name: str) -> None:
    make_shapes(tmp_path, **SMALL)
    (tmp_path / name).write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(DataError) as error:
        make_shapes(tmp_path, **{**SMALL, "seed": 9})
    assert (
        str(error.value) == f"{tmp_path} is not a set of shapes: found {tmp_path / name}; choose an empty or new folder"
    )
    assert contents(tmp_path) == before


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shapes").write_text("precious")
    with pytest.raises(DataError, match="is not a set of shapes: found a file"):
        make_shapes(tmp_path / "shapes", **SMALL)
    assert (tmp_path / "shapes").read_text() == "precious"


@pytest.mark.parametrize("change", [{"train": -1}, {"image_size_px": 31}, {"seed": -1}], ids=str)
def test_wrong_arguments_are_refused(tmp_path: Path, change: dict[str, int]) -> None:
    with pytest.raises(DataError, match=r"^shapes: .* expected >= 0, >= 32 px, >= 0$"):
        make_shapes(tmp_path / "none", **{**SMALL, **change})
    assert not (tmp_path / "none").exists()


def test_the_set_loads_with_its_description(tmp_path: Path) -> None:
    make_shapes(tmp_path / "shapes", **SMALL)
    config = load_data_config(ROOT / "data" / "shapes.yaml", tmp_path)
    assert config.names == SHAPE_NAMES
    for split in ("train", "val", "test"):
        dataset = DetectionDataset(config, split, 48)
        assert len(dataset) == SMALL[split] and dataset.problems == []
        assert all(len(sample.targets) >= 1 for sample in dataset)


def test_labels_are_valid_and_classes_balanced() -> None:
    scenes = [draw_scene(48, np.random.default_rng(seed)) for seed in range(150)]
    rows = np.concatenate([labels for _, labels in scenes])
    for row in rows.tolist():
        written = f"{int(row[0])} " + " ".join(f"{value:.6f}" for value in row[1:])
        assert parse_label(written, 4) == pytest.approx(row, abs=2e-6)
    assert {len(labels) for _, labels in scenes} <= set(range(3, 11)) and 6 < len(rows) / len(scenes) < 7
    shares = np.bincount(rows[:, 0].astype(int), minlength=4) / len(rows)
    assert shares.min() > 0.18 and shares.max() < 0.32
    sides = rows[:, 3:] * 48
    assert sides.min() >= 5 and sides.max() <= 2 * 0.22 * 48 + 2


@pytest.mark.parametrize("kind", range(4), ids=SHAPE_NAMES)
def test_boxes_fit_what_is_drawn(kind: int) -> None:
    """Against the pixels that differ from a plain canvas by half of the largest difference."""
    for seed in range(12):
        rng = np.random.default_rng(seed)
        canvas = np.full((96, 96, 3), 128, np.float32)
        cx, cy, w, h = _paint_shape(canvas, kind, (rng.uniform(0.15, 0.85), rng.uniform(0.15, 0.85), 0.18), rng)
        change = np.abs(canvas - 128).max(axis=2)
        ys, xs = np.nonzero(change > np.median(change[change > 0]) / 2)
        seen = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        box = np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]) * 96
        assert np.abs(seen - box).max() <= 1.001


def test_the_four_shapes_are_about_equally_large() -> None:
    areas = []
    for kind in range(4):
        canvas = np.full((128, 128, 3), 128, np.float32)
        _paint_shape(canvas, kind, (0.5, 0.5, 0.3), np.random.default_rng(0))
        areas.append(int((np.abs(canvas - 128).max(axis=2) > 30).sum()))
    assert max(areas) < 1.4 * min(areas) and min(areas) > 0.3 * math.pi * (0.3 * 128) ** 2


def test_a_described_set_is_drawn_where_the_description_lets_it_be(tmp_path: Path) -> None:
    file = tmp_path / "anything.yaml"
    file.write_text("path: mine\nsynthetic: {train: 2, val: 1, test: 0, image_size_px: 32}\n")
    assert make_described_shapes(file, tmp_path / "root") is True
    assert len(list((tmp_path / "root" / "mine" / "images").rglob("*.jpg"))) == 3


def test_a_set_that_is_called_shapes_is_not_drawn(tmp_path: Path) -> None:
    file = tmp_path / "shapes.yaml"
    file.write_text("path: shapes\ntrain: images\nnames: [a]\n")
    assert make_described_shapes(file, tmp_path / "root") is False
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("value", ["shapes", "true", "{train: many}", "{images: 3}", "{train: true}"])
def test_another_synthetic_set_is_refused(tmp_path: Path, value: str) -> None:
    file = tmp_path / "set.yaml"
    file.write_text(f"path: set\nsynthetic: {value}\n")
    with pytest.raises(
        DataError, match=r"set\.yaml: synthetic is .*, expected whole numbers for some of train, val, test"
    ):
        make_described_shapes(file, tmp_path / "root")
    assert not (tmp_path / "root").exists()
