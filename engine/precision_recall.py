"""Precision, recall and F1 against the confidence, and which class is taken for which, from pycocotools' matches."""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .evaluation import CocoDict, match_detections

IOU = 0.5
"""At which a detection is right."""
Floats = NDArray[np.float64]
_THRESHOLDS = np.arange(1000, dtype=np.float32) / np.float32(1000)
"""Confidences with three decimals, in the precision of scores: what exceeds them here exceeds them in the suppression."""


@dataclass(frozen=True, eq=False)
class PrecisionRecall:
    """What a detector is worth at each confidence, 0..1, at IoU 0.5.

    Attributes:
        names: of the K classes of which there is an object
        objects: how many there are of each, crowds left out
        thresholds: [T] confidences, of which detections must exceed one
        precision: [K, T] share of right detections; 0 where there is no detection
        recall: [K, T] share of the objects that are found
        f1: [K, T] harmonic mean of the two
        recall_points: [R] recalls of COCO's interpolated curve
        envelope: [K, R] best precision at that recall or a higher one; its mean is AP50
        best: the position in ``thresholds`` where the mean of ``f1`` over the classes is largest; None where nothing is right
    """

    names: tuple[str, ...]
    objects: tuple[int, ...]
    thresholds: Floats
    precision: Floats
    recall: Floats
    f1: Floats
    recall_points: Floats
    envelope: Floats
    best: int | None

    @property
    def conf(self) -> float | None:
        """The confidence to suggest: where the mean F1 of the classes is largest."""
        return None if self.best is None else round(float(self.thresholds[self.best]), 3)

    def metrics(self) -> dict[str, Any]:
        """Entries of `metrics.json`: the suggested confidence, and at it the classes' means and each class."""
        at = self.best or 0
        curves = {"precision": self.precision, "recall": self.recall, "f1": self.f1}
        of_class = {
            name: {"objects": count, **{key: float(curve[k, at]) for key, curve in curves.items()}, "ap50": ap50}
            for k, (name, count, ap50) in enumerate(
                zip(self.names, self.objects, map(float, self.envelope.mean(1)), strict=True)
            )
        }
        means = {key: float(curve[:, at].mean()) for key, curve in curves.items()}
        return {"suggested_conf": self.conf, "at_conf": {**means, "per_class": of_class}}

    def table(self, per_class_ap: Mapping[str, float]) -> str:
        """A line for all classes and one for each, and the suggestion; ``per_class_ap``: AP by class name."""
        found, width = self.metrics()["at_conf"], max(map(len, ("class", *self.names)))
        lines = [f"{'class':{width}} {'objects':>8} {'P':>7} {'R':>7} {'F1':>7} {'AP50':>7} {'AP':>7}"]
        means = {"objects": sum(self.objects), "ap50": self.envelope.mean(), **found}
        rows = {"all": (means, float(np.mean([per_class_ap[name] for name in self.names])))}
        rows |= {name: (row, per_class_ap[name]) for name, row in found["per_class"].items()}
        for name, (row, ap) in rows.items():
            figures = (*(row[key] for key in ("precision", "recall", "f1", "ap50")), ap)
            lines.append(f"{name:{width}} {row['objects']:8d} " + " ".join(f"{figure:7.4f}" for figure in figures))
        if self.conf is None:
            return "\n".join([*lines, f"no detection is right at IoU {IOU}, so there is no --conf to suggest"])
        said = f"P, R and F1 at IoU {IOU} and --conf {self.conf:g}, which is suggested: there the mean F1 is largest"
        return "\n".join([*lines, said])


def measure_precision_recall(
    ground_truth: CocoDict, detections: list[CocoDict], names: Sequence[str]
) -> PrecisionRecall:
    """Precision and recall of COCO results at all confidences, from one matching by pycocotools at IoU 0.5.

    It matches class by class, the highest score first, each with the object of largest IoU that is left. So the matches above
    a confidence do not depend on what lies below it, and are those of the detections above it alone. As in AP, what lies in a
    crowd is neither right nor wrong, and 100 detections of a class and image count at most. Confidences below the lowest
    score are left out, since what was not kept was not measured. Of several that are best the middle one of the longest
    row is.
    """
    objects: dict[int, int] = defaultdict(int)
    for annotation in ground_truth["annotations"]:
        objects[annotation["category_id"]] += not annotation.get("iscrowd")
    ids = {category["id"]: name for category, name in zip(ground_truth["categories"], names, strict=True)}
    known = {key: name for key, name in ids.items() if objects[key]}
    counts = np.array([objects[key] for key in known], dtype=np.float64)[:, None]
    lowest = np.float32(min((found["score"] for found in detections), default=0.0))
    thresholds = _THRESHOLDS[max(0, int(np.searchsorted(_THRESHOLDS, lowest)) - 1) :]
    right, kept = np.zeros((2, len(known), len(thresholds)))
    recall_points, envelope = np.linspace(0, 1, 101), np.zeros((len(known), 101))
    if detections:
        matching = match_detections(ground_truth, detections, iou=IOU)
        with contextlib.redirect_stdout(io.StringIO()):
            matching.accumulate()
        place = {key: k for k, key in enumerate(matching.params.catIds)}
        envelope = matching.eval["precision"][0, :, [place[key] for key in known], 0, 0]
        matches: dict[int, list[Any]] = defaultdict(list)
        for image in filter(None, matching.evalImgs):
            matches[image["category_id"]].append(image)
        for k, key in enumerate(known):
            right[k], kept[k] = _counts_above(matches[key], thresholds)
    f1 = 2 * right / (kept + counts)
    return PrecisionRecall(
        names=tuple(known.values()),
        objects=tuple(int(count) for count in counts[:, 0]),
        thresholds=thresholds.astype(np.float64),
        precision=right / np.maximum(kept, 1),
        recall=right / counts,
        f1=f1,
        recall_points=recall_points,
        envelope=envelope,
        best=_middle_of_the_best(f1.mean(0)),
    )


def count_confusions(ground_truth: CocoDict, detections: list[CocoDict], conf: float) -> NDArray[np.int64]:
    """How often which class is taken for which at a confidence and IoU 0.5: [classes + 1, classes + 1].

    Rows are the objects' classes and columns the detections', in the order of the categories; the last row is what is
    detected where no object is, the last column the objects that nothing matches. The matches are those of pycocotools
    that look at no class: the highest score first, each with the object of largest IoU that is left; what lies in a crowd
    counts neither way.
    """
    place = {category["id"]: k for k, category in enumerate(ground_truth["categories"])}
    background = len(place)
    confusions = np.zeros((background + 1, background + 1), dtype=np.int64)
    kept = [found for found in detections if np.float32(found["score"]) > np.float32(conf)]
    if not kept:
        for annotation in ground_truth["annotations"]:
            confusions[place[annotation["category_id"]], background] += not annotation.get("iscrowd")
        return confusions
    matching = match_detections(ground_truth, kept, iou=IOU, by_class=False)
    truth, found = matching.cocoGt.anns, matching.cocoDt.anns
    for image in filter(None, matching.evalImgs):
        objects = {key: place[truth[key]["category_id"]] for key in image["gtIds"]}
        for key, match, is_ignored in zip(image["dtIds"], image["dtMatches"][0], image["dtIgnore"][0], strict=True):
            if not is_ignored:
                confusions[objects.get(int(match), background), place[found[key]["category_id"]]] += 1
        for key, match, is_ignored in zip(image["gtIds"], image["gtMatches"][0], image["gtIgnore"], strict=True):
            if not match and not is_ignored:
                confusions[objects[key], background] += 1
    return confusions


def _counts_above(images: Sequence[Mapping[str, Any]], thresholds: NDArray[np.float32]) -> tuple[Floats, Floats]:
    """How many detections of a class that count exceed each threshold: the right ones, and all."""
    if not images:
        return np.zeros(len(thresholds)), np.zeros(len(thresholds))
    scores = np.concatenate([image["dtScores"] for image in images]).astype(np.float32)
    counted = ~np.concatenate([image["dtIgnore"][0] for image in images]).astype(bool)
    right = counted & (np.concatenate([image["dtMatches"][0] for image in images]) != 0)

    def above(chosen: NDArray[np.float32]) -> Floats:
        return (len(chosen) - np.searchsorted(np.sort(chosen), thresholds, side="right")).astype(np.float64)

    return above(scores[right]), above(scores[counted])


def _middle_of_the_best(values: Floats) -> int | None:
    """The middle of the longest row of places that have the largest value; None where that is 0."""
    if not values.max() > 0:
        return None
    places = np.flatnonzero(values >= values.max() - 1e-12)
    rows = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    longest = max(rows, key=len)
    return int(longest[(len(longest) - 1) // 2])
