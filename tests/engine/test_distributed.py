"""Two ranks on this machine's CPU: see `ranks.py` for what they do."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from detection.command import run_script
from detection.flags import ScriptFlags
from detection.network import choose_device
from engine import World
from engine.batch_norm import average_statistics, normalise, synchronised_norms
from engine.settings import RANK_VARIABLES
from slim import SlimError
from tests.engine.test_training import assert_same
from tests.scripts.runs import ROOT, SMALL, one_round

pytestmark = pytest.mark.slow
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [*TORCHRUN, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=pipe, stderr=pipe, text=True)


def errors(err: str) -> list[str]:
    """The lines that are ours; torchrun's report follows."""
    return [line for line in err.splitlines() if line.startswith(("error: ", "interrupted: "))]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left of all their acts."""
    folder = tmp_path_factory.mktemp("ranks")
    process = start("-m", "tests.engine.ranks", "--act", "everything", "--out", folder, "--debug")
    said, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert said.count("epoch 2:") == 2, "rank 0 alone speaks, once an epoch"
    return folder


def left_by(out: Path, act: str) -> list[dict[str, Any]]:
    return [torch.load(out / f"{act}{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", ["one", "both"])
def test_a_step_on_two_halves_is_the_step_on_the_whole_batch(out: Path, name: str) -> None:
    first, second = left_by(out, name)
    assert_same(first["shared"], second["shared"])
    moved = {key: (first["whole"][key] - first["start"][key]).double().abs().max() for key in first["whole"]}
    assert max(value for key, value in moved.items() if "num_batches" not in key) > 0.01
    assert moved["model.0.bn.running_mean"] > 1e-4 and moved["model.0.bn.running_var"] > 1e-4
    for key, value in first["whole"].items():
        torch.testing.assert_close(
            first["shared"][key], value, rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
    parts = [row(out / name / run / "results.csv") for run in ("shared", "whole")]
    for part in ("loss/box", "loss/obj", "loss/cls"):
        assert float(parts[0][part]) == pytest.approx(float(parts[1][part]), rel=1e-5)
    assert first["kinds"] >= {"BatchNorm2d"} and not any("Sync" in kind for kind in first["kinds"])


def row(file: Path) -> dict[str, str]:
    with file.open(newline="") as lines:
        (only,) = csv.DictReader(lines)
    return only


def test_gates_plan_average_and_statistics_are_the_same_on_all_ranks(out: Path) -> None:
    first, second = left_by(out, "gated")
    assert first.pop("files") == ["last.pt"] and second.pop("files") == []
    assert_same(first, second)
    gates, chosen = torch.cat(list(first["gates"].values())), first["l1"]["chosen"]
    assert 0 < int(chosen.sum()) < len(chosen) and len(first["l1"]["importance"]) == len(first["gates"])
    assert not gates[chosen].any() and (gates[~chosen] > 0.5).float().mean() > 0.8, "what was chosen is closed"
    assert any(statistic.std() > 0 for key, statistic in first["model"].items() if key.endswith("running_mean"))
    assert len(list((out / "gated").glob("events.out.*"))) == 1


def test_an_interruption_of_one_rank_stops_all_after_the_same_step_and_resumes_bit_for_bit(out: Path) -> None:
    for found in left_by(out, "interrupted"):
        assert found["said"].startswith("stopped after batch 2 of epoch 1; the state is in ")
        assert (found["steps"], found["so_far"]) == (6, 2)
        assert_same(found["resumed"], found["uninterrupted"])
    states = [torch.load(out / run / "weights" / "last.pt", weights_only=True) for run in ("parts", "whole")]
    assert_same(*states)
    generators = states[0]["training_state"]["rng"]
    assert len(generators) == 2 and not torch.equal(generators[0]["torch"], generators[1]["torch"])
    rows = [(out / run / "results.csv").read_text().splitlines() for run in ("parts", "whole")]
    assert len(rows[0]) == 4 and [line.rsplit(",", 1)[0] for line in rows[0]] == [
        line.rsplit(",", 1)[0] for line in rows[1]
    ]


def test_norms_over_both_ranks_keep_class_keys_and_copies(out: Path) -> None:
    torch.manual_seed(5)
    whole = torch.randn(4, 3, 5, 5) * 3 + 100
    norm = nn.BatchNorm2d(3, momentum=None)
    normalised = norm(whole.bfloat16().float())
    first, second = left_by(out, "norms")
    halves = torch.cat((first["half"], second["half"]))
    assert halves.dtype == torch.bfloat16
    torch.testing.assert_close(halves.float(), normalised, rtol=0.01, atol=0.02)
    state = {f"0.{key}": value for key, value in norm.state_dict().items()}
    assert first["state"].keys() == state.keys() and not first["left"]
    for key, value in state.items():
        torch.testing.assert_close(first["state"][key], value, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(first["evaluated"], norm.eval()(whole), rtol=1e-5, atol=1e-4)
    assert first["copied"]["0.num_batches_tracked"] == 2 and first["state"]["0.num_batches_tracked"] == 1


@pytest.mark.parametrize(
    ("act", "line"),
    [
        ("failure", "error: rank 1: the disk of rank 1 is full"),
        pytest.param("loss", "error: rank 0: ", marks=pytest.mark.long),
    ],
)
def test_a_rank_that_fails_ends_all_with_one_line(tmp_path: Path, act: str, line: str) -> None:
    process = start("-m", "tests.engine.ranks", "--act", act, "--out", tmp_path)
    said, err = process.communicate(timeout=100)
    assert process.returncode != 0
    (found,) = errors(err)
    assert found.startswith(line)
    assert said == ("once\n" if act == "failure" else "")


def test_the_gradient_of_the_norm_is_exact() -> None:
    """With one rank the sums are its own."""
    torch.manual_seed(2)
    x = (torch.randn(3, 2, 4, 3) * 2 + 5).requires_grad_()
    weight, bias = torch.randn(2, requires_grad=True), torch.randn(2, requires_grad=True)
    slope = torch.randn_like(x)
    found = torch.autograd.grad(normalise(x, weight, bias, 1e-3, World())[0], (x, weight, bias), slope)
    plain = nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=1e-3)
    for ours, theirs in zip(found, torch.autograd.grad(plain, (x, weight, bias), slope), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_world_of_one_sends_nothing_and_changes_nothing() -> None:
    world, tensor, model = World(), torch.tensor([0.1, 0.2]), nn.Sequential(nn.BatchNorm2d(2))
    assert world.sum(tensor) is tensor and world.gather(3) == [3] and world.broadcast_from_rank0(lambda: "x") == "x"
    assert world.mean_and_any({"box": 0.1}, True) == ({"box": 0.1}, True)
    assert world.share(7) == 7 and world.launcher == "python" and world.claim_failure()
    world.barrier()
    world.leave(1, True)
    with synchronised_norms(model, world):
        assert "forward" not in vars(model[0])
    before = model.state_dict()
    average_statistics(model, world)
    assert_same(model.state_dict(), before)
    assert not torch.distributed.is_initialized()


def test_the_environment_says_which_rank_this_is() -> None:
    names = RANK_VARIABLES
    assert World.of_environment({}) == World.of_environment(dict(zip(names, "0101", strict=True))) == World()
    assert World.of_environment(dict(zip(names, "3412", strict=True))) == World(3, 4, 1, 2)
    with pytest.raises(SlimError, match=r"found WORLD_SIZE=2, expected RANK, WORLD_SIZE.*start the run with torchrun"):
        World.of_environment({"WORLD_SIZE": "2"})
    with pytest.raises(SlimError, match=r"RANK=4, WORLD_SIZE=4.*contradict"):
        World.of_environment(dict(zip(names, "4412", strict=True)))


def test_scripts_of_one_process_are_the_first_ranks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def act(flags: ScriptFlags) -> None:
        seen.append(os.environ.get("WORLD_SIZE"))

    for rank in "10":
        for name, value in zip(RANK_VARIABLES, (rank, "2", rank, "2"), strict=True):
            monkeypatch.setenv(name, value)
        assert run_script(ScriptFlags, act, "", []) == 0
    assert seen == [None], "what it starts would wait for ranks that never come"


def test_batches_and_gpus_are_shared_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1, 3, 1, 3)
    assert world.share(12) == 4
    with pytest.raises(SlimError, match=r"--batch-size 16: expected a multiple of the 3 ranks.*nearest is 15"):
        world.share(16)
    assert choose_device("cpu", world) == torch.device("cpu")
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert world.device(torch.device("cuda:0")) == torch.device("cuda:1") == chosen[0]
    with pytest.raises(SlimError, match=r"--device cuda:2: 3 ranks need a GPU each, found 4; .*CUDA_VISIBLE_DEVICES"):
        world.device(torch.device("cuda:2"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SlimError, match="3 ranks need a GPU each, found 2"):
        world.device(torch.device("cuda"))


@pytest.mark.long
def test_train_sparse_and_finetune_under_torchrun(tiny: Path, tmp_path: Path) -> None:
    """Interrupted by torchrun's own signal while loader workers are at work, resumed, then fine-tuned by two ranks."""
    where = ("--project", tmp_path, "--name", "s")
    data = ("--data", tiny, "--cfg", ROOT / "models" / "yolov5n.yaml", *SMALL[:4], "--device", "cpu")
    epochs = ("--epochs", 3, "--sparse-from", 1, "--sync-bn", "--workers", 1)
    process = start("train_sparse.py", *data, *epochs, *where)
    results = tmp_path / "s" / "results.csv"
    deadline = time.monotonic() + 200
    while not results.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    (line,) = errors(err)
    assert line.startswith("interrupted: stopped after batch "), err
    assert "continue with: torchrun --nproc-per-node 2 train_sparse.py --resume" in line

    process = start("train_sparse.py", "--resume", *where)
    said, err = process.communicate(timeout=300)
    assert (process.returncode, errors(err)) == (0, [])
    assert said.count("epoch 2:") == 1 and said.count(": AP ") == 1
    with results.open(newline="") as lines:
        assert [row["epoch"] for row in csv.DictReader(lines)] == ["0", "1", "2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]

    weights = tmp_path / "s" / "weights" / "last.pt"
    loop_where = ("--project", tmp_path, "--name", "loop", "--recalibrate", 1, "--max-drop", 1)
    rounds = one_round(recovery_epochs=1)
    process = start("-m", "tests.scripts.iterate_any_ap", "--weights", weights, *data[:2], *SMALL, *rounds, *loop_where)
    said, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert said.count("accepted: AP") == 2 and (tmp_path / "loop" / "weights" / "slim.pt").is_file()
    phases = {path.parent.name for path in (tmp_path / "loop").glob("*/phase.json")}
    assert {"round1-sparse", "round1-try1-plan", "round1-try1-cut", "round1-try1-recovery", "evaluation"} <= phases

    process = start(
        "finetune.py", "--weights", weights, *data[:2], *SMALL, "--epochs", 1, "--project", tmp_path, "--name", "f"
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert (tmp_path / "f" / "metrics.json").is_file()
