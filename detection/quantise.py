"""Detectors in INT8: calibration images of a data set, AP before and after, and the files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from data import DataConfig, DataError, DetectionDataset
from data.sampling import Draw
from deploy import OnnxQuantiser, OpenVinoQuantiser, Quantised, Quantiser, parts_of, quantise
from deploy.accuracy import Measure, noisiest
from slim import SlimError

from .evaluator import AsModel, Evaluator
from .network import Network, check_classes

QUANTISERS: dict[str, type[Quantiser]] = {kind.suffix: kind for kind in (OnnxQuantiser, OpenVinoQuantiser)}
"""By the suffix of the file."""


@dataclass(frozen=True)
class Calibrated:
    """What a detector is quantised on. ``measure`` gives a file's AP, or is None for the reason in ``not_measured``."""

    images: list[Tensor]
    measure: Measure | None
    not_measured: str = ""


def calibrate(
    network: Network,
    config: DataConfig,
    sides_px: tuple[int, int],
    count: int,
    seed: int,
    weights: str,
    data: str,
) -> Calibrated:
    """``count`` shuffled training images, and the AP on the val split where that has labels of the network's classes."""
    if count < 1:
        raise SlimError(f"--calibration-images {count}: expected at least 1")
    try:
        images = training_images(config, sides_px, count, seed)
    except DataError as error:
        raise SlimError(
            f"--int8: no calibration images ({error}); give a --data with images like those that the network will see"
        ) from error
    try:
        check_classes(network, config, weights, data)
    except SlimError as error:
        return Calibrated(images, None, str(error))
    dataset = DetectionDataset(config, "val", max(sides_px))
    if not dataset.ground_truth()["annotations"]:
        return Calibrated(images, None, f"the val split of {data} has no labels")
    evaluator = Evaluator(dataset, batch_size=1, workers=0, device=torch.device("cpu"), canvas_hw=sides_px)
    return Calibrated(images, lambda exported: evaluator(AsModel(exported)).ap)


def training_images(config: DataConfig, sides_px: tuple[int, int], count: int, seed: int) -> list[Tensor]:
    """Shuffled training images as evaluation sees them: float 0..1 [3, H, W] each, at most ``count``."""
    dataset = DetectionDataset(config, "train", max(sides_px), cache="none")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count]
    return [dataset[Draw(index, sides_px)].image.float() / 255 for index in order.tolist()]


def noisiest_blocks(
    write_float: Callable[[Path, bool], float], images: list[Tensor], keep_float: list[str]
) -> list[str]:
    """``deploy.accuracy.noisiest`` of the ONNX file, for all formats: nncf would take minutes, and rounds alike."""
    with TemporaryDirectory() as folder:
        source = Path(folder) / "float.onnx"
        write_float(source, False)
        quantiser = OnnxQuantiser(source, images)
        return noisiest(quantiser, quantiser.operators.within(keep_float))


def write_quantised(
    write_float: Callable[[Path, bool], float],
    out: Path,
    calibrated: Calibrated,
    keep_float: list[str],
    *,
    has_nms: bool = False,
    max_drop: float | None = None,
    rank: Callable[[], list[str]] | None = None,
) -> tuple[float, Quantised]:
    """The INT8 file ``out``, whole or not at all: the float file's difference from torch, and what INT8 made of it.

    ``write_float(path, with_nms)`` writes the float file. AP is measured, and blocks are chosen, on the decoded boxes; a
    suppression stays float, so that a file which ends in one is quantised alike. ``rank``: see ``deploy.quantise``.
    """
    if max_drop is not None and calibrated.measure is None:
        raise SlimError(f"--max-drop {max_drop:g}: AP cannot be measured, since {calibrated.not_measured}")
    kind = QUANTISERS[out.suffix]
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=".writing-") as folder:
        source, made = Path(folder) / f"float{out.suffix}", Path(folder) / out.name
        difference = write_float(source, False)
        quantised = quantise(kind(source, calibrated.images), made, keep_float, calibrated.measure, max_drop, rank)
        if has_nms:
            write_float(source, True)
            quantiser = kind(source, calibrated.images)
            quantiser.write(made, quantiser.operators.within([*keep_float, *quantised.kept]))
        for temporary, final in reversed(list(zip(parts_of(made), parts_of(out), strict=True))):
            temporary.replace(final)
    return difference, quantised
