"""--resume: the run's own settings, what may be said beside it, and a run that is finished."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import yaml

import engine.training
from tests.scripts.runs import ROOT, SMALL, Runner
from tests.scripts.test_failures import fails
from tracking import RunFolder


def stopped(*given: object) -> NoReturn:
    raise KeyboardInterrupt


def files(run: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in run.rglob("*") if p.is_file()}


@pytest.mark.usefixtures("no_plots")
def test_a_run_goes_on_as_it_began_or_says_why_not(
    tiny: Path, small_cfg: Path, script: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "parts"
    start = ("--data", tiny, "--cfg", small_cfg, *SMALL, "--epochs", 2, "--project", tmp_path)
    resume = ("finetune", "--resume", "--project", tmp_path, "--name", "parts")
    epoch = engine.training.train_one_epoch
    turns = iter([epoch, stopped])
    monkeypatch.setattr(engine.training, "train_one_epoch", lambda *given: next(turns)(*given))
    assert script("finetune", *start, "--name", "parts").code == 130
    monkeypatch.setattr(engine.training, "train_one_epoch", epoch)

    before = files(run)
    done = script(*resume, "--epochs", 9, "--lr", 0.5, "--img", 64)
    fails(done, "--resume: --epochs 9 (the run has 2), --lr 0.5 (the run has 0.01) would change the run")
    assert files(run) == before

    done = script(*resume, "--cache", "none", "--epochs", 2, "--device", "cpu")
    assert done.code == 0, done.err
    assert "resumed with --cache none, --device cpu\n" in done.out
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["cache"] == "none" and config["epochs"] == 2 and "resume" not in config

    before = files(run)
    done = script(*resume)
    assert done.code == 0 and f"{run}: finished, nothing is left to resume" in done.out
    assert files(run) == before

    assert script("finetune", "--config", run / "config.yaml", "--name", "again").code == 0
    first, second = (
        torch.load(tmp_path / name / "weights" / "last.pt", weights_only=True) for name in ("parts", "again")
    )
    assert all(torch.equal(value, second["state_dict"][key]) for key, value in first["state_dict"].items())


@pytest.mark.usefixtures("no_plots")
def test_a_run_is_resumed_by_its_path(
    tiny: Path, small_cfg: Path, script: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "parts"
    start = ("--data", tiny, "--cfg", small_cfg, *SMALL, "--epochs", 3, "--project", tmp_path, "--name", "parts")
    epoch = engine.training.train_one_epoch
    turns = iter([epoch, stopped, epoch, stopped])
    monkeypatch.setattr(engine.training, "train_one_epoch", lambda *given: next(turns)(*given))
    assert script("finetune", *start).code == 130
    assert script("finetune", "--resume", run).code == 130
    monkeypatch.setattr(engine.training, "train_one_epoch", epoch)
    assert [row["epoch"] for row in RunFolder(run).read_rows()] == ["0", "1"]
    wrong = "no run to resume; expected a run folder that holds weights/last.pt, or that file"
    for path in (run / "weights", run / "weights" / "best.pt", tmp_path, tmp_path / "none"):
        fails(script("finetune", "--resume", path), f"{path}: {wrong}")
    done = script("finetune", "--resume", run / "weights" / "last.pt", "--workers", 0)
    assert done.code == 0 and [row["epoch"] for row in RunFolder(run).read_rows()] == ["0", "1", "2"], done.err
    assert [folder.name for folder in tmp_path.iterdir()] == ["parts"]


@pytest.mark.usefixtures("no_plots")
def test_yolov5s_flags_of_evaluations_checkpoints_and_folders(
    tiny: Path, small_cfg: Path, script: Runner, tmp_path: Path
) -> None:
    run = tmp_path / "a"
    start = ("finetune", "--data", tiny, "--cfg", small_cfg, *SMALL, "--project", tmp_path, "--name", "a", "--noval")
    assert script(*start, "--epochs", 5, "--save-period", 2).code == 0
    kept = {path.name for path in (run / "weights").iterdir()}
    assert kept == {"last.pt", "best.pt", "epoch0.pt", "epoch2.pt", "epoch4.pt"}
    assert [row["metrics/ap"] != "" for row in RunFolder(run).read_rows()] == [False] * 4 + [True]
    last, fourth = (torch.load(run / "weights" / name, weights_only=True) for name in ("last.pt", "epoch4.pt"))
    assert all(torch.equal(value, fourth["state_dict"][key]) for key, value in last["state_dict"].items())
    assert "training_state" in last and "training_state" not in fourth

    (run / "mine.txt").write_text("a note")
    events = set(run.glob("events.out.*"))
    assert script(*start, "--epochs", 2, "--exist-ok").code == 0
    assert [folder.name for folder in tmp_path.iterdir()] == ["a"]
    assert {path.name for path in (run / "weights").iterdir()} == {"last.pt", "best.pt"}
    assert len(RunFolder(run).read_rows()) == 2 and (run / "mine.txt").read_text() == "a note"
    assert events and not events & set(run.glob("events.out.*"))
    config = RunFolder(run).read_config()
    assert config["epochs"] == 2 and "exist_ok" not in config and "resume" not in config
    assert script(*start, "--epochs", 1).code == 0 and (tmp_path / "a2").is_dir()


def test_a_folder_that_is_no_run_keeps_its_files(tmp_path: Path) -> None:
    (tmp_path / "mine" / "weights").mkdir(parents=True)
    files = [tmp_path / "mine" / name for name in ("config.yaml", "drawing.png", "weights/last.pt")]
    for file in files:
        file.write_text("my own")
    assert RunFolder.create(tmp_path, "mine", exist_ok=True).path == tmp_path / "mine"
    assert [file.read_text() for file in files] == ["my own"] * 3


def test_training_imports_no_runtime(tiny: Path, small_cfg: Path, tmp_path: Path) -> None:
    words = ["--data", tiny, "--cfg", small_cfg, *SMALL, "--epochs", 1, "--project", tmp_path]
    code = (
        "import sys, finetune\n"
        f"code = finetune.cli({[str(word) for word in words]})\n"
        "runtimes = {'onnx', 'onnxruntime', 'openvino', 'nncf'} & sys.modules.keys()\n"
        "assert not runtimes, runtimes\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
