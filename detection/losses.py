"""A loss as this project's scripts mean it, and the anchors that it is computed with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import slim
from data import DetectionDataset
from engine import World
from models import (
    LOWEST_RECALL,
    YOLO,
    Detect,
    DetectionLoss,
    DistillationLoss,
    DistillGains,
    LossGains,
    anchor_fit,
    refit_anchors,
)
from slim import SlimError

from .network import Network, existing_file, read_network


def box_sizes_px(dataset: DetectionDataset) -> Tensor:
    """[n, 2]: width and height of the labels in pixels of the network's input."""
    truth = dataset.ground_truth()
    scales = {image["id"]: dataset.image_size_px / max(image["width"], image["height"]) for image in truth["images"]}
    sizes = [[side * scales[a["image_id"]] for side in a["bbox"][2:]] for a in truth["annotations"] if not a["iscrowd"]]
    return torch.tensor(sizes, dtype=torch.float32).reshape(-1, 2)


def fit_anchors(network: Network, dataset: DetectionDataset, anchor_t: float, seed: int) -> str:
    """Refits the anchors to the labels where they can recall too few of them and others more; what was done, in a line.

    For a new head alone: a trained one has learnt sizes relative to its anchors. ``build`` is changed with the network.
    """
    sizes = box_sizes_px(dataset)
    if not len(sizes):
        return "anchors: kept, since the training split has no boxes"
    detect = network.model.detect
    assert isinstance(detect, Detect)
    before = anchor_fit(detect.anchors_px, sizes, anchor_t)
    line = f"anchors at {dataset.image_size_px} px: {before}"
    if before.recall >= LOWEST_RECALL:
        return line
    anchors = refit_anchors(sizes, detect.anchors[..., 0].numel(), anchor_t=anchor_t, seed=seed)
    after = anchor_fit(anchors, sizes, anchor_t)
    if after.recall <= before.recall:
        return f"{line}; kept, since a refit is no better"
    detect.set_anchors(anchors)
    levels = detect.anchors_px.tolist()
    network.build["anchors_px"] = levels
    flat = [[side for anchor in level for side in anchor] for level in levels]
    network.build["description"] = network.model.description = {**network.build["description"], "anchors": flat}
    return f"{line}; refitted: {after}"


def make_loss(model: YOLO, gains: LossGains, img: int, world: World | None = None) -> DetectionLoss:
    """YOLOv5's loss with its gains scaled to the task; for one rank of several its part of the whole batch's loss."""
    reduce = None if world is None or world.size == 1 else world.sum
    return DetectionLoss(model, gains.scaled(model.num_classes, img, len(model.stride_px)), reduce)


def add_teacher(
    loss: DetectionLoss, network: Network, teacher: str, gains: DistillGains, device: torch.device
) -> DistillationLoss:
    """The loss with the distance to the checkpoint ``teacher`` added, whose gates are folded."""
    existing_file(teacher, "the checkpoint of --teacher, which a resumed run needs too")
    known = read_network(teacher)
    if known.names != network.names:
        raise SlimError(
            f"--teacher {teacher}: its classes are {', '.join(known.names[:5])} ({len(known.names)} in all), the "
            f"student's {', '.join(network.names[:5])} ({len(network.names)}); expected the same in the same order"
        )
    model = slim.fold_gates(known.model).to(device).to(memory_format=torch.channels_last)
    return DistillationLoss(loss, model, gains)


def training_loss(model: YOLO, img: int, gains: LossGains) -> Callable[[nn.Module, Any], Tensor]:
    """The loss of a network like ``model``, in evaluation mode, on a batch."""
    criterion = make_loss(model, gains, img)

    def loss(network: nn.Module, batch: Any) -> Tensor:
        # In evaluation mode the head gives (decoded, raw maps).
        device = next(network.parameters()).device
        _, raw = network(batch.images.to(device).float() / 255)
        return criterion(raw, batch.targets)[0]

    return loss
