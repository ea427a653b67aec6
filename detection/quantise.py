"""Detectors in INT8: calibration images of a data set, AP before and after, and the files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

from data import DataConfig, DataError, DetectionDataset
from data.dataset import Draw
from deploy import (
    EngineNetwork,
    Int8Target,
    OnnxQuantiser,
    OpenVinoQuantiser,
    Quantised,
    Quantiser,
    noisiest_blocks,
    open_exported,
    quantise,
    whole_or_nothing,
)
from models import NmsSettings, non_max_suppression
from slim import SlimError

from .evaluator import AsModel, Evaluator
from .network import Network, check_classes
from .write_file import write_file

QUANTISERS: dict[str, type[Quantiser]] = {kind.suffix: kind for kind in (OnnxQuantiser, OpenVinoQuantiser)}
"""The quantiser of each kind of file, by suffix."""
SAME_IOU = 0.5
"""From this overlap on two boxes of a class are the same detection."""


@dataclass(frozen=True)
class Int8Writer:
    """Writes a detector in INT8, in any number of formats.

    Args:
        network: the detector
        images: what it is calibrated on, float 0..1 [3, H, W] each
        keep_float: patterns of modules that stay in floating point
        target: the CPUs that ONNX files are for
        max_drop: the AP that may be lost, see ``deploy.quantise``
        measure_ap: a file's AP, or None for the reason in ``not_measured``
        options: of ``write_file``
    """

    network: Network
    images: list[Tensor]
    keep_float: list[str]
    target: Int8Target = "any"
    max_drop: float | None = None
    measure_ap: Callable[[EngineNetwork], float] | None = None
    not_measured: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def ranking(self) -> list[str]:
        """The blocks, the noisiest first, by the ONNX file for all formats: nncf would take minutes, and rounds alike."""
        with TemporaryDirectory() as folder:
            source = Path(folder) / "float.onnx"
            self.write_float(source)
            quantiser = OnnxQuantiser(source, self.images, self.target)
            return noisiest_blocks(quantiser, quantiser.operators.within(self.keep_float))

    def write_float(self, path: Path, nms: NmsSettings | None = None) -> float:
        """Write the float file; its relative difference from torch."""
        options = {"images": self.images[0][None], **self.options}
        return write_file(self.network, path, nms=nms, **options)

    def write(self, out: Path, nms: NmsSettings | None = None) -> tuple[float, Quantised]:
        """Write the INT8 file whole or not at all: the float file's difference from torch, and what INT8 made of it.

        AP is measured, and blocks are chosen, on the decoded boxes; a suppression stays float, so that a file which ends in
        one is quantised alike. Where there is no AP, detections are compared instead.
        """
        kind = QUANTISERS[out.suffix]
        with whole_or_nothing(out) as made, TemporaryDirectory() as folder:
            source = Path(folder) / f"float{out.suffix}"
            difference = self.write_float(source)
            quantiser = kind(source, self.images, self.target)
            found = quantise(quantiser, made, self.keep_float, self.measure_ap, self.max_drop, lambda: self.ranking)
            if self.measure_ap is None:
                exact = open_exported(source, precision="float32")
                found = replace(found, changed=changed_detections(exact, open_exported(made), self.images))
            if nms:
                self.write_float(source, nms)
                quantiser = kind(source, self.images, self.target)
                quantiser.write(made, quantiser.operators.within([*self.keep_float, *found.kept]))
        return difference, found


def measure_on(
    network: Network, config: DataConfig, sides_px: tuple[int, int], weights: str, data: str
) -> tuple[Callable[[EngineNetwork], float] | None, str]:
    """What gives a file's AP on the val split, where that has labels of the network's classes; else None, and why."""
    try:
        check_classes(network, config, weights, data)
    except SlimError as error:
        return None, str(error)
    dataset = DetectionDataset(config, "val", max(sides_px))
    if not dataset.ground_truth()["annotations"]:
        return None, f"the val split of {data} has no labels"
    evaluator = Evaluator(dataset, batch_size=1, workers=0, device=torch.device("cpu"), canvas_hw=sides_px)
    return (lambda exported: evaluator(AsModel(exported)).ap), ""


def changed_detections(exact: EngineNetwork, rounded: EngineNetwork, images: Sequence[Tensor]) -> tuple[int, int]:
    """How many detections one network lost or gained against another on these images, and how many that one has."""
    changed = total = 0
    for image in images:
        with torch.no_grad():
            one, other = (non_max_suppression(network(image[None]))[0] for network in (exact, rounded))
        same = (box_iou(one[:, :4], other[:, :4]) >= SAME_IOU) & (one[:, 5, None] == other[:, 5])
        changed += int((~same.any(1)).sum()) + int((~same.any(0)).sum())
        total += len(one)
    return changed, total


def calibration_images(config: DataConfig, sides_px: tuple[int, int], count: int, seed: int) -> list[Tensor]:
    """Shuffled training images as evaluation sees them: float 0..1 [3, H, W] each, at most ``count``."""
    try:
        dataset = DetectionDataset(config, "train", max(sides_px), cache="none")
    except DataError as error:
        raise SlimError(
            f"--int8: no calibration images ({error}); give a --data with images like those that the network will see"
        ) from error
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count]
    return [dataset[Draw(index, sides_px)].image.float() / 255 for index in order.tolist()]
