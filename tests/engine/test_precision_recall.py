"""Precision, recall, F1, the suggested confidence and confusions of boxes whose matches anybody can count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine import PrecisionRecall, coco_ap, count_confusions, measure_precision_recall
from tests.engine.test_evaluation import NAMES, truth

A, B, C, FAR = [0, 0, 10, 10], [50, 50, 10, 10], [20, 20, 10, 10], [80, 80, 10, 10]


def found(image: int, cls: int, box: list[Any], score: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": 7 + cls, "bbox": box, "score": score}


def scene() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Two cats and a dog, and a crowd of cats; on the second image a cat that is missed."""
    ground_truth = truth(2, (0, 0, A), (0, 0, B), (0, 1, C), (0, 0, [60, 0, 30, 30]), (1, 0, A))
    ground_truth["annotations"][3]["iscrowd"] = 1
    detections = [
        found(0, 0, A, 0.9),
        found(0, 0, [65, 5, 10, 10], 0.8),  # in the crowd
        found(0, 0, C, 0.7),  # the dog
        found(0, 0, B, 0.6),
        found(0, 1, FAR, 0.5),  # nothing is there
        found(1, 2, B, 0.4),  # nor there
        found(0, 1, C, 0.3),
    ]
    return ground_truth, detections


def at(measured: PrecisionRecall, conf: float) -> list[tuple[float, float, float]]:
    """Precision, recall and F1 of each class."""
    place = int(np.argmin(np.abs(measured.thresholds - conf)))
    assert measured.thresholds[place] == pytest.approx(conf)
    return [
        (float(measured.precision[k, place]), float(measured.recall[k, place]), float(measured.f1[k, place]))
        for k in range(len(measured.names))
    ]


def test_curves_by_hand() -> None:
    measured = measure_precision_recall(*scene(), NAMES)
    assert (measured.names, measured.objects) == (("cat", "dog"), (3, 1)), "no crowd, and no class without an object"
    wanted = {
        0.299: [(2 / 3, 2 / 3, 2 / 3), (1 / 2, 1, 2 / 3)],
        0.3: [(2 / 3, 2 / 3, 2 / 3), (0, 0, 0)],  # a score must be exceeded, as in the suppression
        0.599: [(2 / 3, 2 / 3, 2 / 3), (0, 0, 0)],
        0.6: [(1 / 2, 1 / 3, 2 / 5), (0, 0, 0)],
        0.75: [(1, 1 / 3, 1 / 2), (0, 0, 0)],
        0.9: [(0, 0, 0), (0, 0, 0)],
    }
    for conf, rows in wanted.items():
        assert at(measured, conf) == [pytest.approx(row) for row in rows], conf
    assert measured.thresholds[0] == pytest.approx(0.299), "nothing is known of scores below the lowest"
    assert measured.conf == 0.299
    metrics = measured.metrics()["at_conf"]
    assert [metrics[key] for key in ("precision", "recall", "f1")] == pytest.approx([7 / 12, 5 / 6, 2 / 3])
    # The dog is found at precision 1/2 at every recall, two of three cats at 1 up to 1/3 and 2/3 up to 2/3.
    assert metrics["per_class"]["dog"] == pytest.approx(
        {"objects": 1, "precision": 0.5, "recall": 1, "f1": 2 / 3, "ap50": 0.5}
    )
    assert metrics["per_class"]["cat"]["ap50"] == pytest.approx((34 + 33 * 2 / 3) / 101)
    lines = measured.table({"cat": 0.25, "dog": 0.75}).splitlines()
    assert lines[1].split() == ["all", "4", "0.5833", "0.8333", "0.6667", "0.5272", "0.5000"]
    assert lines[3].split() == ["dog", "1", "0.5000", "1.0000", "0.6667", "0.5000", "0.7500"]
    assert "--conf 0.299" in lines[4]


def test_confusions_by_hand() -> None:
    ground_truth, detections = scene()
    cat, dog, ghost, background = [2, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [0, 2, 1, 0]
    assert count_confusions(ground_truth, detections, 0.299).tolist() == [cat, dog, ghost, background]
    cat, dog, background = [1, 0, 0, 2], [1, 0, 0, 0], [0, 0, 0, 0]
    assert count_confusions(ground_truth, detections, 0.6).tolist() == [cat, dog, ghost, background]
    cat, dog = [1, 0, 0, 2], [0, 0, 0, 1]
    assert count_confusions(ground_truth, detections, 0.8).tolist() == [cat, dog, ghost, background], (
        "no crowd is missed"
    )


def test_a_perfect_detector_and_the_middle_of_equally_good_confidences() -> None:
    ground_truth = truth(2, (0, 0, A), (0, 1, B), (1, 2, C), (1, 0, FAR))
    detections = [found(0, 0, A, 0.9), found(0, 1, B, 0.8), found(1, 2, C, 0.85), found(1, 0, FAR, 0.95)]
    measured = measure_precision_recall(ground_truth, detections, NAMES)
    assert at(measured, 0.799) == [(1, 1, 1)] * 3 and measured.conf == 0.799
    with_false = [*detections, found(0, 2, [30, 70, 10, 10], 0.3)]
    measured = measure_precision_recall(ground_truth, with_false, NAMES)
    assert measured.conf == 0.549, "between 0.300 and 0.799"
    assert [measured.metrics()["at_conf"][key] for key in ("precision", "recall", "f1")] == [1, 1, 1]
    assert count_confusions(ground_truth, with_false, 0.549).tolist() == np.diag([2, 1, 1, 0]).tolist()


def test_one_matching_is_that_of_every_confidence() -> None:
    """Crowded boxes of three classes: what a curve says of a confidence is what the detections above it give alone."""
    random = np.random.default_rng(3)
    sides = [[*map(float, corner), 10.0, 10.0] for corner in random.integers(0, 40, (120, 2))]
    boxes = [
        (int(image), int(cls), side) for image, cls, side in zip(*random.integers(0, 3, (2, 60)), sides, strict=False)
    ]
    ground_truth = truth(3, *boxes)
    for crowd in ground_truth["annotations"][::11]:
        crowd["iscrowd"] = 1
    places = zip(*random.integers(0, 3, (2, 120)), sides, random.random(120).tolist(), strict=True)
    detections = [found(int(image), int(cls), side, score) for image, cls, side, score in places]
    measured = measure_precision_recall(ground_truth, detections, NAMES)
    for conf in (0.1, 0.3, 0.6, 0.9):
        alone = measure_precision_recall(ground_truth, [one for one in detections if one["score"] > conf], NAMES)
        lowest = float(alone.thresholds[0])
        assert at(measured, conf) == at(alone, lowest), conf
        assert 0 < at(measured, conf)[0][0] < 1
    _, ap50, *_ = coco_ap(ground_truth, detections, NAMES)
    assert measured.envelope.mean() == pytest.approx(ap50, abs=1e-12)


def test_nothing_found_and_nothing_right() -> None:
    ground_truth = truth(1, (0, 0, A), (0, 1, B))
    for detections in ([], [found(0, 0, FAR, 0.5)]):
        measured = measure_precision_recall(ground_truth, detections, NAMES)
        metrics = measured.metrics()["at_conf"]
        assert (
            measured.metrics()["suggested_conf"] is None
            and metrics["precision"] == metrics["recall"] == metrics["f1"] == 0
        )
        assert "no --conf to suggest" in measured.table({"cat": 0.0, "dog": 0.0})
        wanted = [[0, 0, 0, 1], [0, 0, 0, 1], [0] * 4, [len(detections), 0, 0, 0]]
        assert count_confusions(ground_truth, detections, 0.0).tolist() == wanted


def test_of_a_crowded_image_ap_counts_a_hundred_and_the_matrix_all() -> None:
    boxes = [[2 * float(k % 40), 5 * float(k // 40), 2.0, 5.0] for k in range(120)]
    ground_truth = truth(1, *((0, 0, box) for box in boxes))
    detections = [found(0, 0, box, 0.9 - k / 1000) for k, box in enumerate(boxes)]
    measured = measure_precision_recall(ground_truth, detections, NAMES)
    assert measured.metrics()["at_conf"]["recall"] == pytest.approx(100 / 120)
    assert count_confusions(ground_truth, detections, 0.5)[0, 0] == 120
