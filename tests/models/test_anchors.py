"""How anchors fit boxes, worked out by hand; refits that are better, repeatable, and reach head and loss."""

from __future__ import annotations

import math

import pytest
import torch

import models
from models import AnchorFit, DetectionLoss, LossGains, ModelError, anchor_fit, build_model, refit_anchors

ANCHORS = torch.tensor([[[10.0, 10.0]], [[40.0, 20.0]]])


def tall_boxes(count: int = 400) -> torch.Tensor:
    """1 to 3 px wide, 8 to 40 px tall."""
    drawn = torch.rand(count, 2, generator=torch.Generator().manual_seed(1))
    return torch.stack((1 + 2 * drawn[:, 0], 8 * 5 ** drawn[:, 1]), 1)


def test_recall_by_hand() -> None:
    boxes = torch.tensor(
        [
            [10.0, 10.0],  # of the first anchor's size; 4 times less wide than the second, which is out of reach
            [20.0, 20.0],  # 2 and 2
            [39.9, 5.1],  # 3.99 times the first anchor's width; 3.92 times less tall than the second
            [2.4, 10.0],  # more than 4 times narrower than both
            [40.0, 40.0],  # exactly 4 times the first, which is too much; 2 times the second
            [200.0, 200.0],  # out of reach
        ]
    )
    assert anchor_fit(ANCHORS, boxes) == AnchorFit(4 / 6, (1 + 2 + 2 + 0 + 1 + 0) / 6)
    assert anchor_fit(ANCHORS, boxes, anchor_t=6.0) == AnchorFit(5 / 6, (2 + 2 + 2 + 1 + 2 + 0) / 6)
    assert str(anchor_fit(ANCHORS, boxes)) == "66.67% of the boxes within reach, 1.00 anchors a box"


def test_the_loss_takes_what_the_fit_counts(tiny: dict) -> None:
    """Anchors above the threshold are the anchors that the loss assigns an object to."""
    from models.loss import _match

    model = build_model(tiny)
    boxes = torch.rand(50, 2, generator=torch.Generator().manual_seed(0)) * 60 + 1
    fit = anchor_fit(model.anchors_px, boxes)
    assigned = 0
    for stride, anchors in zip(model.stride_px, model.detect.anchors, strict=True):
        side = 128 // stride
        for box in boxes:
            centre = (side // 2 + 0.25) / side
            target = torch.tensor([[0, 0, centre, centre, *(box / 128).tolist()]])
            found = _match((2, side, side), anchors, target, 4.0)
            assigned += len(set(found.indices[1].tolist()))
    assert assigned == round(fit.anchors_above * 50)


def test_a_refit_of_extreme_boxes() -> None:
    coco = torch.tensor(
        [[10, 13], [16, 30], [33, 23], [30, 61], [62, 45], [59, 119], [116, 90], [156, 198], [373, 326.0]]
    )
    boxes = tall_boxes()
    before, anchors = anchor_fit(coco, boxes), refit_anchors(boxes, 9)
    after = anchor_fit(anchors, boxes)
    assert before.recall < 0.3 and after.recall == 1.0 and after.anchors_above > before.anchors_above
    assert anchors.shape == (9, 2) and anchors.dtype == torch.float32
    assert anchors.prod(1).tolist() == sorted(anchors.prod(1).tolist())
    assert (anchors[:, 0] < anchors[:, 1]).all()


def test_the_evolution_improves_on_the_clusters() -> None:
    boxes = torch.exp(torch.randn(500, 2, generator=torch.Generator().manual_seed(2)) * 1.5 + 3)
    clusters, evolved = refit_anchors(boxes, 6, generations=0), refit_anchors(boxes, 6)
    assert anchor_fit(evolved, boxes).recall > anchor_fit(clusters, boxes).recall


def test_the_same_seed_gives_the_same_anchors_and_touches_no_other_generator() -> None:
    state = torch.get_rng_state()
    first, second = (refit_anchors(tall_boxes(), 6, generations=50) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, refit_anchors(tall_boxes(), 6, generations=50, seed=1))


def test_a_sample_stands_for_many_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    import models.anchors

    monkeypatch.setattr(models.anchors, "_MOST_BOXES", 100)
    assert anchor_fit(refit_anchors(tall_boxes(5000), 9, generations=200), tall_boxes(5000)).recall > 0.95


@pytest.mark.parametrize("boxes", [[[5.0, 7.0]], [[5.0, 7.0]] * 20, [[1.0, 1.0], [9.0, 9.0]], [[0.5, 0.5]]])
def test_few_or_equal_boxes(boxes: list[list[float]]) -> None:
    anchors = refit_anchors(torch.tensor(boxes), 6, generations=20)
    assert anchors.shape == (6, 2) and torch.isfinite(anchors).all() and (anchors > 0).all()


def test_boxes_that_are_hardly_there_do_not_count() -> None:
    dots = torch.full((1000, 2), 0.5)
    anchors = refit_anchors(torch.cat((dots, tall_boxes(50))), 3, generations=100)
    assert anchors.amin() > 0.9


@pytest.mark.parametrize(
    ("boxes", "count", "message"),
    [
        (torch.zeros(0, 2), 3, r"boxes of the shape \(0, 2\), expected \[n, 2\]"),
        (torch.tensor([[3.0, 0.0]]), 3, "all sides above 0"),
        (torch.tensor([[3.0, math.inf]]), 3, "all sides above 0"),
        (torch.ones(4, 3), 3, r"shape \(4, 3\)"),
        (torch.ones(4, 2), 0, "0 are asked for"),
    ],
)
def test_what_are_no_sizes(boxes: torch.Tensor, count: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        refit_anchors(boxes, count)


def test_a_head_takes_anchors_in_pixels_the_smallest_to_the_finest_level(tiny: dict) -> None:
    detect = build_model(tiny).detect
    assert detect.stride_px == (2, 4)
    detect.set_anchors(torch.tensor([[40.0, 40], [4, 4], [8, 6], [20, 20]]))
    assert detect.anchors_px.tolist() == [[[4, 4], [8, 6]], [[20, 20], [40, 40]]]
    assert detect.anchors.tolist() == [[[2, 2], [4, 3]], [[5, 5], [10, 10]]]


def test_a_head_whose_levels_go_from_coarse_to_fine(tiny: dict) -> None:
    tiny["head"][-1][0] = [2, 5]
    detect = build_model(tiny).detect
    assert detect.stride_px == (4, 2)
    detect.set_anchors(torch.tensor([[4.0, 4], [8, 6], [20, 20], [40, 40]]))
    assert detect.anchors_px.tolist() == [[[20, 20], [40, 40]], [[4, 4], [8, 6]]]


@pytest.mark.parametrize("anchors", [torch.ones(3, 2), torch.ones(8), torch.zeros(4, 2), torch.ones(2, 2, 3)])
def test_a_head_refuses_other_counts_and_no_sizes(tiny: dict, anchors: torch.Tensor) -> None:
    detect = build_model(tiny).detect
    before = detect.anchors.clone()
    with pytest.raises(ModelError, match=r"expected \(2, 2, 2\) with all sides above 0"):
        detect.set_anchors(anchors)
    assert torch.equal(detect.anchors, before)


def test_loss_and_decoding_use_new_anchors(tiny: dict) -> None:
    torch.manual_seed(0)
    model = build_model(tiny)
    loss = DetectionLoss(model, LossGains())
    targets = torch.tensor([[0.0, 1.0, 0.5, 0.5, 3 / 64, 32 / 64]])  # 3 x 32 px: out of reach of every anchor
    raw = model(torch.rand(1, 3, 64, 64))
    assert loss(raw, targets)[1]["box"] == 0
    model.detect.set_anchors(torch.tensor([[3.0, 32.0], [3, 33], [3, 34], [3, 35]]))
    assert loss(raw, targets)[1]["box"] > 0
    zeros = [torch.zeros_like(level) for level in raw]
    sizes = model.detect.decode(zeros)[0, :, 2:4]
    assert set(map(tuple, sizes.tolist())) == {(3, 32), (3, 33), (3, 34), (3, 35)}
    assert models.Detect is type(model.detect)
