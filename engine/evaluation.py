"""AP of a detector on a data set, by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from slim import SlimError, evaluation_mode, write_text_atomically

from .batch import Batch, network_input

CocoDict = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """COCO metrics, 0..1.

    Attributes:
        ap: AP@[.50:.95]
        ap50: AP at IoU 0.50
        ap75: AP at IoU 0.75
        per_class: AP by class name; classes without an instance in the ground truth have none and are left out
        images: number of images
        seconds: time of inference, post-processing and matching of all images
        detections: COCO result dicts: image_id, category_id, bbox (x, y, width, height in pixels of the original image),
            score
    """

    ap: float
    ap50: float
    ap75: float
    per_class: dict[str, float]
    images: int
    seconds: float
    detections: list[CocoDict] = field(repr=False)

    def metrics(self) -> dict[str, Any]:
        """The entries of `metrics.json`: all but the detections."""
        return {name: value for name, value in vars(self).items() if name != "detections"}

    def __str__(self) -> str:
        return f"AP {self.ap:.4f}  AP50 {self.ap50:.4f}  AP75 {self.ap75:.4f}  ({self.images} images)"


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode is put back at the end."""
    with evaluation_mode(model), torch.no_grad():
        yield


def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    postprocess: Callable[[Tensor], list[Tensor]],
    ground_truth: CocoDict,
    names: Sequence[str],
    device: torch.device | str,
    *,
    channels_last: bool = True,
) -> Evaluation:
    """Run `model` over `loader` and match what `postprocess` leaves with `ground_truth`.

    Args:
        model: in evaluation mode `model(images)` gives (decoded, raw); it runs in FP32, so that figures do not depend on the
            device
        loader: gives each image of the split once
        postprocess: gives per image a tensor [n, 6] of x1, y1, x2, y2 (pixels of the network's input), score, class
        ground_truth: a COCO dict whose categories are in the order of `names`
        names: of the classes
        device: where the model is
        channels_last: memory format of the images

    Raises SlimError when the ground truth is empty or the loader does not give each of its images once.
    """
    _check_ground_truth(ground_truth, names)
    device = torch.device(device)
    category_ids = [category["id"] for category in ground_truth["categories"]]
    started = time.perf_counter()
    seen: list[int] = []
    detections: list[CocoDict] = []
    with evaluating(model):
        for batch in loader:
            decoded, _ = model(network_input(batch.images, device, channels_last=channels_last))
            kept = postprocess(decoded)
            for image_id, letterbox, found in zip(batch.image_ids, batch.letterboxes, kept, strict=True):
                seen.append(int(image_id))
                found = found.detach().float().cpu()
                if letterbox is not None:
                    found[:, :4] = letterbox.to_original(found[:, :4])
                detections += _coco_results(int(image_id), found, category_ids)
    expected = sorted(image["id"] for image in ground_truth["images"])
    if sorted(seen) != expected:
        raise SlimError(
            f"evaluation: the loader gave {len(seen)} images ({len(set(seen))} different), the ground truth has "
            f"{len(expected)}; use a loader that gives each image once (drop_last=False, same split)"
        )
    ap, ap50, ap75, per_class = coco_ap(ground_truth, detections, names)
    return Evaluation(ap, ap50, ap75, per_class, len(seen), time.perf_counter() - started, detections)


def coco_ap(
    ground_truth: CocoDict, detections: list[CocoDict], names: Sequence[str]
) -> tuple[float, float, float, dict[str, float]]:
    """(AP, AP50, AP75, AP by class name) of COCO results; without detections all are 0."""
    with_instances = {annotation["category_id"] for annotation in _counted(ground_truth)}
    classes = [
        (position, names[position])
        for position, category in enumerate(ground_truth["categories"])
        if category["id"] in with_instances
    ]
    if not detections:
        return 0.0, 0.0, 0.0, {name: 0.0 for _, name in classes}
    matching = match_detections(ground_truth, detections)
    with contextlib.redirect_stdout(io.StringIO()):
        matching.accumulate()
        matching.summarize()
    ap, ap50, ap75 = (float(value) for value in matching.stats[:3])
    # precision: [IoU, recall, class, area, max detections]; -1 where a class has no instance.
    precision = matching.eval["precision"][:, :, :, 0, -1]
    per_class = {name: float(np.mean(precision[:, :, position])) for position, name in classes}
    return ap, ap50, ap75, per_class


def match_detections(
    ground_truth: CocoDict, detections: list[CocoDict], *, iou: float | None = None, by_class: bool = True
) -> COCOeval:
    """COCO results matched with the ground truth image by image, not yet accumulated; there must be one at least.

    With ``iou`` at that one and for objects of all sizes alone, a fraction of the work; not ``by_class``, a detection matches
    objects of every class, and all of an image's count instead of 100 a class.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = COCO()
        truth.dataset = _normalised(ground_truth)
        truth.createIndex()
        matching = COCOeval(truth, truth.loadRes([dict(found) for found in detections]), "bbox")
        params = matching.params
        params.catIds = [category["id"] for category in ground_truth["categories"]]
        if iou is not None:
            params.iouThrs, params.areaRng, params.areaRngLbl = np.array([iou]), params.areaRng[:1], ["all"]
            params.maxDets = params.maxDets[-1:]
        if not by_class:
            params.useCats, params.maxDets = 0, [len(detections)]
        matching.evaluate()
    return matching


def save_coco_json(detections: list[CocoDict], path: str | Path) -> None:
    """Write COCO results for COCO's own tools and servers."""
    write_text_atomically(path, json.dumps(detections))


def _coco_results(image_id: int, found: Tensor, category_ids: Sequence[int]) -> list[CocoDict]:
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[int(cls)],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for x1, y1, x2, y2, score, cls in found.tolist()
    ]


def _check_ground_truth(ground_truth: CocoDict, names: Sequence[str]) -> None:
    found = len(ground_truth["categories"])
    if found != len(names):
        raise SlimError(f"evaluation: the ground truth has {found} classes, expected {len(names)}: {', '.join(names)}")
    if not _counted(ground_truth):
        raise SlimError(
            f"evaluation: no labelled box in {len(ground_truth['images'])} images, so there is no AP; "
            "check the split's label files"
        )


def _counted(ground_truth: CocoDict) -> list[CocoDict]:
    """Annotations that are to be found; crowds are ignored."""
    return [annotation for annotation in ground_truth["annotations"] if not annotation.get("iscrowd")]


def _normalised(ground_truth: CocoDict) -> CocoDict:
    """pycocotools takes annotation id 0 for "no match" and wants area and iscrowd."""
    annotations = [
        {"iscrowd": 0, "area": annotation["bbox"][2] * annotation["bbox"][3], **annotation, "id": number}
        for number, annotation in enumerate(ground_truth["annotations"], start=1)
    ]
    return {"info": {}, **ground_truth, "annotations": annotations}
