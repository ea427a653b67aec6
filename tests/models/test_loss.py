"""The loss on hand-made cases."""

import math

import pytest
import torch
from torch.nn import functional as F

import models
from models.loss import _match, _Matches, _write_last
from tests.models.processes import over_processes


@pytest.fixture
def detect():
    head = models.Detect(2, [[8, 8], [16, 16], [32, 32]], [4, 4, 4])
    head.calibrate((8, 16, 32))
    return head


def maps(num_classes=2, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 1, 32 // s, 32 // s, 5 + num_classes, generator=generator) for s in (8, 16, 32)]


TARGETS = torch.tensor([[0, 1, 0.4, 0.4, 0.25, 0.25]])


def test_no_targets_leaves_objectness_alone(detect):
    raw = [level.requires_grad_() for level in maps()]
    total, parts = models.DetectionLoss(detect, models.LossGains(obj=2.0))(raw, torch.zeros(0, 6))
    expected = sum(w * F.softplus(level[..., 4]).mean() for level, w in zip(raw, (4.0, 1.0, 0.4), strict=True))
    assert total.item() == pytest.approx(2 * expected.item())
    assert parts["box"] == parts["cls"] == 0
    total.backward()
    assert raw[0].grad[..., :4].abs().sum() == 0


def test_total_is_the_batch_times_the_parts(detect):
    total, parts = models.DetectionLoss(detect, models.LossGains())(maps(batch=3), TARGETS)
    assert total.item() == pytest.approx(3 * sum(part.item() for part in parts.values()))
    assert not any(part.requires_grad for part in parts.values())


def test_perfect_box_costs_nothing(detect):
    """On the 4x4 map, an object as large as the anchor, centred in cell (1, 1): only that cell is assigned."""
    targets = torch.tensor([[0, 0, 0.375, 0.375, 0.25, 0.25]])
    matches = _match((4, 4), detect.anchors[0], targets, anchor_t=4.0)
    cells = sorted(zip(matches.column.tolist(), matches.row.tolist(), strict=True))
    assert cells == [(1, 1)]
    raw = [torch.zeros(1, 1, n, n, 7) for n in (4, 2, 1)]
    _, parts = models.DetectionLoss(detect, models.LossGains(anchor_t=1.5))(raw, targets)
    assert parts["box"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("centre", "cells"),
    [
        ((1.2, 1.2), [(0, 1), (1, 0), (1, 1)]),
        ((1.8, 1.2), [(1, 0), (1, 1), (2, 1)]),
        ((1.8, 1.8), [(1, 1), (1, 2), (2, 1)]),
        ((0.2, 3.8), [(0, 3)]),
        ((4.0, 4.0), [(3, 3), (3, 3), (3, 3)]),
    ],
)
def test_neighbour_cells(centre, cells):
    target = torch.tensor([[0, 0, centre[0] / 4, centre[1] / 4, 0.25, 0.25]])
    matches = _match((4, 4), torch.ones(1, 2), target, anchor_t=4.0)
    assert sorted(zip(matches.column.tolist(), matches.row.tolist(), strict=True)) == cells
    back = matches.boxes_cxcywh[:, :2] + torch.stack((matches.column, matches.row), 1)
    torch.testing.assert_close(back, torch.tensor([centre] * len(cells)))


def test_anchor_ratio_threshold():
    anchors = torch.tensor([[1.0, 1.0], [4.1, 1.0], [1.0, 0.26], [3.9, 1.0]])
    matches = _match((4, 4), anchors, torch.tensor([[0, 0, 0.375, 0.375, 0.25, 0.25]]), anchor_t=4.0)
    assert matches.anchor.tolist() == [0, 2, 3]


def test_last_writer_wins():
    index = torch.tensor([0, 0, 0])
    boxes = torch.zeros(3, 4)
    matches = _Matches(index, index, torch.tensor([1, 0, 1]), index, boxes, boxes[:, :2], index)
    wanted = torch.zeros(1, 1, 2, 2)
    _write_last(wanted, matches, torch.tensor([0.9, 0.5, 0.1]))
    assert wanted.flatten().tolist() == pytest.approx([0.5, 0, 0.1, 0])


def test_class_loss_with_smoothing_and_weight(detect):
    raw = [torch.zeros(1, 1, n, n, 7) for n in (4, 2, 1)]
    for level in raw:
        level[..., 5:] = torch.tensor([1.0, -2.0])
    gains = models.LossGains(cls=1.0, cls_pw=3.0, label_smoothing=0.1, anchor_t=1.5)
    _, parts = models.DetectionLoss(detect, gains)(raw, TARGETS)

    def bce(logit, wanted):
        p = 1 / (1 + math.exp(-logit))
        return -(3 * wanted * math.log(p) + (1 - wanted) * math.log(1 - p))

    assert parts["cls"].item() == pytest.approx((bce(1.0, 0.05) + bce(-2.0, 0.95)) / 2, rel=1e-5)


def test_one_class_has_no_class_loss():
    head = models.Detect(1, [[8, 8], [16, 16], [32, 32]], [4, 4, 4])
    head.calibrate((8, 16, 32))
    targets = TARGETS.clone()
    targets[:, 1] = 0
    _, parts = models.DetectionLoss(head, models.LossGains())(maps(num_classes=1), targets)
    assert parts["cls"] == 0
    assert parts["box"] > 0


@pytest.mark.parametrize("extreme", [200.0, -200.0])
def test_extreme_logits_stay_finite(detect, extreme):
    raw = [torch.full_like(level, extreme).requires_grad_() for level in maps()]
    total, _ = models.DetectionLoss(detect, models.LossGains())(raw, TARGETS)
    total.backward()
    assert total.isfinite()
    assert all(level.grad.isfinite().all() for level in raw)


def test_autocast_changes_nothing(detect):
    raw = [level.bfloat16() for level in maps()]
    loss = models.DetectionLoss(detect, models.LossGains())
    expected, _ = loss([level.float() for level in raw], TARGETS)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = loss(raw, TARGETS)
    assert total.dtype == torch.float32
    assert total.item() == expected.item()


def test_model_or_head(tiny):
    model = models.build_model(tiny)
    raw = model(torch.rand(2, 3, 16, 16))
    gains = models.LossGains().scaled(2, 16, 2)
    assert gains.box == pytest.approx(0.075)
    assert (
        models.DetectionLoss(model, gains)(raw, TARGETS)[0]
        == models.DetectionLoss(model.detect, gains)(raw, TARGETS)[0]
    )


def test_moves_towards_the_targets(tiny):
    torch.manual_seed(0)
    model = models.build_model(tiny)
    loss = models.DetectionLoss(model, models.LossGains())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    images, targets = torch.rand(1, 3, 16, 16), torch.tensor([[0, 1, 0.5, 0.5, 0.4, 0.4]])
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        total, _ = loss(model(images), targets)
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < losses[0] / 3


@pytest.mark.parametrize(
    ("raw", "targets", "message"),
    [
        (maps()[:2], TARGETS, "2 raw maps for 3 levels"),
        (maps(), torch.zeros(2, 5), r"shape \(2, 5\)"),
        (maps(), torch.tensor([[0, 2, 0.5, 0.5, 0.1, 0.1]]), "class 2, the model has 2"),
    ],
)
def test_wrong_input(detect, raw, targets, message):
    with pytest.raises(models.ModelError, match=message):
        models.DetectionLoss(detect, models.LossGains())(raw, targets)


def test_module_without_a_head():
    with pytest.raises(models.ModelError, match="no detection head"):
        models.DetectionLoss(torch.nn.Conv2d(1, 1, 1), models.LossGains())


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3)], ids=["equal shares", "unequal shares"])
@pytest.mark.parametrize("images_with_objects", [(0, 0, 1), (1, 1, 1, 0, 3), (3,), ()])
def test_shares_of_a_batch_add_up_to_the_whole(detect, sizes, images_with_objects):
    """Means over matches are over those of all processes, also where one of them has none."""
    places = torch.rand(len(images_with_objects), 4, generator=torch.Generator().manual_seed(1)) * 0.4 + 0.2
    columns = torch.tensor([[image, image % 2] for image in images_with_objects], dtype=torch.float32)
    targets = torch.cat((columns.reshape(-1, 2), places), 1)
    whole = [level.requires_grad_() for level in maps(batch=4)]
    total, parts = models.DetectionLoss(detect, models.LossGains())(whole, targets)
    wanted = torch.autograd.grad(total, whole)

    shares = [level.detach().split(sizes) for level in whole]
    runs = []
    for number, first in enumerate((0, sizes[0])):
        raw = [level[number].requires_grad_() for level in shares]
        own = targets[(targets[:, 0] >= first) & (targets[:, 0] < first + sizes[number])].clone()
        own[:, 0] -= first

        def run(reduce, raw=raw, own=own):
            total, parts = models.DetectionLoss(detect, models.LossGains(), reduce)(raw, own)
            return total, parts, torch.autograd.grad(total, raw)

        runs.append(run)
    found = over_processes(runs)
    torch.testing.assert_close(sum(total for total, _, _ in found), total)
    for level, want in enumerate(wanted):
        torch.testing.assert_close(torch.cat([slopes[level] for _, _, slopes in found]), want)
    if sizes[0] == sizes[1]:
        for name, part in parts.items():
            torch.testing.assert_close(sum(parts[name] for _, parts, _ in found) / 2, part)
