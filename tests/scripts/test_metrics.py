"""metrics.json speaks of the weights in last.pt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import detection.training
from detection.evaluator import Evaluator
from detection.network import read_network
from engine import Evaluation, evaluating
from tests.engine.tiny_detector import evaluation_of
from tests.scripts.runs import SMALL, Runner


def ap_of(model: nn.Module) -> float:
    """A figure that depends on every layer, as an AP does, and that a network hardly trained has, too."""
    with evaluating(model):
        return float(model(torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64))[0][..., 4:].mean())


class Falling(Evaluator):
    """Evaluates with ``ap_of``, less the number of evaluations before this one: the first is the best."""

    calls = 0

    def __call__(self, model: nn.Module, *given: Any) -> Evaluation:
        self.calls += 1
        return evaluation_of(ap_of(model) - self.calls + 1)


@pytest.mark.parametrize("flags", [(), ("--qat", "--calibration-images", 4)])
def test_after_an_early_stop_a_quantised_training_and_a_late_resumption(
    small_run: Path, tiny: Path, script: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    monkeypatch.setattr(detection.training, "Evaluator", Falling)
    where = ("--project", tmp_path, "--name", "r")
    common = ("--weights", small_run / "weights" / "last.pt", "--data", tiny, *SMALL, *where, "--lr", 0.001)
    done = script("finetune", *common, *flags, "--epochs", 9, "--eval-every", 2, "--patience", 1)
    assert done.code == 0, done.err
    assert len((tmp_path / "r" / "results.csv").read_text().splitlines()) == 1 + 4, "stops after the second evaluation"
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    expected = ap_of(read_network(tmp_path / "r" / "weights" / "last.pt").model)
    # The second evaluation, or the third one, made for the plain network.
    assert metrics["ap"] == pytest.approx(expected - (2 if flags else 1), rel=1e-5)

    for name in ("report.html", "metrics.json"):  # as if the process had been killed after the last epoch
        (tmp_path / "r" / name).unlink()
    assert script("finetune", "--resume", *where).code == 0
    assert json.loads((tmp_path / "r" / "metrics.json").read_text())["ap"] == pytest.approx(expected, rel=1e-5)
