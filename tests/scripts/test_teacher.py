"""A slim network learns from the dense one; frozen layers of a checkpoint stay."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
import yaml

from detection.losses import add_teacher, make_loss
from detection.network import read_network, save_network
from models import DistillGains, LossGains
from slim import SlimError
from tests.scripts.runs import SMALL, Runner, one_round
from tests.scripts.test_failures import fails


def states(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = read_network(folder / "weights" / "last.pt").model.state_dict()
    return state


def test_slim_student_of_a_gated_teacher(
    cut: Path, small_run: Path, tiny: Path, script: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The distance is recorded, and a resumed run, which needs the teacher too, is the same run."""
    import engine.training

    teacher = small_run / "weights" / "last.pt"
    common = ("--weights", cut, "--data", tiny, *SMALL, "--epochs", 2, "--project", tmp_path)
    done = script("finetune", *common, "--teacher", teacher, "--name", "taught")
    assert done.code == 0 and f"teacher: {teacher}, weight 1" in done.out, done.err
    with (tmp_path / "taught" / "results.csv").open() as file:
        assert all(float(row["loss/distill"]) > 0 for row in csv.DictReader(file))
    assert yaml.safe_load((tmp_path / "taught" / "config.yaml").read_text())["teacher"] == str(teacher)

    original = engine.training.train_one_epoch

    def interrupted(state, loss_fn, batches, epoch):  # type: ignore[no-untyped-def]
        if epoch.number == 1:
            raise KeyboardInterrupt
        return original(state, loss_fn, batches, epoch)

    moving = tmp_path / "teacher.pt"
    moving.write_bytes(teacher.read_bytes())
    monkeypatch.setattr(engine.training, "train_one_epoch", interrupted)
    assert script("finetune", *common, "--teacher", moving, "--name", "parts").code == 130
    monkeypatch.setattr(engine.training, "train_one_epoch", original)
    moving.unlink()
    resume = ("finetune", "--resume", "--project", tmp_path, "--name", "parts")
    fails(script(*resume), "teacher.pt", "no such file", "resumed run")
    moving.write_bytes(teacher.read_bytes())
    assert script(*resume).code == 0
    taught, parts = states(tmp_path / "taught"), states(tmp_path / "parts")
    assert all(torch.equal(parts[name], tensor) for name, tensor in taught.items())


def test_weight_0_is_no_teacher(cut: Path, small_run: Path, tiny: Path, script: Runner, tmp_path: Path) -> None:
    """Bit for bit, reading the teacher included; with a weight it makes a difference, and it is not in the checkpoint."""
    common = ("--weights", cut, "--data", tiny, *SMALL, "--epochs", 1, "--project", tmp_path)
    teacher = ("--teacher", small_run / "weights" / "last.pt")
    assert script("finetune", *common, "--name", "plain").code == 0
    assert script("finetune", *common, *teacher, "--distill-weight", 0, "--name", "zero").code == 0
    assert script("finetune", *common, *teacher, "--distill-weight", 9, "--name", "taught").code == 0
    plain, zero, taught = (states(tmp_path / name) for name in ("plain", "zero", "taught"))
    assert plain.keys() == taught.keys()
    assert all(torch.equal(zero[name], tensor) for name, tensor in plain.items())
    assert not all(torch.equal(taught[name], tensor) for name, tensor in plain.items())


@pytest.mark.usefixtures("any_ap")
def test_the_loop_has_a_teacher(small_run: Path, tiny: Path, script: Runner, tmp_path: Path) -> None:
    weights = small_run / "weights" / "best.pt"
    teacher = tmp_path / "teacher.pt"
    teacher.write_bytes(weights.read_bytes())
    steps = one_round(finetune_epochs=1)
    common = ("--weights", weights, "--data", tiny, *SMALL, "--recalibrate", 0, *steps, "--max-drop", 1)
    given = (*common, "--teacher", teacher, "--project", tmp_path, "--name", "loop")
    done = script("iterate", *given)
    assert done.code == 0, done.err
    for phase in ("round1-sparse", "finetune"):
        with (tmp_path / "loop" / phase / "results.csv").open() as file:
            assert all(row["loss/distill"] for row in csv.DictReader(file)), phase
    teacher.write_bytes((small_run / "weights" / "last.pt").read_bytes())
    fails(script("iterate", *given), "teacher:", "choose another --name")


def test_gates_of_the_teacher_are_folded_and_it_agrees_with_itself(small_run: Path) -> None:
    weights = small_run / "weights" / "last.pt"
    network = read_network(weights)
    loss = make_loss(network.model, LossGains(), 64)
    distilling = add_teacher(loss, network, str(weights), DistillGains(), torch.device("cpu"))
    assert not any("slim_gate" in name for name, _ in distilling.teacher.named_modules())
    network.model.eval()
    images = torch.rand(2, 3, 64, 64)
    _, parts = distilling(network.model(images)[1], torch.zeros(0, 6), images)
    assert parts["distill"].item() == pytest.approx(0, abs=1e-5)


def test_teacher_of_other_classes_is_refused(small_run: Path, tmp_path: Path) -> None:
    network = read_network(small_run / "weights" / "last.pt")
    turned = {**network.build, "names": network.names[::-1]}
    save_network(tmp_path / "turned.pt", network.model, turned)
    with pytest.raises(SlimError, match=r"turned\.pt: its classes are cross, .*expected the same in the same order"):
        loss = make_loss(network.model, LossGains(), 64)
        add_teacher(loss, network, str(tmp_path / "turned.pt"), DistillGains(), torch.device("cpu"))


def test_frozen_layers_of_a_sparse_training(small_run: Path, tiny: Path, script: Runner, tmp_path: Path) -> None:
    """Weights, statistics and gates of the first three layers stay bit for bit; the others move."""
    weights = small_run / "weights" / "last.pt"
    done = script(
        "train_sparse", "--weights", weights, "--data", tiny, *SMALL, "--epochs", 1, "--sparse-from", 0, "--fraction", 0.5,
        "--freeze", 3, "--project", tmp_path, "--name", "f",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "frozen: model.0, model.1, model.2:" in done.out
    assert layers_that_moved(weights, tmp_path / "f") == layers_with_weights(weights) - {str(i) for i in range(3)}


def layers_with_weights(weights: Path) -> set[str]:
    return {name.split(".")[1] for name in read_network(weights).model.state_dict()}


def layers_that_moved(weights: Path, folder: Path) -> set[str]:
    before, after = read_network(weights).model.state_dict(), states(folder)
    return {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}


def test_indices_and_patterns(small_run: Path, tiny: Path, script: Runner, tmp_path: Path) -> None:
    weights = small_run / "weights" / "last.pt"
    done = script(
        "finetune", "--weights", weights, "--data", tiny, *SMALL, "--epochs", 1, "--freeze", 0, 5, "model.2.cv*",
        "model.6", "--keep-gates", "--project", tmp_path, "--name", "f",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "frozen: model.0, model.5, model.2.cv1, model.2.cv2, model.2.cv3, model.6:" in done.out
    assert layers_that_moved(weights, tmp_path / "f") == layers_with_weights(weights) - {"0", "5", "6"}
    before, after = read_network(weights).model.state_dict(), states(tmp_path / "f")
    moved = {
        name.split(".")[2]
        for name in before
        if name.startswith("model.2.") and not torch.equal(before[name], after[name])
    }
    assert moved == {"m"}
