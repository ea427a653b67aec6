"""Data on which nothing can be learned or measured ends in a line that names it, before anything is trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.scripts.runs import SMALL, Runner
from tests.scripts.test_failures import fails


@pytest.mark.parametrize("split", ["train", "val"])
def test_labels_that_are_not_found_stop_before_the_first_epoch(
    split: str, own: Path, small_cfg: Path, small_weights: Path, script: Runner, tmp_path: Path
) -> None:
    labels = tmp_path / "own" / "labels" / split
    labels.rename(labels.with_name("elsewhere"))
    images, first = (16, 6)[split == "val"], labels / "shapes_000000.txt"
    said = f"split '{split}': no object in its {images} images; of their {images} label files {images} do not exist, such as"
    where = ("--data", own, *SMALL, "--project", tmp_path / "runs")
    for name, more in (("train_sparse", ("--sparse-from", 0)), ("finetune", ())):
        fails(script(name, *where, "--cfg", small_cfg, "--epochs", 1, *more), said, str(first))
    if split == "val":
        fails(script("val", "--weights", small_weights, *where), said, str(first))
    assert not (tmp_path / "runs").exists()
    if split == "train":
        cut = ("--weights", small_weights, *where, "--macs", 0.5, "--criterion", "taylor")
        fails(script("prune", *cut), said, str(first))
    # One object is enough: all other images are background.
    labels.mkdir()
    shutil.copy(labels.with_name("elsewhere") / first.name, first)
    done = script("finetune", *where, "--cfg", small_cfg, "--epochs", 1)
    assert done.code == 0, done.err


def test_what_is_left_out_is_told_for_each_split(own: Path, small_cfg: Path, script: Runner, tmp_path: Path) -> None:
    labels = {split: sorted((tmp_path / "own" / "labels" / split).iterdir()) for split in ("train", "val")}
    for file in (*labels["train"][:12], labels["val"][0]):
        file.write_text("1 2 3")
    done = script("finetune", "--data", own, *SMALL, "--project", tmp_path / "runs", "--cfg", small_cfg, "--epochs", 1)
    assert done.code == 0, done.err
    told = [line.removeprefix("left out: ") for line in done.out.splitlines() if line.startswith("left out: ")]
    files = [str(file) for file in (*labels["train"][:10], labels["val"][0])]
    assert [line.partition(":")[0] for line in (*told[:10], *told[11:])] == files
    assert told[10] == "2 more of the same split"


def test_pixels_of_16_bits_give_the_same_training_and_evaluation(
    own: Path, small_weights: Path, script: Runner, tmp_path: Path
) -> None:
    """8 bits in grey, and the same in the upper 8 of 16."""
    aps = []
    for bits in (8, 16):
        for image in sorted((tmp_path / "own" / "images").rglob("*.*")):
            grey = np.asarray(Image.open(image).convert("L") if bits == 8 else Image.open(image))
            image.unlink()
            Image.fromarray(grey if bits == 8 else grey.astype(np.uint16) << 8 | 77).save(image.with_suffix(".png"))
        common = ("--data", own, *SMALL, "--project", tmp_path / str(bits))
        done = script("val", "--weights", small_weights, *common, "--name", "v")
        assert done.code == 0, done.err
        trained = script("finetune", "--weights", small_weights, *common, "--epochs", 1, "--name", "t")
        assert trained.code == 0, trained.err
        results = (tmp_path / str(bits) / "t" / "results.csv").read_text().splitlines()
        losses = {k: v for k, v in zip(*(line.split(",") for line in results), strict=True) if "second" not in k}
        aps.append((done.out.splitlines()[1], losses))
    assert aps[0] == aps[1] and "AP 0.0000" not in aps[0][0]


def test_the_limit_of_pixels_holds_in_training_and_evaluation(
    own: Path, small_cfg: Path, small_weights: Path, script: Runner, tmp_path: Path
) -> None:
    common = ("--data", own, *SMALL, "--project", tmp_path / "runs")
    said = ("images can be used", "64 x 64 pixels, expected at most 4095; give a larger --max-pixels")
    fails(script("finetune", "--cfg", small_cfg, *common, "--epochs", 1, "--max-pixels", 4095), *said)
    fails(script("val", "--weights", small_weights, *common, "--max-pixels", 4095), *said)
    done = script("val", "--weights", small_weights, *common, "--max-pixels", 4096)
    assert done.code == 0, done.err
