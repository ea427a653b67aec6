"""Distillation on hand-made maps and tiny networks."""

import copy
import functools
import math

import pytest
import torch

import models
from models import DetectionLoss, DistillationLoss, DistillGains, LossGains
from tests.models.processes import over_processes

GAINS = LossGains(box=0.05, obj=1.0, cls=0.5)
TARGETS = torch.tensor([[0, 1, 0.5, 0.5, 0.4, 0.4], [1, 0, 0.3, 0.6, 0.3, 0.5]])


def networks(tiny, seed=0):
    """A student and a teacher, not trained."""
    torch.manual_seed(seed)
    return seeing(models.build_model(tiny)), seeing(models.build_model(tiny))


def seeing(model):
    """With objects in half of the cells: else neither box nor class would be taught."""
    for conv in model.detect.m:
        conv.bias.data.view(2, -1)[:, 4] = 0.0
    return model


def distilling(student, teacher, **gains):
    return DistillationLoss(DetectionLoss(student, GAINS), teacher, DistillGains(**gains))


def one_cell(box=(0.0, 0.0, 0.0, 0.0), obj=0.0, cls=(0.0, 0.0)):
    return torch.tensor([*box, obj, *cls]).view(1, 1, 1, 1, 7)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def kl(student, teacher):
    p, q = sigmoid(teacher), sigmoid(student)
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


@pytest.fixture
def head():
    """One level of stride 8 with one anchor of 1x1 grid units, two classes."""
    detect = models.Detect(2, [[8, 8]], [4])
    detect.calibrate((8,))
    return detect


def test_parts_by_hand(head):
    """Two cells: one in which the teacher sees an object of 4x4 anchors at the centre, one in which it sees nothing."""
    seen = one_cell(box=(0.0, 0.0, 30.0, 30.0), obj=2.0, cls=(1.0, -1.0))
    empty = one_cell(box=(3.0, 3.0, 3.0, 3.0), obj=-6.0, cls=(3.0, 3.0))
    wanted = [torch.cat((seen, empty), 3)]
    found = one_cell(obj=0.5, cls=(0.0, 2.0))  # a box of one anchor at the same centre
    raw = [torch.cat((found, one_cell(obj=-4.0)), 3)]
    share = sigmoid(2.0)  # less than one object's worth: divided by 1
    box = (1 - 1 / 16) * share
    obj = 4.0 * (kl(0.5, 2.0) + kl(-4.0, -6.0)) / 2
    cls = (kl(0.0, 1.0) + kl(2.0, -1.0)) / 2 * share
    loss = distilling(head, copy.deepcopy(head), box=2.0, cls=3.0)
    assert loss.distance(raw, wanted).item() == pytest.approx(0.05 * 2 * box + obj + 0.5 * 3 * cls, rel=1e-5)

    # Two objects: each counts by its share of the objectness; at the same place the distance is their mean.
    wanted, raw = [torch.cat((seen, seen), 3)], [torch.cat((found, found), 3)]
    expected = 0.05 * 2 * (1 - 1 / 16) + 4.0 * kl(0.5, 2.0) + 0.5 * 3 * (kl(0.0, 1.0) + kl(2.0, -1.0)) / 2
    assert loss.distance(raw, wanted).item() == pytest.approx(expected, rel=1e-5)


def test_box_of_an_own_anchor_is_compared(head):
    """Boxes are compared in grid units, with each cell's own anchor."""
    two = models.Detect(2, [[8, 8, 80, 16]], [4])
    two.calibrate((8,))
    wanted = [one_cell(obj=9.0).repeat(1, 2, 1, 1, 1)]
    raw = [wanted[0].clone()]
    raw[0][0, 1, 0, 0, 2] = 30.0  # the second anchor's width times 4: overlap 1 / 4
    loss = distilling(two, copy.deepcopy(two))
    centre_term_free = 1 - 1 / 4 + alpha_v(40, 2, 10, 2, 1 / 4)
    assert loss.distance(raw, wanted).item() == pytest.approx(0.05 * centre_term_free / 2, rel=1e-4)


def alpha_v(width, height, other_width, other_height, iou):
    """Complete IoU's term for the aspect ratio."""
    v = 4 / math.pi**2 * (math.atan(width / height) - math.atan(other_width / other_height)) ** 2
    return v * v / (1 - iou + v)


def test_student_that_agrees_costs_nothing_and_is_not_moved(tiny):
    _, teacher = networks(tiny)
    loss = distilling(copy.deepcopy(teacher), teacher)
    with torch.no_grad():
        wanted = teacher(torch.rand(2, 3, 16, 16))[1]
    raw = [level.clone().requires_grad_() for level in wanted]
    distance = loss.distance(raw, wanted)
    distance.backward()
    assert distance.item() == pytest.approx(0, abs=1e-6)
    assert max(level.grad.abs().max().item() for level in raw) < 1e-6
    other = [level.detach() + 0.5 for level in wanted]
    assert loss.distance(other, wanted) > 1e-2


def test_teacher_learns_nothing_and_stays_in_evaluation_mode(tiny):
    student, teacher = networks(tiny)
    before = copy.deepcopy(teacher.state_dict())
    loss, images = distilling(student, teacher.train()), torch.rand(2, 3, 16, 16)
    total, parts = loss(student(images), TARGETS, images)
    total.backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not any(module.training for module in teacher.modules()) and student.training
    assert all(p.grad is not None for p in student.parameters())
    assert not any(part.requires_grad for part in parts.values())
    assert total.item() == pytest.approx(2 * sum(part.item() for part in parts.values()), rel=1e-5)


def test_weight_0_is_the_labels_loss_bit_for_bit(tiny):
    student, teacher = networks(tiny)
    images = torch.rand(2, 3, 16, 16)
    plain = DetectionLoss(student, GAINS)
    gradients = []
    for loss in (plain, distilling(student, teacher, weight=0.0), distilling(student, teacher, weight=1.0)):
        student.zero_grad()
        total, parts = loss(student(images), TARGETS, images)
        total.backward()
        gradients.append([p.grad.clone() for p in student.parameters()])
        if loss is plain:
            expected, expected_parts = total, parts
        elif loss.gains.weight == 0:
            assert torch.equal(total, expected)
            assert {**expected_parts, "distill": torch.zeros(())} == parts
    assert all(torch.equal(a, b) for a, b in zip(gradients[0], gradients[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(gradients[0], gradients[2], strict=True))


@pytest.mark.parametrize("width", [8, 16])
def test_a_student_of_any_width_moves_towards_the_teacher(tiny, width):
    torch.manual_seed(0)
    narrow = {**tiny, "backbone": [[-1, 1, "Conv", [width, 3, 2]], *tiny["backbone"][1:]]}
    student, (_, teacher) = seeing(models.build_model(narrow)), networks(tiny)
    loss = distilling(student, teacher)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    images, distances = torch.rand(4, 3, 16, 16), []
    wanted = teacher(images)[1]
    for _ in range(15):
        optimizer.zero_grad()
        distance = loss.distance(student(images), wanted)
        distance.backward()
        optimizer.step()
        distances.append(distance.item())
    assert distances[-1] < distances[0] / 3


def test_extreme_maps_stay_finite(head):
    loss = distilling(head, copy.deepcopy(head))
    for wanted in (200.0, -200.0):
        for found in (200.0, -200.0):
            raw = [torch.full((1, 1, 2, 2, 7), found).requires_grad_()]
            distance = loss.distance(raw, [torch.full((1, 1, 2, 2, 7), wanted)])
            distance.backward()
            assert distance.isfinite() and raw[0].grad.isfinite().all()


def test_autocast_changes_the_teacher_alone(tiny):
    """The teacher runs in the caller's precision, its maps are compared in FP32."""
    student, teacher = networks(tiny)
    loss, images = distilling(student, teacher), torch.rand(2, 3, 16, 16)
    raw = student(images)
    dtypes = []
    teacher.detect.register_forward_hook(lambda *call: dtypes.append(call[2][1][0].dtype))
    loss(raw, TARGETS, images)
    with torch.autocast("cpu", torch.bfloat16):
        total, parts = loss(raw, TARGETS, images)
    assert dtypes == [torch.float32, torch.bfloat16]
    assert total.dtype == parts["distill"].dtype == torch.float32
    halves = [level.bfloat16() for level in teacher(images)[1]]
    assert torch.equal(loss.distance(raw, halves), loss.distance(raw, [level.float() for level in halves]))


def test_one_class_teaches_objectness_and_boxes_alone():
    detect = models.Detect(1, [[8, 8]], [4])
    detect.calibrate((8,))
    loss = distilling(detect, copy.deepcopy(detect))
    wanted = [torch.zeros(1, 1, 1, 1, 6)]
    raw = [torch.tensor([0.0, 0, 0, 0, 0, 5]).view(1, 1, 1, 1, 6)]
    assert loss.distance(raw, wanted).item() == pytest.approx(0, abs=1e-6)


def test_heads_that_do_not_agree_are_refused(tiny):
    student, _ = networks(tiny)
    other = {**tiny, "anchors": [[4, 5, 6, 6], [12, 10, 20, 26]]}
    three = {**tiny, "head": [*tiny["head"][:-1], [[2], 1, "Detect", ["nc", "anchors"]]], "anchors": [[4, 5, 6, 6]]}
    for description, num_classes, message in (
        (tiny, 3, "classes 3, the student's are 2"),
        (other, 2, "anchors 4x5 6x6 12x10 20x26 px, the student's are 4x5 6x6 12x10 20x24"),
        (three, 2, r"strides \(4,\), the student's are \(2, 4\)"),
    ):
        with pytest.raises(models.ModelError, match=message) as caught:
            distilling(student, models.build_model(description, num_classes))
        assert "\n" not in str(caught.value)
    with pytest.raises(models.ModelError, match="Conv2d has no detection head"):
        distilling(student, torch.nn.Conv2d(1, 1, 1))


def test_shares_of_a_batch_add_up_to_the_whole(tiny):
    """Two processes of which one sees more objects than the other; their losses are the whole batch's."""
    student, teacher = networks(tiny)
    student.train()
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = [level.detach() for level in student.eval()(images)[1]]
    loss = distilling(student, teacher, weight=2.0)
    total, parts = loss(whole, TARGETS, images)

    def run(reduce, share):
        own = TARGETS[TARGETS[:, 0].long() // 3 == share]  # both objects lie in the first three images
        labels = DetectionLoss(student, GAINS, reduce)
        part = slice(0, 3) if share == 0 else slice(3, 4)
        return DistillationLoss(labels, teacher, DistillGains(weight=2.0))([x[part] for x in whole], own, images[part])

    found = over_processes([functools.partial(run, share=share) for share in (0, 1)])
    torch.testing.assert_close(sum(total for total, _ in found), total)
    distill = (found[0][1]["distill"] * 3 + found[1][1]["distill"]) / 4
    torch.testing.assert_close(distill, parts["distill"])
