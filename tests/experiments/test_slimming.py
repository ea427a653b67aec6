"""The comparison runs the real scripts and tells what they measured."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from data import make_shapes
from experiments import slimming

STEPS = ["dense", "sparse, not cut", "masked to 50%", "cut to 50%", "fine-tuned at 50%"]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real scripts with the real arguments, without starting an interpreter for each."""

    def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, importlib.import_module(Path(command[1]).stem).cli(command[2:]))

    monkeypatch.chdir(slimming.ROOT)
    monkeypatch.setattr(slimming.subprocess, "run", run)


def test_table_is_made_of_the_scripts_own_metrics(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_shapes(tmp_path / "tiny", train=16, val=6, test=6, image_size_px=64, seed=3)
    data = tmp_path / "tiny.yaml"
    data.write_text(
        f"path: {tmp_path / 'tiny'}\ntrain: images/train\nval: images/val\ntest: images/test\n"
        "names: [circle, square, triangle, cross]\n"
    )
    arguments = {
        "data": data, "img": 64, "batch-size": 8, "workers": 0, "dense-epochs": 1, "sparse-epochs": 2, "sparse": "pull-from=1",
        "finetune-epochs": 1, "finetune": "lr=0.01", "project": tmp_path / "runs", "name": "x",
    }  # fmt: skip
    code = slimming.cli([*(str(a) for k, v in arguments.items() for a in (f"--{k}", v)), "--test"])
    out = capfd.readouterr().out
    assert code == 0, out
    run = tmp_path / "runs" / "x"
    rows = [line.split(" | ") for line in (run / "report.md").read_text().splitlines()[2:]]
    assert [row[0].removeprefix("| ") for row in rows] == STEPS
    tuned = json.loads((run / "finetune-0.5" / "metrics.json").read_text())
    assert rows[-1][1] == f"{tuned['ap']:.4f}" and rows[-1][4] == f"{tuned['macs'] / 1e6:.1f}"
    dense = json.loads((run / "dense" / "metrics.json").read_text())
    assert tuned["macs"] <= 0.5 * dense["macs"] and float(rows[-1][6].removesuffix(" |")) > 0
    test = json.loads((run / "dense-test" / "metrics.json").read_text())
    assert rows[0][3] == f"{test['ap']:.4f}" and test["images"] == 6
    assert "$ python train_sparse.py" in out and "gates closed after sparse training: " in out


def test_a_failing_script_ends_the_comparison(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = slimming.cli(["--data", str(tmp_path / "none.yaml"), "--project", str(tmp_path / "runs")])
    assert code == 1 and "finetune.py ended with exit code 1" in capfd.readouterr().err
