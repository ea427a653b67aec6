from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from engine import (
    EngineError,
    RunFolder,
    draw_detections,
    plot_gates,
    plot_labels,
    plot_results,
    plot_trade_off,
    plot_widths,
    save_png,
)


def read(path: Path) -> Tensor:
    with Image.open(path) as image:
        return pil_to_tensor(image.convert("RGB"))


def assert_picture(path: Path) -> None:
    """A PNG that is not one flat colour."""
    image = read(path)
    assert min(image.shape[1:]) > 100
    assert len(image.flatten(1).unique(dim=1).T) > 10


def test_results_with_gaps(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "exp")
    with pytest.raises(EngineError, match="no finished epoch"):
        plot_results(run)
    for epoch, ap in enumerate([None, 0.2, None, 0.4]):
        run.append_row({"epoch": epoch, "loss/box": 1 / (epoch + 1), "loss/l1": 3.0, "lr": 0.01, "metrics/ap": ap})
    assert plot_results(run) == run.path / "results.png"
    assert_picture(run.path / "results.png")


def test_labels(tmp_path: Path) -> None:
    ground_truth = {
        "images": [{"id": 0}, {"id": 1}],
        "categories": [{"id": 0}, {"id": 1}],
        "annotations": [{"image_id": 0, "category_id": 1, "bbox": [0, 0, width, 2 * width]} for width in (3, 5, 8)],
    }
    assert_picture(plot_labels(ground_truth, ["cat", "dog"], tmp_path / "labels.png"))


def test_gates_and_widths_and_trade_off(tmp_path: Path) -> None:
    gates = {"a": torch.tensor([0.0, 0.5, 1.0], requires_grad=True), "b": torch.tensor([0.001])}
    assert_picture(plot_gates(gates, tmp_path / "gates.png"))
    with pytest.raises(EngineError, match="no gates"):
        plot_gates({}, tmp_path / "none.png")
    assert_picture(plot_widths({"model.0": 16, "model.1": 32}, {"model.0": 8}, tmp_path / "widths.png"))
    assert_picture(plot_trade_off({"dense": (10.0, 0.5), "half": (6.0, 0.49)}, tmp_path / "t.png", "latency, ms"))


def test_detections_are_drawn_where_they_are(tmp_path: Path) -> None:
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    drawn = draw_detections(image, torch.tensor([[20.0, 30.0, 60.0, 50.0, 0.9, 1.0]]), ["cat", "dog"])
    assert drawn[:, 40, 20].any()
    assert drawn[:, 50, 40].any()
    assert not drawn[:, 40, 40].any()
    assert not drawn[:, :, 70:].any()
    assert not image.any()
    assert torch.equal(draw_detections(image, torch.zeros(0, 6), ["cat"]), image)
    assert torch.equal(read(save_png(drawn, tmp_path / "d.png")), drawn)
