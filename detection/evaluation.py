"""Evaluate a checkpoint, dense or pruned or published, or an exported file under any engine, by pycocotools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import slim
from data import DetectionDataset
from deploy import RuntimeSettings
from engine import Evaluation, save_coco_json
from slim import SlimError
from tracking import RunFolder, save_png, write_report

from .command import flat
from .datasets import open_data, real_images
from .detector import evaluate_detector, is_exported, open_detector
from .evaluator import AsModel, Evaluator, draw_networks
from .flags import ValFlags
from .network import (
    Named,
    Network,
    check_classes,
    check_image_size,
    choose_device,
    existing_file,
    img_of,
    read_network,
    sides_of,
)

DEFAULT_IMG = 320
DEFAULT_SIDES = (DEFAULT_IMG, DEFAULT_IMG)


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
    as_trained = flags.runtime == RuntimeSettings()
    found = evaluate_trained(flags) if as_trained and not is_exported(flags.weights) else evaluate_deployed(flags)
    run = RunFolder.create(flags.run.project, flags.run.name)
    run.write_config({**flat(flags), "img": img_of(found.sides_px)}, "val.py")
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
    if not is_exported(flags.weights) and flags.runtime.engine in (None, "torch"):
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
        flags.runtime.engine,
        num_cores=flags.runtime.num_cores,
        precision=flags.runtime.precision,
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
    config = open_data(flags.dataset)
    check_classes(network, config, flags.weights, str(flags.dataset.data))
    if flags.rect and sides[0] != sides[1]:
        raise SlimError(f"--rect with --img {sides[0]}x{sides[1]}: expected one side, the longer one of each batch")
    return Evaluator(
        DetectionDataset(config, flags.split, max(sides), cache=flags.loading.cache),
        batch_size=flags.loading.batch_size,
        workers=flags.loading.workers,
        device=device,
        conf=flags.nms.conf,
        iou=flags.nms.iou,
        max_det=flags.nms.max_det,
        rect_stride_px=stride_px if flags.rect else None,
        canvas_hw=None if flags.rect else sides,
    )
