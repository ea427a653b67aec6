"""Agreement with the reference implementation's numbers."""

import json

import numpy as np
import pytest
import torch

import models
from data.images import grey, letterbox, letterbox_of, read_image, resize


def letterbox_bilinearly(image, side_px):
    """uint8 [3, H, W] -> uint8 [3, side, side] and its geometry, shrunk as for training."""
    geometry, (height, width) = letterbox_of(tuple(image.shape[1:]), side_px)
    square, top, left = grey(side_px, side_px), geometry.top_px, geometry.left_px
    square[:, top : top + height, left : left + width] = resize(image, (height, width), area=False)
    return square, geometry


def test_checkpoint_imports(imported):
    assert imported.description["nc"] == len(imported.names) == 80
    assert imported.names[:2] == ["person", "bicycle"]
    assert json.loads(json.dumps(imported.description)) == imported.description
    model = models.build_model(imported.description)
    transfer = models.transfer_weights(model, imported.state_dict)
    assert transfer.skipped == ()
    assert set(transfer.loaded) == set(model.state_dict())
    assert {t.dtype for t in imported.state_dict.values()} == {torch.float32, torch.int64}
    assert str(transfer) == "349 of 349 tensors loaded"


def test_decoded_output(published, shared):
    reference = np.load(shared / "reference" / "yolov5n_output.npz")
    expected = torch.from_numpy(reference["decoded"])
    with torch.no_grad():
        decoded, _ = published(torch.from_numpy(reference["input"]))
    assert decoded.shape == expected.shape
    assert (decoded - expected)[..., :4].abs().max() <= 1e-3
    assert (decoded - expected)[..., 4:].abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "placing"),
    [("bus.jpg", letterbox_bilinearly), ("zidane.jpg", letterbox_bilinearly), ("zidane.jpg", letterbox)],
)
def test_detections(published, imported, shared, name, placing):
    """The reference shrinks bilinearly when it detects; zidane.jpg shrinks to the half, where averages are the same."""
    expected = json.loads((shared / "reference" / "detections.json").read_text())[name]
    square, placed = placing(read_image(shared / "reference" / name), 640)
    with torch.no_grad():
        (found,) = models.non_max_suppression(published(square[None].float() / 255)[0], conf=0.25, iou=0.45)
    assert [imported.names[int(label)] for label in found[:, 5]] == [d["cls"] for d in expected]
    boxes = placed.to_original(found[:, :4])
    # The file is rounded to 0.1 pixels and four digits.
    assert (boxes - torch.tensor([d["xyxy"] for d in expected])).abs().max() <= 0.06
    assert (found[:, 4] - torch.tensor([d["conf"] for d in expected])).abs().max() <= 1e-4


def test_loss(shared):
    reference = np.load(shared / "reference" / "loss.npz")
    gains = json.loads((shared / "reference" / "loss_gains.json").read_text())
    assert gains.pop("fl_gamma") == 0
    gains = models.LossGains(**gains)
    assert models.LossGains().scaled(num_classes=3, image_size_px=320, num_levels=3) == gains

    detect = models.Detect(3, reference["anchors_px"].reshape(3, 6).tolist(), [8, 8, 8])
    detect.calibrate((8, 16, 32))
    raw = [torch.from_numpy(reference[level]).requires_grad_() for level in ("p3", "p4", "p5")]
    total, parts = models.DetectionLoss(detect, gains)(raw, torch.from_numpy(reference["targets"]))
    assert total.item() == pytest.approx(reference["total"].item(), rel=1e-5)
    assert [parts[k].item() for k in ("box", "obj", "cls")] == pytest.approx(
        reference["box_obj_cls"].tolist(), rel=1e-5
    )
    total.backward()
    assert all(level.grad.isfinite().all() and level.grad.abs().sum() > 0 for level in raw)


def test_another_class_count_keeps_the_rest(imported):
    model = models.build_model(imported.description, num_classes=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    transfer = models.transfer_weights(model, imported.state_dict)
    head = [f"model.24.m.{level}.{kind}" for level in range(3) for kind in ("weight", "bias")]
    assert sorted(line.split(":")[0] for line in transfer.skipped) == sorted(head)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in head)
    assert len(transfer.loaded) == 343
    assert all(torch.equal(model.state_dict()[name], imported.state_dict[name]) for name in transfer.loaded)
    assert (
        "model.24.m.0.weight: shape (255, 64, 1, 1) in the checkpoint, (24, 64, 1, 1) in the model" in transfer.skipped
    )
    assert "2 more" in str(transfer)
