"""The AP of any resample is pycocotools'; differences over resamples are paired and, on two images, known by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from engine import coco_ap, match_detections
from experiments.bootstrap import ImageMatches, append_bootstrap_rows, bootstrap_difference
from experiments.comparisons import PAIR_COLUMNS
from slim import SlimError

NAMES = ["a", "b", "found in no image", "in no image"]
IMAGES = 12


def objects(boxes: list[tuple[int, int, list[float], int]], images: int, classes: int = 1) -> dict[str, Any]:
    """A COCO dict of (image, class, box, crowd)."""
    return {
        "images": [{"id": i, "width": 100, "height": 100} for i in range(images)],
        "annotations": [
            {"id": k, "image_id": i, "category_id": c, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
            for k, (i, c, box, crowd) in enumerate(boxes, start=1)
        ],
        "categories": [{"id": c, "name": NAMES[c]} for c in range(classes)],
    }


def drawn(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Objects of three of four classes, crowds among them, none in the last image; detections of two, some good."""
    truth = np.random.default_rng(0)
    boxes = [
        (i, int(truth.integers(3)), [*truth.uniform(0, 60, 2).tolist(), 30.0, 30.0], int(truth.random() < 0.1))
        for i in range(IMAGES - 1)
        for _ in range(4)
    ]
    noise = np.random.default_rng(seed)
    found = [
        {"image_id": i, "category_id": c % 2, "bbox": (np.array(box) + noise.normal(0, 3, 4)).tolist(), "score": score}
        for (i, c, box, _), score in zip(boxes * 2, noise.random(2 * len(boxes)).tolist(), strict=True)
    ]
    return objects(boxes, IMAGES, len(NAMES)), found


def test_all_images_once_are_pycocotools_ap() -> None:
    truth, found = drawn(1)
    ap, *_ = coco_ap(truth, found, NAMES)
    assert 0.1 < ap < 0.9
    assert ImageMatches(truth, found).ap(np.ones(IMAGES, dtype=np.int64)) == pytest.approx(ap, abs=1e-12)


def test_any_resample_is_pycocotools_ap_of_the_same_images() -> None:
    truth, found = drawn(2)
    matches, matching = ImageMatches(truth, found), match_detections(truth, found)
    once = np.array(matching.evalImgs, dtype=object).reshape(-1, IMAGES)
    aps = set()
    for seed in range(10):
        positions = np.random.default_rng(seed).integers(IMAGES, size=IMAGES)
        matching.evalImgs = once[:, positions].ravel().tolist()
        matching.accumulate()
        matching.summarize()
        aps.add(float(matching.stats[0]))
        counts = np.bincount(positions, minlength=IMAGES)
        assert matches.ap(counts) == pytest.approx(matching.stats[0], abs=1e-12)
    assert len(aps) == 10


def test_the_same_detections_never_differ() -> None:
    """On resamples of their own they would."""
    matches = ImageMatches(*drawn(3))
    found = bootstrap_difference(matches, matches, resamples=50)
    assert (found.difference, found.low, found.high, found.resamples) == (0, 0, 0, 50)


def two_images() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An object in each, both found."""
    box = [10.0, 10.0, 20.0, 20.0]
    found = [{"image_id": i, "category_id": 0, "bbox": box, "score": 0.9} for i in range(2)]
    return objects([(i, 0, box, 0) for i in range(2)], 2), found


def test_a_difference_that_is_known_by_hand() -> None:
    """The reference misses the second image's object: of the draws 00, 01 or 10, and 11 the differences are 0, 50/101, 1."""
    truth, found = two_images()
    sample, reference = ImageMatches(truth, found), ImageMatches(truth, found[:1])
    result = bootstrap_difference(sample, reference, resamples=400, seed=0)
    assert (result.low, result.high) == (0, 1)
    assert result.difference == pytest.approx(0.25 * 0 + 0.5 * 50 / 101 + 0.25 * 1, abs=0.05)
    assert result == bootstrap_difference(sample, reference, resamples=400, seed=0)
    opposite = bootstrap_difference(reference, sample, resamples=400, seed=0)
    assert opposite.difference == pytest.approx(-result.difference)


def test_no_detection_is_ap_0_and_no_object_an_error() -> None:
    truth, found = two_images()
    assert ImageMatches(truth, []).ap(np.array([1, 1])) == 0
    with pytest.raises(SlimError, match="no labelled box in 2 images"):
        ImageMatches(objects([], 2), found)
    with pytest.raises(SlimError, match="at least two"):
        one = ImageMatches(objects([(0, 0, [1.0, 1.0, 5.0, 5.0], 0)], 1), [])
        bootstrap_difference(one, one)


def test_rows_are_appended_once(tmp_path: Path) -> None:
    truth, found = two_images()
    read = []

    def predictions(run: str) -> list[dict[str, Any]]:
        read.append(run)
        return found if run == "a1" else found[:1]

    def pair(run: str, against: str) -> pd.DataFrame:
        facts = ("grid", "0.3", "", 1, "bccd", "val", "l1", "gate", run, against)
        return pd.DataFrame([facts], columns=list(PAIR_COLUMNS))

    path = tmp_path / "results" / "bootstrap.csv"
    assert append_bootstrap_rows(path, truth, pair("a1", "b1"), predictions, resamples=100) == 1
    first = path.read_text()
    assert first.splitlines()[0] == (
        "grid,keep,axes,seed,data,split,method,against,difference,low,high,resamples,hash,against_hash"
    )
    row = dict(zip(*(line.split(",") for line in first.splitlines()), strict=True))
    assert (row["keep"], row["seed"], row["low"], row["high"]) == ("0.3", "1", "0.000000", "1.000000")
    assert (row["resamples"], row["hash"], row["against_hash"]) == ("100", "a1", "b1")

    two = pd.concat([pair("a1", "b1"), pair("c1", "b1"), pair("c1", "b1")])
    assert append_bootstrap_rows(path, truth, two, predictions, resamples=100) == 1
    assert path.read_text().startswith(first) and len(path.read_text().splitlines()) == 3
    assert append_bootstrap_rows(path, truth, two, predictions, resamples=100) == 0
    assert read == ["a1", "b1", "c1", "b1"]
