"""Evaluate a checkpoint, dense or pruned or published, or an exported file under any engine, by pycocotools."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import slim
from data import DetectionDataset
from deploy import Precision
from deploy.open_file import Engine
from engine import Evaluation, save_coco_json
from slim import SlimError
from tracking import RunFolder, save_png, write_report

from .command import choose_device, existing_file, flag
from .datasets import DataFlags, real_images
from .detector import evaluate_detector, is_exported, open_detector
from .evaluator import AsModel, Evaluator, draw_networks
from .network import Named, Network, check_classes, check_image_size, img_of, read_network, sides_of

DEFAULT_IMG = 320
DEFAULT_SIDES = (DEFAULT_IMG, DEFAULT_IMG)


@dataclass(frozen=True)
class ValFlags(DataFlags):
    """Evaluation."""

    project: str = flag("runs/val", "folder that holds the run folders")
    weights: str = flag("", "checkpoint (ours or a published YOLOv5 .pt) or exported file (.onnx, .xml, .torchscript)")
    engine: Engine | None = flag(  # noqa: RUF009
        None, "what runs the network; a checkpoint is exported for it on the fly. Else a file's own, or torch"
    )
    precision: Precision = flag("auto", "what the engine computes in; auto leaves it the choice")  # noqa: RUF009
    num_cores: int = flag(0, "CPU threads of the engine, 0 for all")
    split: str = flag("val", "train, val or test")
    img: int | str | None = flag(
        None,
        "image size in pixels, multiples of the largest stride: one side, or height x width as 384x640. Else an exported "
        f"file's own, or {DEFAULT_IMG}",
    )
    batch_size: int = flag(16, "images at once")
    workers: int = flag(0, "loader processes")
    conf: float = flag(0.001, "lowest score that counts, 0 to 1")
    iou: float = flag(0.65, "IoU above which NMS removes a box, 0 to 1")
    rect: bool = flag(False, "rectangular batches with little padding instead of squares: faster")
    save_json: bool = flag(False, "also write predictions.json (COCO results) to the run folder")


@dataclass(frozen=True)
class Evaluated:
    """A network's AP and what ``metrics.json`` says of it beside; ``tiles`` are the first images with its detections."""

    evaluation: Evaluation
    sides_px: tuple[int, int]
    facts: dict[str, Any]
    tiles: list[Tensor]
    line: str


def evaluate_weights(flags: ValFlags) -> Evaluation:
    """AP of --weights on --split; fills the run folder."""
    as_trained = (flags.engine, flags.precision, flags.num_cores) == (None, "auto", 0)
    found = evaluate_trained(flags) if as_trained and not is_exported(flags.weights) else evaluate_deployed(flags)
    run = RunFolder.create(flags.project, flags.name)
    run.write_config({**asdict(flags), "img": img_of(found.sides_px)}, "val.py")
    run.write_metrics({**found.evaluation.metrics(), **found.facts})
    save_png(torch.cat(found.tiles, 2), run.path / "detections.png")
    run.log_picture("detections", torch.cat(found.tiles, 2))
    run.close()
    write_report(run)
    if flags.save_json:
        save_coco_json(found.evaluation.detections, run.path / "predictions.json")
    print(f"{flags.weights} on {flags.split}: {found.line}")
    print(found.evaluation)
    return found.evaluation


def evaluate_trained(flags: ValFlags) -> Evaluated:
    """A checkpoint's network as it was trained, with its gates and batch norms, on any device."""
    network = read_network(flags.weights)
    sides = checkpoint_sides(flags, network)
    evaluator = evaluator_of(flags, network, sides, max(network.model.stride_px), choose_device(flags.device))
    evaluation = evaluator(network.model)
    cost = slim.cost(network.model.cpu(), torch.zeros(1, 3, *sides))
    size = existing_file(flags.weights, "a checkpoint").stat().st_size
    facts = {"params": cost.params, "macs": cost.macs, "engine": "torch", "precision": "float32", "bytes": size}
    (tiles,) = draw_networks({"": network.model}, evaluator.dataset, canvas_hw=sides).values()
    line = f"{cost.macs / 1e6:.1f} M MACs, {cost.params / 1e6:.3f} M parameters"
    return Evaluated(evaluation, sides, facts, tiles, line)


def evaluate_deployed(flags: ValFlags) -> Evaluated:
    """An exported file, or a checkpoint under an engine."""
    facts: dict[str, Any] = {"params": None, "macs": None}
    images, evaluator, device = None, None, torch.device("cpu")
    if not is_exported(flags.weights) and flags.engine in (None, "torch"):
        device = choose_device(flags.device)
    elif flags.device not in ("auto", "cpu"):
        raise SlimError(f"--device {flags.device}: {flags.weights} runs on the CPU here; use --device cpu or auto")
    if not is_exported(flags.weights):
        network = read_network(flags.weights)
        sides = checkpoint_sides(flags, network)
        evaluator = evaluator_of(flags, network, sides, max(network.model.stride_px), device)
        images = real_images(evaluator.dataset, 1, sides)
        cost = slim.cost(network.model, images)
        facts = {"params": cost.params, "macs": cost.macs}
    opened = open_detector(
        flags.weights,
        flags.engine,
        num_cores=flags.num_cores,
        precision=flags.precision,
        images=images,
        device=device,
    )
    with opened as detector:
        if evaluator is None:
            sides = sides_of(flags.img) if flags.img else detector.sides_px or DEFAULT_SIDES
            detector.check_sides(sides)
            evaluator = evaluator_of(flags, detector, sides, detector.stride_px, device)
        if flags.rect and detector.sides_px is not None:
            raise SlimError(
                f"--rect: {flags.weights} takes images of {sides[0]} x {sides[1]} pixels alone; leave it out, or export "
                "with --dynamic"
            )
        evaluation = evaluate_detector(detector, evaluator)
        (tiles,) = draw_networks(
            {"": AsModel(detector.network)}, evaluator.dataset, canvas_hw=sides, postprocess=detector.detections
        ).values()
    line = (
        f"{detector.engine}, {detector.precision}, {detector.file_bytes / 1e6:.2f} MB, {sides[0]} x {sides[1]} pixels"
    )
    if detector.has_nms:
        line += "; AP is at the threshold and IoU inside of the file"
    facts |= {"engine": detector.engine, "precision": detector.precision, "bytes": detector.file_bytes}
    return Evaluated(evaluation, sides, facts, tiles, line)


def checkpoint_sides(flags: ValFlags, network: Network) -> tuple[int, int]:
    """Height and width that --img asks for, or the default, as the network can take them."""
    sides = sides_of(flags.img or DEFAULT_IMG)
    for side in sides:
        check_image_size(network.model, side)
    return sides


def evaluator_of(
    flags: ValFlags, network: Named, sides: tuple[int, int], stride_px: int, device: torch.device
) -> Evaluator:
    """Of the flags' data set, whose classes must be the network's."""
    config = flags.open_data()
    check_classes(network, config, flags.weights, flags.data)
    if flags.rect and sides[0] != sides[1]:
        raise SlimError(f"--rect with --img {sides[0]}x{sides[1]}: expected one side, the longer one of each batch")
    return Evaluator(
        DetectionDataset(config, flags.split, max(sides)),
        batch_size=flags.batch_size,
        workers=flags.workers,
        device=device,
        conf=flags.conf,
        iou=flags.iou,
        rect_stride_px=stride_px if flags.rect else None,
        canvas_hw=None if flags.rect else sides,
    )


def main(flags: ValFlags) -> None:
    evaluate_weights(flags)
