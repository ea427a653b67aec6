"""Evaluate a checkpoint, dense or pruned or published, by pycocotools."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass

import torch

import detection
import slim
from engine import Evaluation, RunFolder, save_coco_json, save_png, write_report
from engine.command import choose_device, flag, run_script


@dataclass(frozen=True)
class ValFlags(detection.DataFlags):
    """Evaluation."""

    project: str = flag("runs/val", "folder that holds the run folders")
    weights: str = flag("", "checkpoint (ours or a published YOLOv5 .pt)")
    split: str = flag("val", "train, val or test")
    img: int = flag(320, "image size in pixels, a multiple of the largest stride")
    batch_size: int = flag(16, "images at once")
    workers: int = flag(0, "loader processes")
    conf: float = flag(0.001, "lowest score that counts, 0 to 1")
    iou: float = flag(0.65, "IoU above which NMS removes a box, 0 to 1")
    rect: bool = flag(False, "rectangular batches with little padding instead of squares: faster")
    save_json: bool = flag(False, "also write predictions.json (COCO results) to the run folder")


def evaluate_weights(flags: ValFlags) -> Evaluation:
    """AP of --weights on --split; fills the run folder."""
    network = detection.read_network(flags.weights)
    detection.check_image_size(network.model, flags.img)
    config = flags.open_data()
    detection.check_classes(network, config, flags.weights, flags.data)
    dataset = detection.DetectionDataset(config, flags.split, flags.img)
    device = choose_device(flags.device)
    evaluator = detection.Evaluator(
        dataset,
        batch_size=flags.batch_size,
        workers=flags.workers,
        device=device,
        conf=flags.conf,
        iou=flags.iou,
        rect_stride_px=max(network.model.stride_px) if flags.rect else None,
    )
    evaluation = evaluator(network.model)
    run = RunFolder.create(flags.project, flags.name)
    run.write_config(asdict(flags), "val.py")
    cost = slim.cost(network.model.cpu(), detection.example_image(flags.img))
    run.write_metrics({**evaluation.metrics(), "params": cost.params, "macs": cost.macs})
    (tiles,) = detection.draw_networks({"": network.model}, dataset).values()
    save_png(torch.cat(tiles, 2), run.path / "detections.png")
    run.log_picture("detections", torch.cat(tiles, 2))
    run.close()
    write_report(run)
    if flags.save_json:
        save_coco_json(evaluation.detections, run.path / "predictions.json")
    print(f"{flags.weights} on {flags.split}: {cost.macs / 1e6:.1f} M MACs, {cost.params / 1e6:.3f} M parameters")
    print(evaluation)
    return evaluation


def main(flags: ValFlags) -> None:
    evaluate_weights(flags)


def cli(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    return run_script(ValFlags, main, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
