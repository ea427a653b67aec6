"""--classes and --single-cls through the scripts: training and evaluation look at the same classes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from deploy import LatencySettings
from detection.command import parse
from detection.flags import IterateFlags
from detection.loop_training import finetune_flags, prune_flags, sparse_flags
from detection.network import read_network
from tests.scripts.runs import ROOT, SMALL, Runner
from tests.scripts.test_failures import fails


def train(script: Runner, tiny: Path, project: Path, *flags: object) -> Path:
    start = ("--cfg", ROOT / "models" / "yolov5n.yaml", "--epochs", 1, "--project", project, "--name", "t")
    done = script("finetune", "--data", tiny, *SMALL, *start, *flags)
    assert done.code == 0, done.err
    return project / "t" / "weights" / "last.pt"


@pytest.fixture
def two_classes(script: Runner, tiny: Path, tmp_path: Path) -> Path:
    return train(script, tiny, tmp_path, "--classes", "cross", 0)


def test_chosen_classes(two_classes: Path, script: Runner, tiny: Path, tmp_path: Path) -> None:
    assert read_network(two_classes).names == ["cross", "circle"]
    run = two_classes.parents[1]
    assert yaml.safe_load((run / "config.yaml").read_text())["classes"] == ["cross", 0]
    common = ("--weights", two_classes, "--data", tiny, *SMALL[:4], "--project", tmp_path / "runs")
    chosen = ("--classes", "cross", "circle")
    done = script("val", *common, *chosen)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "runs" / "exp" / "metrics.json").read_text())
    assert set(found["per_class"]) == {"cross", "circle"}
    assert found["ap"] == json.loads((run / "metrics.json").read_text())["ap"]
    cut = ("--macs", 0.9, "--criterion", "taylor", "--taylor-batches", 1)
    done = script("prune", *common, *cut, *chosen, "--name", "cut")
    assert done.code == 0, done.err
    assert read_network(tmp_path / "runs" / "cut" / "weights" / "pruned.pt").names == ["cross", "circle"]
    (tmp_path / "flags.yaml").write_text("classes: [3, circle]\n")
    done = script("val", *common, "--config", tmp_path / "flags.yaml")
    assert done.code == 0, done.err


def test_other_classes_than_those_of_the_network(two_classes: Path, script: Runner, tiny: Path, tmp_path: Path) -> None:
    for name, more in (("val", ()), ("prune", ("--macs", 0.9)), ("iterate", ())):
        common = ("--weights", two_classes, "--data", tiny, "--img", 64, "--project", tmp_path / "runs", *more)
        fails(script(name, *common), "detects 2 classes", "has 4", "--classes or --single-cls")
        fails(
            script(name, *common, "--classes", "circle", "cross"),
            "its classes are in the order cross, circle",
            "in the order circle, cross; give --classes in the network's order",
        )
        fails(
            script(name, *common, "--classes", "star"), "class 'star' is not there; expected names or numbers of circle"
        )


def test_all_classes_as_one(script: Runner, tiny: Path, tmp_path: Path) -> None:
    weights = train(script, tiny, tmp_path, "--single-cls")
    assert read_network(weights).names == ["object"]
    common = ("--weights", weights, "--data", tiny, *SMALL, "--project", tmp_path / "runs")
    done = script("val", *common, "--single-cls", "--classes", 1, 2)
    assert done.code == 0, done.err
    assert [line.split()[0] for line in done.out.splitlines() if line.startswith("object ")] == ["object"]
    fails(script("val", *common), "detects 1 classes", "has 4")


def test_iterate_hands_its_settings_to_every_step() -> None:
    flags = parse(
        IterateFlags,
        "",
        ["--classes", "cross", "--single-cls", "--lr", "0.2", "--cache", "none", "--tie", "layer", "--min-channels", "3",
         "--train", "mosaic=0", "--sparse", "lr=0.1", "--finetune", "lr=0.3", "--prune", "criterion=l1", "scope=local"],
    )  # fmt: skip
    weights = Path("w.pt")
    sparse, tuned = sparse_flags(flags, weights, 0.7), finetune_flags(flags, weights, 7)
    cut = prune_flags(flags, weights, 500, None)
    for handed in (sparse, tuned, cut):
        assert handed.dataset.classes == ("cross",) and handed.dataset.single_cls and handed.loading.cache == "none"
    assert sparse.training.epochs == flags.sparse_epochs and tuned.training.epochs == 7 and tuned.keep_gates
    assert (sparse.training.optim.lr, tuned.training.optim.lr) == (0.1, 0.3)
    assert sparse.augment.mosaic == tuned.augment.mosaic == 0 and sparse.sparsity.tie == "layer"
    assert sparse.sparsity.has_budget and sparse.sparsity.keep_macs == 0.7 and sparse.widths.min_channels == 3
    halves = sparse_flags(replace(flags, sparse=("fraction=0.5",)), weights, 0.7).sparsity
    assert not halves.has_budget and halves.fraction == 0.5
    assert (cut.score.criterion, cut.widths.scope, cut.widths.min_channels) == ("l1", "local", 3)
    assert cut.target.macs == 500 and cut.recalibrate == flags.recalibrate and cut.weights == "w.pt"
    by_latency = replace(flags, latency=LatencySettings(latency_ms=3))
    assert prune_flags(by_latency, weights, None, 0.5).latency == LatencySettings(latency_share=0.5)
