from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data.letterbox import Letterbox
from engine import Evaluation, evaluate, evaluating, save_coco_json
from slim import SlimError
from tests.engine.tiny_detector import TinyBatch

NAMES = ("cat", "dog", "ghost")


class Oracle(nn.Module):
    """Gives the prepared detections of each batch; notes the images' type and its own mode."""

    def __init__(self, answers: list[list[Tensor]]) -> None:
        super().__init__()
        self.frozen = nn.BatchNorm2d(3)
        self.answers, self.calls = answers, 0

    def forward(self, images: Tensor) -> Any:
        assert not self.training
        assert not self.frozen.training
        assert not torch.is_grad_enabled()
        assert images.dtype == torch.float32
        assert 0.9 < float(images.max()) <= 1
        self.calls += 1
        return self.answers[self.calls - 1], []


def batch(ids: list[int], letterboxes: list[Any] | None = None) -> TinyBatch:
    images = torch.full((len(ids), 3, 32, 32), 255, dtype=torch.uint8)
    return TinyBatch(images, torch.zeros(0, 6), ids, letterboxes or [None] * len(ids))


def truth(images: int, *boxes: tuple[int, int, list[float]]) -> dict[str, Any]:
    """boxes: (image, class, x y width height); the ids start at 0, and categories at 7."""
    return {
        "images": [{"id": number, "width": 100, "height": 100} for number in range(images)],
        "categories": [{"id": 7 + number, "name": name} for number, name in enumerate(NAMES)],
        "annotations": [
            {"id": number, "image_id": image, "category_id": 7 + cls, "bbox": box}
            for number, (image, cls, box) in enumerate(boxes)
        ],
    }


def found(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).reshape(-1, 6)


def run(answers: list[list[Tensor]], loader: list[TinyBatch], ground_truth: dict[str, Any]) -> Evaluation:
    return evaluate(Oracle(answers), loader, list, ground_truth, NAMES, "cpu")


def test_perfect_detections_have_ap_one_and_absent_classes_none(capsys: pytest.CaptureFixture[str]) -> None:
    ground_truth = truth(2, (0, 0, [10, 20, 30, 10]), (1, 0, [1, 2, 50, 60]), (1, 1, [5, 5, 20, 20]))
    answers = [[found([10, 20, 40, 30, 0.9, 0])], [found([5, 5, 25, 25, 0.3, 1], [1, 2, 51, 62, 0.8, 0])]]
    result = run(answers, [batch([0]), batch([1])], ground_truth)
    assert (result.ap, result.ap50, result.ap75) == pytest.approx((1, 1, 1), abs=1e-12)
    assert result.per_class == pytest.approx({"cat": 1, "dog": 1}, abs=1e-12)
    assert result.images == 2
    assert result.seconds > 0
    assert result.detections[0]["image_id"] == 0
    assert result.detections[0]["category_id"] == 7
    assert result.detections[0]["bbox"] == [10, 20, 30, 10]
    assert capsys.readouterr().out == ""
    assert set(result.metrics()) == {"ap", "ap50", "ap75", "per_class", "images", "seconds"}
    assert str(result) == "AP 1.0000  AP50 1.0000  AP75 1.0000  (2 images)"


def test_hand_computed_ap() -> None:
    # cat: one of two found: precision 1 up to recall 0.5, which is 51 of COCO's 101 recall points.
    # dog: IoU 0.72 passes 0.50, 0.55, 0.60, 0.65 and 0.70 alone; a false one that scores higher halves the precision.
    ground_truth = truth(1, (0, 0, [0, 0, 10, 10]), (0, 0, [50, 50, 10, 10]), (0, 1, [20, 20, 10, 10]))
    answers = [[found([50, 50, 60, 60, 0.5, 0], [20, 20, 30, 27.2, 0.6, 1], [80, 80, 90, 90, 0.7, 1])]]
    result = run(answers, [batch([0])], ground_truth)
    assert result.per_class["cat"] == pytest.approx(51 / 101, abs=1e-9)
    assert result.per_class["dog"] == pytest.approx(0.25, abs=1e-9)
    assert result.ap == pytest.approx((51 / 101 + 0.25) / 2, abs=1e-9)
    assert result.ap50 == pytest.approx((51 / 101 + 0.5) / 2, abs=1e-9)
    assert result.ap75 == pytest.approx(51 / 101 / 2, abs=1e-9)


def test_detections_go_back_through_the_letterbox() -> None:
    letterbox = Letterbox(ratio_x=0.5, ratio_y=0.25, left_px=4, top_px=2, original_hw=(40, 60))
    ground_truth = truth(1, (0, 1, [8, 16, 52, 24]))
    answers = [[found([8, 6, 44, 12, 0.9, 1])]]  # x: (8 - 4) / 0.5, y: (6 - 2) / 0.25, far side clipped at 60
    result = run(answers, [batch([0], [letterbox])], ground_truth)
    assert result.detections[0]["bbox"] == [8, 16, 52, 24]
    assert result.ap == pytest.approx(1, abs=1e-12)


def test_no_detection_is_ap_zero() -> None:
    result = run([[found()]], [batch([0])], truth(1, (0, 0, [0, 0, 10, 10])))
    assert (result.ap, result.ap50, result.ap75, result.per_class) == (0, 0, 0, {"cat": 0})
    assert result.detections == []


def test_ground_truth_is_left_as_it_was() -> None:
    ground_truth = truth(1, (0, 0, [0, 0, 10, 10]))
    before = json.dumps(ground_truth)
    run([[found([0, 0, 10, 10, 0.9, 0])]], [batch([0])], ground_truth)
    assert json.dumps(ground_truth) == before


@pytest.mark.parametrize("ids", [[0], [0, 0], [0, 1, 1]])
def test_every_image_is_seen_once(ids: list[int]) -> None:
    with pytest.raises(SlimError, match="the ground truth has 2"):
        run([[found()] * len(ids)], [batch(ids)], truth(2, (0, 0, [0, 0, 10, 10])))


def test_ground_truth_without_boxes_or_with_other_classes_is_an_error() -> None:
    with pytest.raises(SlimError, match="no labelled box in 3 images"):
        run([], [], truth(3))
    with pytest.raises(SlimError, match="has 3 classes, expected 1: cat"):
        evaluate(Oracle([]), [], list, truth(1, (0, 0, [0, 0, 1, 1])), ["cat"], "cpu")


def test_every_module_gets_its_own_mode_back() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout()).train()
    model[0].eval()
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == [True, False, True]
    assert torch.is_grad_enabled()


def test_coco_json_is_what_coco_reads(tmp_path: Path) -> None:
    detections = [{"image_id": 3, "category_id": 7, "bbox": [1.5, 2.0, 3.0, 4.0], "score": 0.25}]
    save_coco_json(detections, tmp_path / "detections.json")
    assert json.loads((tmp_path / "detections.json").read_text()) == detections
