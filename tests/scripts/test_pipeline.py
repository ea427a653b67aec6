"""Each script end to end on a tiny data set: exact files, values that agree, resumption."""

from __future__ import annotations

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import slim
from detection.network import build_network, read_network, save_network
from tests.scripts.runs import FINE, HALF, NAMES, ROOT, SMALL, Runner

METRICS = {"ap", "ap50", "ap75", "per_class", "params", "macs", "images", "seconds"}


def metrics(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "metrics.json").read_text())
    return found


def events(folder: Path) -> EventAccumulator:
    board = EventAccumulator(str(folder))
    board.Reload()
    return board


def test_sparse_training_fills_its_run_folder(sparse_run: Path) -> None:
    files = {p.relative_to(sparse_run).as_posix() for p in sparse_run.rglob("*") if p.is_file()}
    pictures = {"labels.png", "train_batch.png", "results.png", "gates.png", "detections.png", "truth.png"}
    pictures |= {"pr_curve.png", "f1_curve.png", "confusion_matrix.png"}
    expected = {
        "config.yaml",
        "data.json",
        "results.csv",
        "channels.csv",
        "channels.png",
        "confusion_matrix.csv",
        "metrics.json",
        "weights/last.pt",
        "weights/best.pt",
        "report.md",
        "report.html",
        *pictures,
    }
    assert {f for f in files if not f.startswith(("events.out", ".lock"))} == expected
    found = metrics(sparse_run)
    assert set(found) >= METRICS and found["images"] == 6
    assert set(found["per_class"]) <= set(NAMES)  # type: ignore[call-overload]
    assert set(found["at_conf"]["per_class"]) == set(found["per_class"])  # type: ignore[index,call-overload]
    assert "## Precision and recall" in (sparse_run / "report.md").read_text()
    with (sparse_run / "results.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1"]
    tags = events(sparse_run).Tags()
    assert {
        "loss/box",
        "loss/obj",
        "loss/cls",
        "loss/l1",
        "metrics/ap",
        "metrics/ap50",
        "gates/closed_share",
        "cost/macs",
        "cost/params",
    } <= set(tags["scalars"])
    assert "gates/model.2.cv1.conv" in tags["histograms"] and {"train_batch", "detections"} <= set(tags["images"])


def test_checkpoint_is_plain_data_and_complete(sparse_run: Path) -> None:
    content = torch.load(sparse_run / "weights" / "last.pt", weights_only=True)
    assert content["build"]["names"] == list(NAMES) and content["build"]["stride_px"] == [8, 16, 32]
    assert content["build"]["description"]["nc"] == 4 and len(content["build"]["anchors_px"]) == 3
    assert all(v.dtype in (torch.float32, torch.int64) for v in content["state_dict"].values())
    assert {"optimizer", "scheduler", "average", "scaler", "rng", "progress"} <= set(content["training_state"])
    assert "training_state" not in torch.load(sparse_run / "weights" / "best.pt", weights_only=True)


def test_config_reproduces_the_run(sparse_run: Path, script: Runner, tmp_path: Path) -> None:
    done = script("train_sparse", "--config", sparse_run / "config.yaml", "--project", tmp_path, "--name", "again")
    assert done.code == 0, done.err
    first, second = (
        read_network(folder / "weights" / "last.pt").model.state_dict() for folder in (sparse_run, tmp_path / "again")
    )
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    assert metrics(sparse_run)["ap"] == metrics(tmp_path / "again")["ap"]


def test_resumed_equals_uninterrupted(
    sparse_run: Path, script: Runner, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import engine.training

    original = engine.training.train_one_epoch

    def interrupted(state, loss_fn, batches, epoch):  # type: ignore[no-untyped-def]
        if epoch.number == 1:
            raise KeyboardInterrupt
        return original(state, loss_fn, batches, epoch)

    arguments = ("--data", tiny, *SMALL, "--epochs", 2, "--sparse-from", 1, *HALF, "--project", tmp_path, "--name", "s")
    monkeypatch.setattr(engine.training, "train_one_epoch", interrupted)
    assert script("train_sparse", *arguments).code == 130
    monkeypatch.setattr(engine.training, "train_one_epoch", original)
    shutil.copytree(sparse_run, tmp_path / "s12")  # another run, of this very name
    config = (tmp_path / "s12" / "config.yaml").read_text()
    (tmp_path / "s12" / "config.yaml").write_text(config.replace("name: s\n", "name: s12\n"))
    done = script("train_sparse", "--resume", "--project", tmp_path, "--name", "s")
    assert done.code == 0, done.err
    whole, resumed = (torch.load(f / "weights" / "last.pt", weights_only=True) for f in (sparse_run, tmp_path / "s"))
    assert all(torch.equal(v, resumed["state_dict"][k]) for k, v in whole["state_dict"].items())
    assert len((tmp_path / "s" / "results.csv").read_text().splitlines()) == 3


@pytest.fixture(scope="module")
def cut_run(sparse_run: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import prune

    project = tmp_path_factory.mktemp("cuts")
    arguments = [
        "--weights",
        sparse_run / "weights" / "last.pt",
        "--data",
        tiny,
        "--img",
        64,
        "--macs",
        0.5,
        "--project",
        project,
        "--name",
        "c",
    ]
    assert prune.cli([str(a) for a in arguments]) == 0
    return project / "c"


def test_prune_proves_evaluates_and_saves(cut_run: Path, sparse_run: Path) -> None:
    found = metrics(cut_run)
    assert set(found) >= METRICS | {"masked_ap", "pruned_ap", "max_difference", "before", "after"}
    assert found["max_difference"] <= 1e-4  # type: ignore[operator]
    assert found["masked_ap"] == pytest.approx(found["pruned_ap"], abs=1e-3)
    assert found["macs"] <= 0.5 * found["before"]["macs"]  # type: ignore[operator, index]
    dense, pruned = (
        read_network(sparse_run / "weights" / "last.pt").model,
        read_network(cut_run / "weights" / "pruned.pt").model,
    )
    assert slim.cost(pruned, torch.zeros(1, 3, 64, 64)).macs == found["macs"]
    plan = slim.Plan.from_json((cut_run / "plan.json").read_text())
    assert slim.max_difference(slim.apply_plan(dense, plan), pruned, torch.rand(1, 3, 64, 64)) == 0
    board = events(cut_run)
    assert [e.value for e in board.Scalars("channels/model.1.conv")] == [
        32,
        pruned.get_submodule("model.1.conv").out_channels,
    ]
    assert (cut_run / "widths.png").stat().st_size > 1000


def test_finetune_keeps_the_structure_and_leaves_no_gate(
    cut_run: Path, tiny: Path, script: Runner, tmp_path: Path
) -> None:
    done = script(
        "finetune",
        "--weights",
        cut_run / "weights" / "pruned.pt",
        "--data",
        tiny,
        *SMALL,
        "--epochs",
        1,
        "--project",
        tmp_path,
        "--name",
        "f",
    )
    assert done.code == 0, done.err
    network = read_network(tmp_path / "f" / "weights" / "last.pt")
    assert not slim.gate_vectors(network.model)
    assert metrics(tmp_path / "f")["params"] == metrics(cut_run)["params"]
    assert slim.layer_widths(network.model) != slim.layer_widths(build_network(network.build))


def test_finetune_can_keep_the_gates(cut_run: Path, tiny: Path, script: Runner, tmp_path: Path) -> None:
    done = script(
        "finetune",
        "--weights",
        cut_run / "weights" / "pruned.pt",
        "--data",
        tiny,
        *SMALL,
        "--epochs",
        1,
        "--keep-gates",
        "--project",
        tmp_path,
        "--name",
        "f",
    )
    assert done.code == 0, done.err
    gates = slim.gate_vectors(read_network(tmp_path / "f" / "weights" / "last.pt").model)
    assert len(gates) == 50 and all(bool((v >= 0).all()) for v in gates.values())


def test_val_agrees_with_training_and_writes_coco_json(
    cut_run: Path, tiny: Path, script: Runner, tmp_path: Path
) -> None:
    done = script(
        "val",
        "--weights",
        cut_run / "weights" / "pruned.pt",
        "--data",
        tiny,
        "--img",
        64,
        "--save-json",
        "--project",
        tmp_path,
        "--name",
        "v",
    )
    assert done.code == 0, done.err
    assert metrics(tmp_path / "v")["ap"] == metrics(cut_run)["pruned_ap"] and not (tmp_path / "v" / "weights").exists()
    boxes = json.loads((tmp_path / "v" / "predictions.json").read_text())
    assert {"image_id", "category_id", "bbox", "score"} == set(boxes[0])


def test_config_files_are_the_resolved_flags(cut_run: Path) -> None:
    config = yaml.safe_load((cut_run / "config.yaml").read_text())
    assert config["macs"] == 0.5 and config["criterion"] == "gate" and config["round_to"] == 8


PUBLISHED = ROOT.parent / "shared" / "weights" / "yolov5n.pt"


@pytest.mark.skipif(
    not PUBLISHED.is_file(), reason=f"needs the published checkpoint at ../shared/weights/{PUBLISHED.name}"
)
def test_published_checkpoint_starts_a_training_on_other_classes(tiny: Path, script: Runner, tmp_path: Path) -> None:
    done = script(
        "finetune", "--weights", PUBLISHED, "--data", tiny, *SMALL, "--epochs", 1, "--project", tmp_path, "--name", "f"
    )
    assert done.code == 0, done.err
    assert "349 of 349 tensors loaded" in done.out
    assert "head: 80 classes before, 4 now; no class in common, so it starts anew" in done.out
    assert read_network(tmp_path / "f" / "weights" / "last.pt").names == list(NAMES)


@pytest.mark.skipif(
    not PUBLISHED.is_file(), reason=f"needs the published checkpoint at ../shared/weights/{PUBLISHED.name}"
)
def test_published_checkpoint_is_cut_by_its_weights(script: Runner, tmp_path: Path) -> None:
    out = tmp_path / "cut.pt"
    done = script(
        "prune",
        "--weights",
        PUBLISHED,
        "--img",
        64,
        "--criterion",
        "bn",
        "--macs",
        0.7,
        "--out",
        out,
        "--project",
        tmp_path,
    )
    assert done.code == 0, done.err
    network = read_network(out)
    assert len(network.names) == 80 and "pruned = masked" in done.out
    assert (
        slim.cost(network.model, torch.zeros(1, 3, 64, 64)).macs
        <= 0.7 * slim.cost(read_network(PUBLISHED).model, torch.zeros(1, 3, 64, 64)).macs
    )


def test_taylor_with_overrides_and_isomorphic_scope(
    script: Runner, tiny: Path, tmp_path: Path, sparse_run: Path
) -> None:
    weights = sparse_run / "weights" / "last.pt"
    options = ["--criterion", "taylor", "--taylor-batches", 2, "--scope", "isomorphic", "--cost-aware"]
    options += ["--overrides", "model.1.conv=0.5", "model.2.cv1.conv=8", "--ignore", "model.23.*", "--min-keep", 0.1]
    done = script(
        "prune", "--weights", weights, "--img", 64, "--macs", 0.8, "--round-to", 4, "--min-channels", 4, "--data", tiny, *options,
        "--project", tmp_path, "--name", "cut",
    )  # fmt: skip
    assert done.code == 0, done.err
    before, after = (
        slim.layer_widths(read_network(f).model) for f in (weights, tmp_path / "cut" / "weights" / "pruned.pt")
    )
    assert after["model.1.conv"][1] == before["model.1.conv"][1] // 2 and after["model.2.cv1.conv"][1] == 8
    assert all(after[path][1] == before[path][1] for path in before if path.startswith("model.23."))
    config = yaml.safe_load((tmp_path / "cut" / "config.yaml").read_text())
    assert config["overrides"] == ["model.1.conv=0.5", "model.2.cv1.conv=8"] and config["ignore"] == ["model.23.*"]


def test_threshold_cuts_closed_gates_alone(script: Runner, tmp_path: Path, sparse_run: Path) -> None:
    weights = sparse_run / "weights" / "last.pt"
    network = read_network(weights).model
    with torch.no_grad():
        for vector in slim.gate_vectors(network).values():
            vector.fill_(1.0)
        closed = slim.gate_vectors(network)["model.1.conv"]
        closed[:9] = 0.001
    save_network(tmp_path / "half.pt", network, read_network(weights).build)
    done = script(
        "prune", "--weights", tmp_path / "half.pt", "--img", 64, "--threshold", 0.01, "--round-to", 1, "--project", tmp_path
    )  # fmt: skip
    assert done.code == 0, done.err
    plan = slim.Plan.from_json((tmp_path / "exp" / "plan.json").read_text())
    assert {g.name: len(g.removed) for g in plan.groups if g.removed} == {"model.1.conv": 9}


BUDGET = ("--epochs", 6, "--sparse-from", 1, "--keep-macs", 0.5, *FINE, "--strength", 150, "--eval-every", 9,
          "--mosaic", 0, "--scale", 0, "--translate", 0)  # fmt: skip
"""Ten steps by a budget, which close their channels."""


@pytest.fixture(scope="module")
def budget_run(tiny: Path, small_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sparse training whose gates are brought down to half of the MACs."""
    import train_sparse

    where = ("--project", tmp_path_factory.mktemp("budget"), "--name", "s")
    assert (
        train_sparse.cli([str(word) for word in ("--data", tiny, "--weights", small_weights, *SMALL, *BUDGET, *where)])
        == 0
    )
    return Path(where[1]) / "s"


def test_a_cut_to_the_budget_of_the_training_takes_closed_channels_alone(
    budget_run: Path, script: Runner, tiny: Path, tmp_path: Path
) -> None:
    weights = budget_run / "weights" / "last.pt"
    common = ("--weights", weights, "--data", tiny, "--img", 64, "--project", tmp_path, "--name", "cut")
    done = script("prune", *common, "--macs", 0.5, *FINE)
    assert done.code == 0, done.err
    plan = slim.Plan.from_json((tmp_path / "cut" / "plan.json").read_text())
    gates = slim.gate_vectors(read_network(weights).model)
    assert not any(bool(gates[group.name][list(group.removed)].any()) for group in plan.groups)
    kept = {len(group.keep) / group.size for group in plan.groups}
    assert len(kept) > 3, "other layers, other widths"
    found = metrics(tmp_path / "cut")
    assert found["pruned_ap"] == found["masked_ap"] == metrics(budget_run)["ap"] > 0  # type: ignore[operator]
    assert 0.45 < found["macs"] / found["before"]["macs"] <= 0.5  # type: ignore[index, operator]
    scalars = events(budget_run).Tags()["scalars"]
    assert {"gates/strength", "gates/pull_over_gradient", "gates/closed_share", "metrics/masked_ap"} <= set(scalars)


@pytest.mark.usefixtures("no_plots")
def test_a_budget_interrupted_in_the_middle_of_an_epoch_is_resumed_bit_for_bit(
    budget_run: Path, script: Runner, tiny: Path, small_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = slim.BudgetL1.step, []

    def signalled(self: slim.BudgetL1, lr: float) -> None:
        steps.append(lr)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        step(self, lr)

    where = ("--project", tmp_path, "--name", "s")
    with monkeypatch.context() as patched:
        patched.setattr(slim.BudgetL1, "step", signalled)
        done = script("train_sparse", "--data", tiny, "--weights", small_weights, *SMALL, *BUDGET, *where)
    assert done.code == 130 and "stopped after batch 1 of epoch 2" in done.err
    done = script("train_sparse", "--resume", *where)
    assert done.code == 0, done.err
    whole, resumed = (torch.load(f / "weights" / "last.pt", weights_only=True) for f in (budget_run, tmp_path / "s"))
    assert all(torch.equal(v, resumed["state_dict"][k]) for k, v in whole["state_dict"].items())
    first, second = (content["training_state"]["pull"] for content in (whole, resumed))
    assert first["steps"] == second["steps"] == 10 and torch.equal(first["chosen"], second["chosen"])
    assert all(torch.equal(values, second["importance"][name]) for name, values in first["importance"].items())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--penalty", "loss", "--select", "all"), "on the smallest 50% of all gates, from epoch 0"),
        (("--where", "norm-weight", "--fraction", 1), "on the smallest 100% of each gate vector, from epoch 0"),
    ],
)
@pytest.mark.usefixtures("no_plots")
def test_other_ways_to_shrink(
    flags: tuple[object, ...], said: str, script: Runner, tiny: Path, small_cfg: Path, tmp_path: Path
) -> None:
    common = ("--data", tiny, "--cfg", small_cfg, *SMALL, "--epochs", 1, "--sparse-from", 0, "--project", tmp_path)
    done = script("train_sparse", *common, "--strength", 20, *flags)
    assert done.code == 0 and said in done.out and "warning" not in done.out, done.err
    model = read_network(tmp_path / "exp" / "weights" / "last.pt").model
    assert bool(slim.gate_vectors(model)) == ("--penalty" in flags)
    norm = model.get_submodule("model.0.bn")
    assert (float(norm.weight.detach().mean()) < 0.9) == ("norm-weight" in flags)
    assert metrics(tmp_path / "exp")["closed_share"] == 0


def test_out_of_memory_names_the_batch_size_to_try(tiny: Path, tmp_path: Path) -> None:
    """A real process whose memory ends in its first step."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))

    arguments = ["--data", tiny, "--cfg", "models/yolov5m.yaml", "--img", 1024, "--batch-size", 16, "--workers", 0]
    command = [sys.executable, "finetune.py", *map(str, arguments), "--project", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "out of memory with 16 images of 1024x1024 pixels a step; try --batch-size 8" in done.stderr
