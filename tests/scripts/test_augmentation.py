"""Augmentation and batches from the command line, through a whole training that is interrupted and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import data.dataset
import engine.epoch
import engine.training
from data import Augment, DataSettings
from detection.command import as_words, parse
from detection.datasets import open_data
from detection.flags import TrainFlags
from detection.network import read_network
from detection.training import training_set
from engine import TrainConfig
from tests.scripts.runs import SMALL, Runner

EVERYTHING = (
    "--mixup", 0.5, "--close-mosaic", 1, "--multi-scale", "--image-weights", "--rect",
    "--hsv-h", 0.1, "--hsv-s", 0.2, "--hsv-v", 0.3, "--shear", 5, "--degrees", 10,
)  # fmt: skip


def test_flags_reach_the_augmentation(tiny: Path) -> None:
    given = {
        "mosaic": 0.1, "mixup": 0.2, "scale": 0.3, "translate": 0.4, "degrees": 5, "shear": 6, "hsv_h": 0.7, "hsv_s": 0.8,
        "hsv_v": 0.9, "flipud": 0.25, "fliplr": 0.75,
    }  # fmt: skip
    words = as_words({**given, "epochs": 9, "close_mosaic": 2, "data": str(tiny), "img": 64})
    flags = parse(TrainFlags, "", words)
    found = training_set(flags, open_data(flags.dataset))
    assert found.augment == flags.augment == Augment(**given) and found.mosaic_epochs == 7
    plain = TrainFlags(training=TrainConfig(epochs=4))
    assert plain.augment == Augment()
    assert training_set(plain, open_data(DataSettings(data=str(tiny)))).mosaic_epochs == 4


def test_everything_at_once_and_resumed(
    script: Runner, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = engine.training.train_one_epoch
    seen: dict[int, set[tuple[int, ...]]] = {}

    def watched(state: Any, loss_fn: Any, batches: Any, epoch: Any, stop_at: int | None = None) -> Any:
        if epoch.number == stop_at:
            raise KeyboardInterrupt

        def network_input(images: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
            seen.setdefault(epoch.number, set()).add(tuple(images.shape[2:]))
            return entry(images, *rest, **named)

        entry: Callable[..., torch.Tensor] = engine.batch.network_input
        monkeypatch.setattr(engine.epoch, "network_input", network_input)
        return original(state, loss_fn, batches, epoch)

    arguments = (
        "--data",
        tiny,
        "--img",
        64,
        "--batch-size",
        4,
        "--workers",
        0,
        "--epochs",
        3,
        "--eval-every",
        3,
        *EVERYTHING,
    )
    mosaics: dict[int, int] = {}
    tiles = data.dataset.mosaic_tiles

    def counted(*given: Any) -> Any:
        mosaics[current[0].epoch] = mosaics.get(current[0].epoch, 0) + 1
        return tiles(*given)

    current: list[data.dataset.DetectionDataset] = []
    augmented = data.dataset.DetectionDataset._augmented

    def noted(self: Any, *given: Any) -> Any:
        current[:] = [self]
        return augmented(self, *given)

    monkeypatch.setattr(data.dataset, "mosaic_tiles", counted)
    monkeypatch.setattr(data.dataset.DetectionDataset, "_augmented", noted)
    monkeypatch.setattr(engine.training, "train_one_epoch", watched)
    whole = script("finetune", *arguments, "--project", tmp_path, "--name", "whole")
    assert whole.code == 0, whole.err
    assert set(mosaics) == {0, 1} and len(set.union(*seen.values())) >= 2
    assert set.union(*seen.values()) <= {(size, size) for size in (32, 64, 96)}

    monkeypatch.setattr(engine.training, "train_one_epoch", lambda *given: watched(*given, stop_at=2))
    assert script("finetune", *arguments, "--project", tmp_path, "--name", "parts").code == 130
    monkeypatch.setattr(engine.training, "train_one_epoch", watched)
    resumed = script("finetune", "--resume", "--project", tmp_path, "--name", "parts")
    assert resumed.code == 0, resumed.err
    states = [
        torch.load(tmp_path / name / "weights" / "last.pt", weights_only=True)["state_dict"]
        for name in ("whole", "parts")
    ]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    noted = read_network(tmp_path / "parts" / "weights" / "last.pt").augment
    assert (noted.mixup, noted.hsv_h, noted.shear, noted.mosaic) == (0.5, 0.1, 5, 1.0), "what a cut re-estimates with"
    settings = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    assert settings["close_mosaic"] == 1 and settings["multi_scale"] and settings["image_weights"] and settings["rect"]


def test_rectangular_evaluation_sees_the_same_images(
    script: Runner, sparse_run: Path, tiny: Path, tmp_path: Path
) -> None:
    weights = sparse_run / "weights" / "last.pt"
    for name, extra in (("square", ()), ("rect", ("--rect", "--save-json"))):
        done = script(
            "val", "--weights", weights, "--data", tiny, *SMALL, "--project", tmp_path, "--name", name, *extra
        )
        assert done.code == 0, done.err
    square, rect = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("square", "rect"))
    assert square["images"] == rect["images"] == 6 and square["macs"] == rect["macs"]
    found = json.loads((tmp_path / "rect" / "predictions.json").read_text())
    assert {box["image_id"] for box in found} <= {f"shapes_{i:06d}" for i in range(6)}
    assert all(-1e-3 <= v <= 64 + 1e-3 for box in found for v in box["bbox"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--close-mosaic", 3), "--close-mosaic 3: expected 0 to --epochs, 2"),
        (("--close-mosaic", -1), "--close-mosaic -1: expected 0 to --epochs, 2"),
        (("--mixup", 1.5), "--mixup 1.5: expected 0 to 1"),
        (
            ("--img", 32, "--multi-scale"),
            "multi-scale: image size 32 leaves no multiple of the stride 32 to choose from",
        ),
    ],
)
def test_mistakes_are_named(
    arguments: tuple[object, ...], message: str, script: Runner, tiny: Path, tmp_path: Path
) -> None:
    done = script("finetune", "--data", tiny, *SMALL, "--epochs", 2, "--project", tmp_path, *arguments)
    assert done.code == 1 and message in done.err and done.err.count("\n") == 1
