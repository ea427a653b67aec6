"""The loss on hand-made cases."""

import math
from collections import Counter

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import models
import models.loss
from models.loss import _match
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
    matches = _match((1, 4, 4), detect.anchors[0], targets, anchor_t=4.0)
    assert matches.indices.tolist() == [[0], [0], [1], [1]]
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
    matches = _match((1, 4, 4), torch.ones(1, 2), target, anchor_t=4.0)
    _, _, row, column = matches.indices
    assert sorted(zip(column.tolist(), row.tolist(), strict=True)) == cells
    back = matches.boxes_cxcywh[:, :2] + torch.stack((column, row), 1)
    torch.testing.assert_close(back, torch.tensor([centre] * len(cells)))


def test_anchor_ratio_threshold():
    anchors = torch.tensor([[1.0, 1.0], [4.1, 1.0], [1.0, 0.26], [3.9, 1.0]])
    matches = _match((4, 4, 4), anchors, torch.tensor([[0, 0, 0.375, 0.375, 0.25, 0.25]]), anchor_t=4.0)
    assert matches.indices[1].tolist() == [0, 2, 3]


def test_the_last_of_several_objects_says_how_sure_a_prediction_should_be():
    """Three objects in the cell (1, 1): objectness is trained towards the IoU with the third, whatever the others'."""
    head = models.Detect(1, [[8, 8]], [4])
    head.calibrate((8,))
    sizes = [0.25, 0.3, 0.2]
    targets = torch.tensor([[0, 0, 0.375, 0.375, size, size] for size in sizes])
    matches = _match((1, 4, 4), head.anchors[0], targets, anchor_t=4.0)
    assert matches.indices.tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 1], [1, 1, 1]] and matches.last.tolist() == [2]
    raw = torch.zeros(1, 1, 4, 4, 6, requires_grad=True)  # the anchor's own box, 0.25 of the side
    _, parts = models.DetectionLoss(head, models.LossGains(obj=1.0))([raw], targets)
    wanted = torch.zeros(16)
    wanted[5] = (0.2 / 0.25) ** 2
    balance = 4.0
    expected = balance * F.binary_cross_entropy_with_logits(torch.zeros(16), wanted)
    assert parts["obj"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_other_anchors_are_noticed(detect):
    loss = models.DetectionLoss(detect, models.LossGains())
    before = loss(maps(), TARGETS)[1]["box"]
    detect.set_anchors(torch.tensor([[9.0, 9.0], [20.0, 20.0], [40.0, 40.0]]))
    after = loss(maps(), TARGETS)[1]["box"]
    assert after != before and after == models.DetectionLoss(detect, models.LossGains())(maps(), TARGETS)[1]["box"]


class Reads(TorchDispatchMode):
    """Counts operations that a GPU has to be waited for: values that become Python's, and shapes that depend on values."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else []
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive"):
            self.counts["mask" if by_mask else name] += 1
        return func(*args, **(kwargs or {}))


def test_nothing_of_the_maps_is_read_but_by_the_iou(detect, monkeypatch):
    """Assignment happens on the CPU; torchvision's IoU gathers by masks, once for all levels and not once for each."""
    gains = models.LossGains(cls_pw=2.0, obj_pw=2.0, label_smoothing=0.1)
    loss, raw = models.DetectionLoss(detect, gains), [level.requires_grad_() for level in maps(batch=2)]
    monkeypatch.setattr("models.loss._match", lambda *arguments, real=_match: unwatched(real, *arguments))
    monkeypatch.setattr(loss, "_check", lambda *_: None)
    with Reads() as alone:
        models.loss.complete_iou(torch.rand(3, 4), torch.rand(3, 4))
    with Reads() as reads:
        total, parts = loss(raw, TARGETS)
        assert set(parts) == {"box", "obj", "cls"} and not any(part.requires_grad for part in parts.values())
    assert reads.counts == alone.counts and total.requires_grad


def unwatched(function, *arguments):
    with torch.utils._python_dispatch._disable_current_modes():
        return function(*arguments)


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
