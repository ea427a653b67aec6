from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slim import SlimError
from tracking import (
    RunFolder,
    draw_detections,
    plot_gates,
    plot_labels,
    plot_results,
    plot_trade_off,
    plot_widths,
    read_png,
    save_png,
    side_by_side,
    summarise_gates,
)


def assert_picture(path: Path) -> None:
    """A PNG that is not one flat colour."""
    image = read_png(path)
    assert min(image.shape[1:]) > 100
    assert len(image.flatten(1).unique(dim=1).T) > 10


def test_results_with_gaps(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(SlimError, match="no finished epoch"):
        plot_results([], tmp_path / "results.png")
    for epoch, ap in enumerate([None, 0.2, None, 0.4]):
        run.append_row({"epoch": epoch, "loss/box": 1 / (epoch + 1), "loss/l1": 3.0, "lr": 0.01, "metrics/ap": ap})
    assert plot_results(run.read_rows(), tmp_path / "results.png") == tmp_path / "results.png"
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
    assert_picture(plot_gates(summarise_gates(gates), tmp_path / "gates.png"))
    assert_picture(plot_widths({"model.0": 16, "model.1": 32}, {"model.0": 8}, tmp_path / "widths.png"))
    assert_picture(plot_trade_off({"latency, ms": {"dense": (10.0, 0.5), "half": (6.0, 0.49)}}, tmp_path / "t.png"))


def test_detections_are_drawn_where_they_are(tmp_path: Path) -> None:
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    drawn = draw_detections(image, torch.tensor([[20.0, 30.0, 60.0, 50.0, 0.9, 1.0]]), ["cat", "dog"])
    assert drawn[:, 40, 20].any()
    assert drawn[:, 50, 40].any()
    assert not drawn[:, 40, 40].any()
    assert not drawn[:, :, 70:].any()
    assert not image.any()
    assert torch.equal(draw_detections(image, torch.zeros(0, 6), ["cat"]), image)
    assert torch.equal(read_png(save_png(drawn, tmp_path / "d.png")), drawn)


def test_columns_of_pictures_stand_side_by_side_under_their_titles(tmp_path: Path) -> None:
    red, blue = (torch.zeros(3, 40, 60, dtype=torch.uint8) for _ in range(2))
    red[0], blue[2] = 255, 255
    drawn = side_by_side({"dense": [red, red], "slim": [blue, blue]})
    assert drawn.shape == (3, 22 + 40 + 6 + 40, 60 + 6 + 60)
    assert drawn[:, 30, 30].tolist() == [255, 0, 0] and drawn[:, 30, 100].tolist() == [0, 0, 255]
    assert drawn[:, 30, 63].tolist() == [255, 255, 255]
    for left in (0, 66):
        assert (drawn[:, :22, left : left + 60].amin(0) < 100).any(), "a title"
    assert torch.equal(read_png(save_png(drawn, tmp_path / "s.png")), drawn)


def test_names_are_no_formulae(tmp_path: Path) -> None:
    ground_truth = {"images": [], "categories": [{"id": 0}], "annotations": []}
    assert_picture(plot_labels(ground_truth, ["$\\broken$"], tmp_path / "labels.png"))
