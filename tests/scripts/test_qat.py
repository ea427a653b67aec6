"""finetune.py --qat: weights that learn to bear rounding, in checkpoints of the plain network."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import nn

import engine.training
import slim
from deploy.qat import HOOKS, plain_state, with_quantisers
from detection.network import read_network
from tests.scripts.runs import SMALL, Runner
from tests.scripts.test_failures import fails


def quantisers(model: nn.Module) -> set[str]:
    return {name for name in model.state_dict() if name.startswith(HOOKS)}


def rounded_weights(model: nn.Module) -> int:
    return len([name for name in quantisers(model) if "/conv2d/" in name and name.endswith("__1.0.scale")])


def test_weights_and_maps_are_rounded_and_the_head_is_not(small_run: Path) -> None:
    model = slim.fold_gates(read_network(small_run / "weights" / "last.pt").model)
    images = torch.rand(2, 3, 64, 64)
    rounded = with_quantisers(model, [images], head="model.6")
    convolutions = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert rounded_weights(rounded) == len([path for path in convolutions if not path.startswith("model.6")]) == 12
    fewer = with_quantisers(model, [images], head="model.6", keep_float=["model.2*"])
    assert rounded_weights(fewer) == len([path for path in convolutions if path[:7] not in ("model.2", "model.6")]) == 7
    assert 1e-6 < slim.max_difference(model, rounded, images) < 0.5
    assert plain_state(rounded).keys() == model.state_dict().keys()
    assert not any(p.requires_grad for name, p in rounded.named_parameters() if name.startswith(HOOKS))


def test_the_plain_network_is_trained_through_the_rounding_and_resumed(
    small_run: Path, tiny: Path, script: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = small_run / "weights" / "last.pt"
    arguments = ("--weights", weights, "--data", tiny, *SMALL, "--epochs", 2, "--project", tmp_path, "--lr", 0.001)
    rounding = ("--qat", "--calibration-images", 4)
    done = script("finetune", *arguments, *rounding, "--name", "whole")
    assert done.code == 0, done.err
    assert "rounds to 8 bits while it trains; ranges of 4 training images" in done.out
    assert script("finetune", *arguments, "--name", "plain").code == 0

    epoch = engine.training.train_one_epoch
    turns = iter([epoch, stopped])
    monkeypatch.setattr(engine.training, "train_one_epoch", lambda *given: next(turns)(*given))
    assert script("finetune", *arguments, *rounding, "--name", "parts").code == 130
    monkeypatch.setattr(engine.training, "train_one_epoch", epoch)
    resumed = script("finetune", "--resume", "--project", tmp_path, "--name", "parts")
    assert resumed.code == 0, resumed.err
    whole, plain, parts = (read_network(tmp_path / n / "weights" / "last.pt") for n in ("whole", "plain", "parts"))
    assert not quantisers(whole.model) and not slim.gate_vectors(whole.model)
    images = torch.rand(1, 3, 64, 64)
    assert slim.max_difference(whole.model, parts.model, images) == 0
    assert slim.max_difference(whole.model, plain.model, images) > 1e-6


def stopped(*given: object) -> NoReturn:
    raise KeyboardInterrupt


def test_what_cannot_be_rounded_is_told(small_run: Path, tiny: Path, script: Runner, tmp_path: Path) -> None:
    weights = small_run / "weights" / "last.pt"
    common = ("finetune", "--weights", weights, "--data", tiny, *SMALL, "--epochs", 1, "--project", tmp_path)
    fails(script(*common, "--qat", "--keep-gates"), "--qat and --keep-gates")
    fails(script(*common, "--keep-float", "model.1"), "--keep-float: says what --qat leaves alone")
    fails(script(*common, "--qat", "--calibration-images", 0), "--calibration-images 0: expected at least 1")
    fails(script(*common, "--qat", "--keep-float", "nothing.*"), "--keep-float nothing.*: no module has such a path")
