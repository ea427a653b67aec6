"""Cuts see training images and loss as the training of their checkpoint did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data import Augment, DataSettings, DetectionDataset, build_loader
from detection.datasets import open_data
from detection.flags import PruneFlags
from detection.losses import make_loss, training_loss
from detection.network import Network, make_build, read_network, save_network
from detection.pruning import open_prune_inputs
from models import LossGains, build_model, load_description
from tests.scripts.runs import ROOT

PLAIN = Augment(mosaic=0.0, scale=0.0, translate=0.0, fliplr=0.0, hsv_h=0.0, hsv_s=0.0, hsv_v=0.0)
GAINS = LossGains(box=0.5, cls=0.1)


@pytest.fixture
def network(tiny: Path) -> Network:
    torch.manual_seed(2)
    description = {**load_description(ROOT / "models" / "yolov5n.yaml"), "width_multiple": 0.02, "depth_multiple": 0.1}
    names = open_data(DataSettings(data=str(tiny))).names
    model = build_model(description, len(names))
    return Network(model, make_build(model, names))


@pytest.mark.parametrize("noted", [True, False])
def test_statistics_and_scores_use_the_checkpoints_augmentation_and_gains(
    network: Network, tiny: Path, tmp_path: Path, noted: bool
) -> None:
    if noted:
        network.trained_with(PLAIN, GAINS)
    save_network(tmp_path / "last.pt", network.model, network.build)
    known = read_network(tmp_path / "last.pt")
    augment, gains = (PLAIN, GAINS) if noted else (Augment(), LossGains())
    assert (known.augment, known.gains) == (augment, gains)

    dataset = DataSettings(data=str(tiny))
    inputs = open_prune_inputs(PruneFlags(weights=str(tmp_path / "last.pt"), img=64, dataset=dataset, device="cpu"))
    train_set = DetectionDataset(open_data(dataset), "train", 64, augment, 0)
    batch = next(iter(build_loader(train_set, 16, shuffle=True, seed=0)))
    assert inputs.training_batches is not None
    model = inputs.network.model.eval()
    loss, found = training_loss(model, 64, inputs.network.gains), next(inputs.training_batches())
    images = found.images.float() / 255
    assert torch.equal(found.images, batch.images) and torch.equal(found.targets, batch.targets)
    expected, _ = make_loss(model, gains, 64)(model(images)[1], batch.targets)
    assert torch.equal(loss(model, found), expected)
