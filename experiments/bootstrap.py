"""How much of a difference in AP hangs on the images it was measured on: a bootstrap over them, paired."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from engine import match_detections
from slim import SlimError, write_text_atomically
from tracking.progress import progress

from .comparisons import BOOTSTRAP_COLUMNS, read_bootstrap

CocoDict = dict[str, Any]


@dataclass(frozen=True)
class BootstrapDifference:
    """Difference in AP (0..1) over resamples of the images.

    Attributes:
        difference: mean over the resamples
        low: 2.5th percentile
        high: 97.5th percentile
        resamples: their number
    """

    difference: float
    low: float
    high: float
    resamples: int


@dataclass(frozen=True)
class _ClassMatches:
    """A class's detections, highest score first, and its objects.

    Attributes:
        image: [n] image of each detection, as a position in the ground truth's sorted ids
        true: [IoU thresholds, n] 1 where the detection is right
        false: [IoU thresholds, n] 1 where it is wrong; neither where it counts neither way
        objects: [images] objects that are to be found
    """

    image: np.ndarray
    true: np.ndarray
    false: np.ndarray
    objects: np.ndarray


class ImageMatches:
    """Detections matched once with the ground truth by pycocotools, whose AP of any resample of the images is then cheap.

    Args:
        ground_truth: a COCO dict, such as a DetectionDataset's
        detections: COCO results; their image ids must be in the ground truth

    Raises SlimError for a ground truth without objects.
    """

    def __init__(self, ground_truth: CocoDict, detections: list[CocoDict]) -> None:
        if all(annotation.get("iscrowd") for annotation in ground_truth["annotations"]):
            raise SlimError(f"bootstrap: no labelled box in {len(ground_truth['images'])} images, so there is no AP")
        self.images = len(ground_truth["images"])
        self._classes: list[_ClassMatches] = []
        self._recalls = np.empty(0)
        if detections:  # pycocotools takes no empty list
            matching = match_detections(ground_truth, detections)
            self._recalls = matching.params.recThrs
            self._classes = [_class_matches(matching, k) for k in range(len(matching.params.catIds))]

    def ap(self, counts: np.ndarray) -> float:
        """AP@[.50:.95] (0..1) of the images, each as often as `counts` [images] says, in the order of their ids.

        As pycocotools accumulates it, over the classes of which there is an object; 0 where there is none at all.
        """
        of_class = [ap for matches in self._classes if (ap := self._class_ap(matches, counts)) is not None]
        return float(np.mean(of_class)) if of_class else 0.0

    def _class_ap(self, matches: _ClassMatches, counts: np.ndarray) -> float | None:
        objects = int(counts @ matches.objects)
        if not objects:
            return None
        weights = counts[matches.image]
        true, false = np.cumsum(matches.true * weights, axis=1), np.cumsum(matches.false * weights, axis=1)
        precision = true / (true + false + np.spacing(1))
        # The envelope from the right: the best precision at this recall or a higher one; 0 beyond the last recall.
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        envelope = np.pad(envelope, ((0, 0), (0, 1)))
        recall = true / objects
        return float(np.mean([of[np.searchsorted(at, self._recalls)] for of, at in zip(envelope, recall, strict=True)]))


def bootstrap_difference(
    sample: ImageMatches, reference: ImageMatches, *, resamples: int = 1000, seed: int = 0
) -> BootstrapDifference:
    """AP of `sample` minus that of `reference` over resamples of the images, both on the same ones.

    The percentile interval of Efron and Tibshirani (An Introduction to the Bootstrap, 1993): what another set of as many
    images might have shown of these two trained networks, not what other trainings would have.

    Raises SlimError for a single image, or where the two were not matched with the same images.
    """
    if sample.images != reference.images or sample.images < 2:
        raise SlimError(
            f"bootstrap: {sample.images} and {reference.images} images; expected the same ones, at least two"
        )

    def difference(positions: np.ndarray) -> float:
        counts = np.bincount(positions, minlength=sample.images)
        return sample.ap(counts) - reference.ap(counts)

    found = stats.bootstrap(
        (np.arange(sample.images),),
        difference,
        n_resamples=resamples,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = found.confidence_interval
    return BootstrapDifference(float(np.mean(found.bootstrap_distribution)), float(low), float(high), resamples)


def append_bootstrap_rows(
    path: Path,
    ground_truth: CocoDict,
    pairs: pd.DataFrame,
    predictions: Callable[[str], list[CocoDict]],
    *,
    resamples: int = 1000,
) -> int:
    """Compare each pair that `path` has no row of yet, and write the rows behind those that stand there.

    Args:
        path: of bootstrap.csv; made where it is missing
        ground_truth: of the one split and data set of all pairs
        pairs: as `compared_runs` gives them
        predictions: by a run's hash, its detections on that split, with the ids of the ground truth
        resamples: of the images

    Returns the number of new rows. Raises what `bootstrap_difference` raises.
    """
    rows, key = read_bootstrap(path), ["hash", "against_hash", "split"]
    new = pairs.drop_duplicates(key)
    new = new[~pd.MultiIndex.from_frame(new[key]).isin(pd.MultiIndex.from_frame(rows[key]))]

    @cache
    def matches(run: str) -> ImageMatches:
        return ImageMatches(ground_truth, predictions(run))

    # A pair takes seconds to a minute: each is written as it is found.
    for pair in progress(new.to_dict("records"), desc="pairs on resampled images", leave=False):
        found = bootstrap_difference(matches(pair["hash"]), matches(pair["against_hash"]), resamples=resamples)
        made = pd.DataFrame([pair | asdict(found)])
        rows = pd.concat([rows, made], ignore_index=True)[list(BOOTSTRAP_COLUMNS)] if len(rows) else made
        text = rows.to_csv(columns=list(BOOTSTRAP_COLUMNS), index=False, float_format="%.6f", lineterminator="\n")
        write_text_atomically(path, text)
    return len(new)


def _class_matches(matching: Any, position: int) -> _ClassMatches:
    """Of the class at a position, over all areas and the largest number of detections: what AP is made of."""
    params = matching.params
    images = len(params.imgIds)
    of_image = matching.evalImgs[position * len(params.areaRng) * images :][:images]  # area 0 is "all"
    found = [one for one in of_image if one is not None]
    objects = np.array([0 if one is None else np.count_nonzero(one["gtIgnore"] == 0) for one in of_image])
    empty = np.empty((len(params.iouThrs), 0), dtype=bool)
    matched = np.concatenate([empty, *(one["dtMatches"] != 0 for one in found)], axis=1)
    ignored = np.concatenate([empty, *(one["dtIgnore"].astype(bool) for one in found)], axis=1)
    scores = np.concatenate([[], *(one["dtScores"] for one in found)])
    image = np.repeat(np.arange(images), [0 if one is None else len(one["dtScores"]) for one in of_image])
    order = np.argsort(-scores, kind="mergesort")  # pycocotools' own, for ties
    # Over all areas nothing is ignored but what lies in a crowd, and that is matched.
    true, false = (matched & ~ignored)[:, order], ~matched[:, order]
    return _ClassMatches(image[order], true.astype(np.int64), false.astype(np.int64), objects)
