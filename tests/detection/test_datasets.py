"""Data sets as scripts open them: drawn or read as the description says, and no more decoded than is drawn."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import data.dataset
from data import Augment, DataConfig, DataSettings, DetectionDataset, load_data_config
from detection.datasets import open_data, real_images, training_batches
from detection.losses import training_loss
from models import LossGains, build_model, load_description
from tests.data.scenes import ROOT, write_rectangles


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files of images that are decoded."""
    files: list[Path] = []
    real = data.dataset.read_image

    def read(path: Path, max_pixels: int) -> Any:
        files.append(path)
        return real(path, max_pixels)

    monkeypatch.setattr(data.dataset, "read_image", read)
    return files


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return write_rectangles(tmp_path / "set", 12)


def test_scores_of_two_batches_of_four_decode_eight_images(config: DataConfig, decoded: list[Path]) -> None:
    """As for --criterion taylor."""
    model = build_model(load_description(ROOT / "models" / "yolov5n.yaml"), 4).eval()
    batches = training_batches(config, 64, 4, seed=0, augment=Augment(mosaic=0.0))
    loss = training_loss(model, 64, LossGains())
    with torch.no_grad():
        assert all(loss(model, batch).isfinite() for batch in islice(batches, 2))
    assert len(decoded) == len(set(decoded)) == 8


def test_a_proofs_images_alone_are_decoded(config: DataConfig, decoded: list[Path]) -> None:
    dataset = DetectionDataset(config, "train", 64)
    assert decoded == []
    assert real_images(dataset, 3).shape == (3, 3, 64, 64) and len(decoded) == 3
    assert real_images(dataset, 4, (32, 64)).shape == (4, 3, 32, 64)


def test_a_batch_to_recalibrate_with_decodes_its_mosaics(config: DataConfig, decoded: list[Path]) -> None:
    images = next(training_batches(config, 64, 2, seed=0, augment=Augment())).images
    assert images.shape == (2, 3, 64, 64) and 2 <= len(decoded) <= 8 and len(decoded) == len(set(decoded))


def test_another_set_whose_file_is_called_shapes_is_read_as_it_is(tmp_path: Path) -> None:
    write_rectangles(tmp_path / "own")
    file = tmp_path / "shapes.yaml"
    file.write_text(f"path: {tmp_path / 'own'}\ntrain: images/train\nnames: [a, b, c, d]\n")
    config = open_data(DataSettings(data=str(file), data_root=str(tmp_path / "root")))
    assert config == load_data_config(file) and len(DetectionDataset(config, "train", 64)) == 6
    assert not (tmp_path / "root").exists()


def test_the_synthetic_set_is_drawn_whatever_its_file_is_called(tmp_path: Path) -> None:
    text = (ROOT / "data" / "shapes.yaml").read_text()
    assert "synthetic: {train: 400, val: 120, test: 120, image_size_px: 160, seed: 0}" in text
    file = tmp_path / "copy.yaml"
    file.write_text(text.replace("400", "3").replace("120", "2").replace("160", "32"))
    config = open_data(DataSettings(data=str(file), data_root=str(tmp_path / "root")))
    assert config.path == tmp_path / "root" / "shapes"
    assert [len(DetectionDataset(config, split, 32)) for split in ("train", "val", "test")] == [3, 2, 2]
