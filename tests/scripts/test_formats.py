"""A data set in another format is the same to the scripts."""

from __future__ import annotations

from pathlib import Path

import torch

from data import Augment, DataSettings, load_data_config
from detection.datasets import open_data, training_batches
from detection.losses import training_loss
from detection.network import start_network
from models import LossGains
from tests.data.other_formats import write_again
from tests.scripts.runs import NAMES, ROOT


def test_every_format_gives_the_same_loss(tiny: Path, tmp_path: Path) -> None:
    files = {"text": tiny}
    for to in ("coco", "voc"):
        files[to] = write_again(load_data_config(tiny), to, tmp_path / to)
    torch.manual_seed(0)
    model = start_network("", str(ROOT / "models" / "yolov5n.yaml"), NAMES).model.eval()
    found = {}
    for name, file in files.items():
        config = open_data(DataSettings(data=str(file)))
        batches = training_batches(config, 64, 8, seed=0, augment=Augment())
        loss = training_loss(model, 64, LossGains())
        with torch.no_grad():
            found[name] = [float(loss(model, batch)) for batch in batches]
    assert len(found["text"]) == 2 and found["text"][0] != found["text"][1]
    assert found["coco"] == found["text"] == found["voc"]
