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
