"""Frozen layers stay bit for bit while the others train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slim
from engine import OptimConfig, Sparsity, TrainConfig, build_optimizer, fit, freeze, read_training_state
from engine.optimiser import enter_training
from slim import Gate, SlimError
from tests.engine.tiny_detector import TinyLoader, evaluation_of, save, squared_loss
from tracking import RunFolder


class TwoStages(nn.Module):
    """Two gated convolutions with norms and a head; the gates' vectors are their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Gate(["f"], [nn.Parameter(torch.ones(4))]))
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), Gate(["s"], [nn.Parameter(torch.ones(4))]))
        self.head = nn.Conv2d(4, 6, 1)

    def forward(self, images: torch.Tensor) -> Any:
        raw = self.head(self.second(torch.relu(self.first(images))))
        return [raw] if self.training else (raw.flatten(2).transpose(1, 2), [raw])


def network() -> TwoStages:
    torch.manual_seed(1)
    return TwoStages()


def train(model: nn.Module, run: RunFolder, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "config": TrainConfig(epochs=3, optim=OptimConfig(lr=0.05)),
        "save": save,
        "device": "cpu",
        "sparsity": Sparsity(slim.SmallestHalfL1(model, strength=1.0)),
        "evaluate": lambda average: evaluation_of(0.5),
    }
    return fit(model, squared_loss, TinyLoader(), run=run, **{**settings, **options})


def test_frozen_tensors_stay_and_all_others_move(tmp_path: Path) -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    frozen = freeze(model, ["first"])
    assert (frozen.modules, frozen.frozen_params, frozen.norms) == (("first",), 3 * 4 * 9 + 4 + 8 + 4, 1)
    run = RunFolder.create(tmp_path, "run")
    train(model, run)
    average = torch.load(run.last, weights_only=True)["model"]
    for name, tensor in model.state_dict().items():
        if name.startswith("first."):
            assert torch.equal(tensor, before[name]), name
            assert torch.equal(average[name], before[name]), name
        else:
            assert not torch.equal(tensor, before[name]), name
            assert not torch.equal(average[name], before[name]), name
    assert model.first[2].vectors[0].tolist() == [1.0] * 4
    assert min(model.second[2].vectors[0].tolist()) < 1


def test_frozen_norm_uses_its_statistics_while_training() -> None:
    model = network()
    freeze(model, ["first.1"])
    model.second[1].weight.requires_grad_(False)  # in part: its bias trains on, and so its statistics move
    enter_training(model)
    assert [m.training for m in (model, model.first, model.first[1], model.second[1])] == [True, True, False, True]
    images = torch.rand(2, 3, 8, 8) + 3
    expected = model.first[0](images) / (1 + model.first[1].eps) ** 0.5  # mean 0, variance 1: as they were drawn
    torch.testing.assert_close(model.first(images), expected)


def test_optimiser_leaves_frozen_parameters_out() -> None:
    model = network()
    freeze(model, ["first", "second.2"])
    held = {id(p) for group in build_optimizer(model, OptimConfig()).param_groups for p in group["params"]}
    wanted = {id(p) for p in [*model.second[0].parameters(), *model.second[1].parameters(), *model.head.parameters()]}
    assert held == wanted


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole, stopped, resumed = network(), network(), network()
    for model in (whole, stopped, resumed):
        freeze(model, ["first"])
    whole_run, parts_run = RunFolder.create(tmp_path, "whole"), RunFolder.create(tmp_path, "parts")
    train(whole, whole_run)
    calls = []

    def stop(average: nn.Module) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluation_of(0.5)

    with pytest.raises(KeyboardInterrupt):
        train(stopped, parts_run, evaluate=stop)
    train(resumed, parts_run, resume_state=read_training_state(parts_run.last))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_gate_vector_that_a_frozen_layer_shares_is_not_shrunk() -> None:
    model = network()
    model.second[2].vectors[0] = model.first[2].vectors[0]
    freeze(model, ["first"])
    with pytest.raises(slim.SlimError, match=r"all . gate vectors of the model are frozen"):
        slim.SmallestHalfL1(model, strength=1.0)
    free = network()
    freeze(free, ["first"])
    l1 = slim.SmallestHalfL1(free, strength=1.0)
    l1.step(2.0)
    assert list(l1.gates()) == ["s"] and l1.closed_share() == 0.5
    assert free.first[2].vectors[0].tolist() == [1.0] * 4


def test_patterns() -> None:
    assert freeze(network(), ["first.*"]).modules == ("first.0", "first.1", "first.2")
    assert freeze(network(), ["second", "first.0", "second.1"]).modules == ("second", "first.0")
    text = str(freeze(network(), ["first"]))
    assert text == "frozen: first: 124 of 314 parameters; norms that keep their statistics: 1"
    with pytest.raises(SlimError, match=r"freeze: no module is named 'secnd.1'; near names: second"):
        freeze(network(), ["secnd.1"])
    with pytest.raises(SlimError, match="freeze: first second head leaves nothing to train"):
        freeze(network(), ["first", "second", "head"])
