"""Evaluate a checkpoint, dense or pruned or published, or an exported file under any engine, by pycocotools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data import DetectionDataset
from data.results import result_ids
from deploy import RuntimeSettings
from engine import Evaluation, save_coco_json
from slim import SlimError
from tracking import RunFolder, write_report

from .command import flat
from .datasets import open_data, real_images
from .detector import is_exported, open_detector
from .evaluation_pictures import add_picture, measure_detections
from .evaluator import AsModel, Evaluator, draw_networks, draw_truth
from .flags import ValFlags
from .network import check_classes, choose_device, img_of, sides_of
from .published import find_weights
from .video.sources import distinct
from .video.writer import DetectionFiles

DEFAULT_SIDES = (320, 320)


def evaluate_weights(flags: ValFlags) -> Evaluation:
    """Measure the AP of --weights on --split, and fill the run folder.

    A checkpoint for which neither engine nor precision nor cores are given is evaluated as it was trained, with its gates
    and batch norms; otherwise as it is deployed.
    """
    find_weights(flags.weights, flags.dataset.download)
    exported, engine = is_exported(flags.weights), flags.runtime.engine
    on_torch = not exported and engine in (None, "torch")
    if not on_torch and flags.device not in ("auto", "cpu"):
        raise SlimError(f"--device {flags.device}: {flags.weights} runs on the CPU here; use --device cpu or auto")
    asked = sides_of(flags.img) if flags.img else None
    if flags.rect and asked and asked[0] != asked[1]:
        raise SlimError(f"--rect with --img {img_of(asked)}: expected one side, the longer one of each batch")
    config, images = open_data(flags.dataset), None
    if not on_torch and not exported:
        sides = asked or DEFAULT_SIDES
        images = real_images(DetectionDataset(config, flags.split, max(sides), cache="none"), 1, sides)
    with open_detector(
        flags.weights,
        engine,
        num_cores=flags.runtime.num_cores,
        precision=flags.runtime.precision,
        images=images,
        device=choose_device(flags.device) if on_torch else None,
        as_trained=flags.runtime == RuntimeSettings(),
        names=config.names,
        trust=flags.trust.trust,
    ) as detector:
        sides = asked or detector.sides_px or DEFAULT_SIDES
        detector.check_sides(sides)
        check_classes(detector, config, flags.weights, str(flags.dataset.data))
        if flags.rect and detector.sides_px is not None:
            raise SlimError(
                f"--rect: {flags.weights} takes images of {sides[0]} x {sides[1]} pixels alone; leave it out, or export "
                "with --dynamic"
            )
        evaluator = Evaluator(
            DetectionDataset(config, flags.split, max(sides), cache=flags.loading.cache),
            batch_size=flags.loading.batch_size,
            workers=flags.loading.workers,
            device=detector.network.device,
            conf=flags.nms.conf,
            iou=flags.nms.iou,
            max_det=flags.nms.max_det,
            rect_stride_px=detector.stride_px if flags.rect else None,
            canvas_hw=None if flags.rect else sides,
        )
        ids = result_ids(config, flags.split, evaluator.dataset.files) if flags.save_json else None
        evaluation = detector.evaluate(evaluator)
        (tiles,) = draw_networks(
            {"": AsModel(detector.network)}, evaluator.dataset, canvas_hw=sides, postprocess=detector.detections
        ).values()
        truth = draw_truth(evaluator.dataset, canvas_hw=sides)
    run = RunFolder.create(flags.run.project, flags.run.name)
    run.write_config({**flat(flags), "img": img_of(sides)}, "val.py")
    measured = measure_detections(run, evaluator, evaluation)
    run.write_metrics({**evaluation.metrics(), **measured.metrics(), **detector.facts(sides)})
    add_picture(run, "detections", tiles)
    add_picture(run, "truth", truth)
    run.close()
    write_report(run)
    if flags.text.save_txt:
        write_labels(run, evaluator.dataset, evaluation.detections, scores=flags.text.save_conf)
    if ids is not None:
        save_coco_json(ids.results(evaluation.detections), run.path / "predictions.json")
    print(f"{flags.weights} on {flags.split}: {detector.describe(sides)}")
    print(evaluation)
    print(measured.table(evaluation.per_class))
    return evaluation


def write_labels(
    run: RunFolder, dataset: DetectionDataset, detections: Sequence[Mapping[str, Any]], *, scores: bool
) -> None:
    """YOLO text of each image in labels/ of a run folder, from results whose ids are indices."""
    rows: list[list[tuple[float, ...]]] = [[] for _ in dataset.files]
    for found in detections:
        x, y, w, h = found["bbox"]
        rows[found["image_id"]].append((x, y, x + w, y + h, found["score"], found["category_id"]))
    stems = distinct(file.stem for file in dataset.files)
    with DetectionFiles(run.path, dataset.names, text=True, scores=scores, as_json=False) as files:
        for index, (file, stem) in enumerate(zip(dataset.files, stems, strict=True)):
            files.add(str(file), stem, None, rows[index], dataset.original_hw(index))
