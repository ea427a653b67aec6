"""Copying weights between models that are alike in part."""

import copy
import math

import pytest
import torch

import models


def test_all_fit(tiny):
    source, target = models.build_model(tiny), models.build_model(tiny)
    transfer = models.transfer_weights(target, source.state_dict())
    assert transfer.skipped == ()
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(source.eval()(images)[0], target.eval()(images)[0])


def test_anchors_come_along_where_they_fit(tiny):
    source = models.build_model({**tiny, "anchors": [[2, 2, 3, 3], [8, 8, 9, 9]]}, num_classes=5)
    target = models.build_model(tiny)
    models.transfer_weights(target, source.state_dict())
    assert target.anchors_px.tolist() == source.anchors_px.tolist()

    three = models.build_model({**tiny, "anchors": 3})
    before = three.anchors_px
    transfer = models.transfer_weights(three, source.state_dict())
    assert torch.equal(three.anchors_px, before)
    assert "model.6.anchors: shape (2, 2, 2) in the checkpoint, (2, 3, 2) in the model" in transfer.skipped


def test_both_sides_are_reported_and_statistics_stay_together(tiny):
    source = models.build_model(tiny)
    wider = {**tiny, "backbone": [[-1, 1, "Conv", [16, 3, 2]], *tiny["backbone"][1:]]}
    target = models.build_model(wider)
    state = source.state_dict()
    state["extra"] = torch.ones(1)
    del state["model.6.m.0.bias"]
    state["model.0.bn.num_batches_tracked"] += 7
    state["model.1.bn.num_batches_tracked"] += 7
    transfer = models.transfer_weights(target, state)
    assert "extra: not in the model" in transfer.skipped
    assert "model.6.m.0.bias: not in the checkpoint" in transfer.skipped
    assert "model.0.bn.num_batches_tracked: its running mean does not fit" in transfer.skipped
    assert target.model[0].bn.num_batches_tracked == 0
    assert target.model[1].bn.num_batches_tracked == 7


@pytest.mark.parametrize("state", [{}, {"other.weight": torch.ones(3)}, {"model.0.conv.weight": torch.ones(1)}])
def test_nothing_fits(tiny, state):
    model = models.build_model(tiny)
    state = {**state, "model.6.anchors": torch.ones(2, 2, 2)}
    with pytest.raises(models.ModelError, match="no weight of the checkpoint fits"):
        models.transfer_weights(model, state)
    assert model.anchors_px[0, 0].tolist() == [4, 5]


def rows(model, level, index):
    """[anchors, inputs + 1] weights and bias of one output of every anchor."""
    conv = model.detect.m[level]
    both = torch.cat((conv.weight.flatten(1), conv.bias[:, None]), 1)
    return both.view(len(model.anchors_px[0]), -1, both.shape[1])[:, index]


def trained(tiny, num_classes=3):
    """A network whose head is nowhere as it was drawn."""
    model = models.build_model(tiny, num_classes)
    with torch.no_grad():
        for conv in model.detect.m:
            conv.bias += torch.rand_like(conv.bias) + 1
        model.detect.anchors *= 1.5
    return model


def test_renewed_head_keeps_boxes_objectness_and_known_classes(tiny):
    old = trained(tiny)
    model = copy.deepcopy(old)
    models.renew_head(model, [2, None, 0, None])
    assert model.num_classes == 4 and model.description["nc"] == 4
    for level in range(2):
        for new, before in (*((i, i) for i in range(5)), (5, 7), (7, 5)):
            assert torch.equal(rows(model, level, new), rows(old, level, before))
        for unknown in (6, 8):
            biases = rows(model, level, unknown)[:, -1]
            prior = math.log(0.6 / (4 - 0.99999))
            bound = old.detect.m[level].in_channels ** -0.5  # of torch's draw around the prior
            assert (biases - prior).abs().max() <= bound
            assert not any(torch.equal(rows(model, level, unknown), rows(old, level, i)) for i in range(5, 8))
    assert torch.equal(model.anchors_px, old.anchors_px)
    body = {k: v for k, v in old.state_dict().items() if ".m." not in k or not k.startswith("model.6.")}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in body.items())


def test_head_without_a_known_class_starts_anew(tiny):
    old = trained(tiny)
    model = copy.deepcopy(old)
    torch.manual_seed(5)
    models.renew_head(model, [None, None])
    torch.manual_seed(5)
    fresh = models.build_model(tiny, 2)
    for ours, drawn in zip(model.detect.m, fresh.detect.m, strict=True):
        assert torch.equal(ours.weight, drawn.weight) and torch.equal(ours.bias, drawn.bias)
    assert torch.equal(model.anchors_px, old.anchors_px)


def test_narrow_head_is_drawn_for_its_width(tiny):
    """An unknown class's weights spread like those of a convolution of the narrow width, and known rows stay narrow."""
    wide = {**tiny, "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [512, 1, 1]]]}
    old = trained(wide)
    conv = old.detect.m[1]
    conv.weight, conv.in_channels = torch.nn.Parameter(conv.weight[:, :128].clone()), 128
    kept = rows(old, 1, 5)
    torch.manual_seed(0)
    models.renew_head(old, [0] + [None] * 40)
    narrow = old.detect.m[1]
    assert narrow.weight.shape == (2 * 46, 128, 1, 1) and narrow.in_channels == 128
    assert torch.equal(rows(old, 1, 5), kept)
    drawn = rows(old, 1, 6)[:, :-1]
    assert 0.95 * 128**-0.5 < drawn.abs().max() <= 128**-0.5 * 1.001
