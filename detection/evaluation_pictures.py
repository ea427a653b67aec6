"""What an evaluation leaves in a run folder beside its figures: curves, the confusion matrix, pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine import Evaluation, PrecisionRecall, count_confusions, measure_precision_recall
from slim import write_text_atomically
from tracking import RunFolder, plot_class_curves, plot_confusions, read_png, save_png

from .evaluator import Evaluator


def add_picture(run: RunFolder, name: str, tiles: list[Tensor], step: int = 0) -> None:
    """Pictures of one size (uint8 [3, H, W]) side by side, as a file of the run and in TensorBoard."""
    picture = torch.cat(tiles, 2)
    save_png(picture, run.path / f"{name}.png")
    run.log_picture(name, picture, step)


def measure_detections(run: RunFolder, evaluator: Evaluator, evaluation: Evaluation, step: int = 0) -> PrecisionRecall:
    """Precision, recall and F1 of an evaluation's detections, drawn into the run folder; nothing is inferred again."""
    names, truth = evaluator.dataset.names, evaluator.ground_truth
    measured = measure_precision_recall(truth, evaluation.detections, names)
    confusions = count_confusions(truth, evaluation.detections, measured.conf or 0.0)
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["object", *names, "background"])
    table.writerows([name, *row] for name, row in zip([*names, "background"], confusions.tolist(), strict=True))
    write_text_atomically(run.path / "confusion_matrix.csv", text.getvalue())
    draw_measured(run, measured, confusions, names, step)
    return measured


def draw_measured(
    run: RunFolder, measured: PrecisionRecall, confusions: NDArray[np.int64], names: Sequence[str], step: int
) -> None:
    """pr_curve.png, f1_curve.png and confusion_matrix.png."""

    def of_classes(values: NDArray[np.float64]) -> dict[str, list[float]]:
        return dict(zip(measured.names, values.tolist(), strict=True))

    recalls, confs = measured.recall_points.tolist(), measured.thresholds.tolist()
    where = "of all detections" if measured.conf is None else f"at --conf {measured.conf:g}"
    drawn = [
        plot_class_curves(
            ("recall", recalls), ("precision", of_classes(measured.envelope)), run.path / "pr_curve.png", areas=True
        ),
        plot_class_curves(
            ("--conf", confs), ("F1", of_classes(measured.f1)), run.path / "f1_curve.png", mark=measured.conf
        ),
        plot_confusions(confusions, names, run.path / "confusion_matrix.png", f"{where}, IoU 0.5"),
    ]
    for file in drawn:
        run.log_picture(file.stem, read_png(file), step)
