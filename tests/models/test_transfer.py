"""Copying weights between models that are alike in part."""

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
