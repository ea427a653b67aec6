"""Anchors that are refitted when a head is new, and what becomes of them through every script."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

import slim
from data import DataConfig, DetectionDataset, load_data_config
from detection.losses import box_sizes_px, fit_anchors
from detection.network import build_network, read_network, save_network, start_network
from models import anchor_fit
from tests.scripts.runs import NAMES, SMALL, SMALL_ANCHORS, Runner


@pytest.fixture(scope="module")
def tall(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny images with boxes 1 to 2 px wide and 26 to 51 px tall."""
    root = tmp_path_factory.mktemp("tall")
    for split in ("train", "val"):
        (root / "labels" / split).mkdir(parents=True)
        (root / "images" / split).mkdir(parents=True)
        for number, image in enumerate(sorted((tiny.parent / "tiny" / "images" / split).iterdir())):
            (root / "images" / split / image.name).symlink_to(image)
            width, height = 0.016 + 0.001 * (number % 16), 0.4 + 0.025 * (number % 16)
            line = f"{number % 4} 0.5 0.5 {width:.4f} {height:.4f}\n"
            (root / "labels" / split / f"{image.stem}.txt").write_text(line)
    file = root / "tall.yaml"
    file.write_text(
        yaml.safe_dump({"path": str(root), "train": "images/train", "val": "images/val", "names": list(NAMES)})
    )
    return file


@pytest.fixture(scope="module")
def tall_run(tall: Path, small_cfg: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of sparse training from scratch on them."""
    import train_sparse

    project = tmp_path_factory.mktemp("runs")
    arguments = ["--data", tall, *SMALL, "--epochs", 2, "--sparse-from", 1, "--project", project, "--name", "s"]
    assert train_sparse.cli([*map(str, arguments), "--cfg", str(small_cfg)]) == 0
    return project / "s"


def anchors_of(path: Path) -> torch.Tensor:
    network = read_network(path)
    anchors: torch.Tensor = network.model.anchors_px
    flat = torch.tensor(network.build["description"]["anchors"], dtype=torch.float32)
    assert torch.equal(torch.tensor(network.build["anchors_px"]), anchors) and torch.equal(
        flat.view_as(anchors), anchors
    )
    assert torch.equal(build_network(network.build).anchors_px, anchors)
    return anchors


def boxes_of(file: Path) -> torch.Tensor:
    return box_sizes_px(DetectionDataset(load_data_config(file), "train", 64))


def test_a_new_head_is_refitted_and_every_later_network_keeps_it(
    tall: Path, tall_run: Path, script: Runner, tmp_path: Path
) -> None:
    refitted = anchors_of(tall_run / "weights" / "last.pt")
    assert (
        anchor_fit(torch.tensor(SMALL_ANCHORS).view(4, 2), boxes_of(tall)).recall < 0.5
        and anchor_fit(refitted, boxes_of(tall)).recall == 1
    )
    assert torch.equal(anchors_of(tall_run / "weights" / "best.pt"), refitted)
    out = tmp_path / "cut.pt"
    arguments = (
        "--img",
        64,
        "--channels",
        0.7,
        "--round-to",
        1,
        "--min-channels",
        2,
        "--data",
        tall,
        "--project",
        tmp_path,
        "--out",
        out,
    )
    done = script("prune", "--weights", tall_run / "weights" / "last.pt", *arguments)
    assert done.code == 0, done.err
    assert torch.equal(anchors_of(out), refitted)
    done = script(
        "finetune", "--weights", out, "--data", tall, *SMALL, "--epochs", 1, "--project", tmp_path, "--name", "f"
    )
    assert done.code == 0 and "anchors" not in done.out, done.err
    assert torch.equal(anchors_of(tmp_path / "f" / "weights" / "last.pt"), refitted)
    model = slim.fold_gates(read_network(tall_run / "weights" / "last.pt").model)
    assert torch.equal(model.anchors_px, refitted)


def test_a_resumed_training_keeps_its_anchors(
    tall: Path, tall_run: Path, small_cfg: Path, script: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import engine.training

    base = ("--data", tall, *SMALL, "--epochs", 2, "--sparse-from", 1, "--project", tmp_path, "--name", "s")
    whole, steps = engine.training.train_one_epoch, []

    def once(*arguments: object) -> object:
        if steps:
            raise KeyboardInterrupt
        steps.append(1)
        return whole(*arguments)

    monkeypatch.setattr(engine.training, "train_one_epoch", once)
    done = script("train_sparse", *base, "--cfg", small_cfg)
    assert done.code == 130 and "; refitted: 100.00% of the boxes within reach" in done.out, done.err
    assert done.out.count("anchors at 64 px: ") == 1
    monkeypatch.setattr(engine.training, "train_one_epoch", whole)
    done = script("train_sparse", "--project", tmp_path, "--name", "s", "--resume")
    assert done.code == 0 and "anchors at" not in done.out, done.err
    first, second = (read_network(f / "weights" / "last.pt").model.state_dict() for f in (tall_run, tmp_path / "s"))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_good_anchors_stay_and_the_flag_keeps_bad_ones(
    tiny: Path, tall: Path, small_cfg: Path, script: Runner, tmp_path: Path
) -> None:
    base = (*SMALL, "--epochs", 1, "--cfg", small_cfg, "--project", tmp_path)
    done = script("finetune", "--data", tiny, *base, "--name", "good")
    assert done.code == 0 and "anchors at 64 px: 100.00% of the boxes within reach, 3." in done.out, done.err
    assert "refitted" not in done.out
    done = script("finetune", "--data", tall, *base, "--name", "kept", "--noautoanchor")
    assert done.code == 0 and "anchors at" not in done.out, done.err
    for name in ("good", "kept"):
        assert torch.equal(
            anchors_of(tmp_path / name / "weights" / "last.pt"), torch.tensor(SMALL_ANCHORS).view(2, 2, 2)
        )


@pytest.mark.parametrize(("names", "new"), [(list(NAMES), False), (["a", "b", "c", "d"], True), (["a", "b"], True)])
def test_which_heads_are_new(tall_run: Path, small_cfg: Path, tmp_path: Path, names: list[str], new: bool) -> None:
    network = read_network(tall_run / "weights" / "last.pt")
    plain = tmp_path / "plain.pt"
    save_network(plain, slim.fold_gates(network.model), network.build)
    start = start_network(str(plain), "", names)
    assert start.new_head is new and start.names == names
    assert start_network("", str(small_cfg), names).new_head


def test_transfer_to_another_class_count_starts_from_the_refitted_anchors(tall_run: Path, tmp_path: Path) -> None:
    network = read_network(tall_run / "weights" / "last.pt")
    save_network(tmp_path / "plain.pt", slim.fold_gates(network.model), network.build)
    start = start_network(str(tmp_path / "plain.pt"), "", ["one"])
    assert torch.equal(start.model.anchors_px, network.model.anchors_px)
    assert torch.equal(torch.tensor(start.build["anchors_px"]), network.model.anchors_px)


def test_a_count_of_anchors_instead_of_sizes_is_fitted(
    tall: Path, small_cfg: Path, tmp_path: Path, script: Runner
) -> None:
    (tmp_path / "three.yaml").write_text(yaml.safe_dump({**yaml.safe_load(small_cfg.read_text()), "anchors": 3}))
    arguments = (
        "--cfg",
        tmp_path / "three.yaml",
        "--data",
        tall,
        *SMALL,
        "--epochs",
        1,
        "--project",
        tmp_path,
        "--name",
        "3",
    )
    done = script("finetune", *arguments)
    assert done.code == 0, done.err
    anchors = anchors_of(tmp_path / "3" / "weights" / "last.pt")
    assert anchors.shape == (2, 3, 2) and anchor_fit(anchors, boxes_of(tall)).recall == 1


def test_a_training_split_without_boxes_is_said(tiny: Path, small_cfg: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").symlink_to(next((tiny.parent / "tiny" / "images" / "train").iterdir()))
    dataset = DetectionDataset(DataConfig(names=NAMES, train=(tmp_path / "images",)), "train", 64)
    network = start_network("", str(small_cfg), NAMES)
    assert fit_anchors(network, dataset, 4.0, 0) == "anchors: kept, since the training split has no boxes"


def test_box_sizes_are_those_of_the_letterboxed_image(tiny: Path) -> None:
    dataset = DetectionDataset(load_data_config(tiny), "val", 96)
    wanted = torch.cat([dataset[i].targets[:, 3:] for i in range(len(dataset))]) * 96
    assert torch.allclose(box_sizes_px(dataset), wanted, atol=1e-3)
