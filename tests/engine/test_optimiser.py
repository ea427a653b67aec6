from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from engine import (
    OptimConfig,
    WeightAverage,
    build_optimizer,
    learning_rate_factor,
    learning_rate_sum,
)
from slim import Gate, SlimError
from tests.engine.tiny_detector import TinyDetector


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_learning_rate_sum_is_what_the_scheduler_gives(schedule: str, optimizer: str) -> None:
    config = OptimConfig(optimizer=optimizer, schedule=schedule, lr=0.02)
    steps, epochs = 7, 12
    optim = build_optimizer(TinyDetector(), config)
    scheduler = LambdaLR(optim, learning_rate_factor(config, steps, epochs))
    used = []
    for _ in range(steps * epochs):
        used.append(optim.param_groups[0]["lr"])
        assert {group["lr"] for group in optim.param_groups} == {used[-1]}
        optim.step()
        scheduler.step()
    for from_epoch in (0, 3, 11, 12):
        assert learning_rate_sum(config, steps, epochs, from_epoch) == sum(used[from_epoch * steps :])


def test_reference_schedule_warms_up_for_three_of_thirty_epochs_and_ends_at_one_percent() -> None:
    factor = learning_rate_factor(OptimConfig(), 13, 30)
    assert factor(0) == pytest.approx(1 / 40)
    assert factor(38) < factor(39) == pytest.approx(1 - 0.99 * 39 / 389)
    assert factor(40) < factor(39)
    assert factor(389) == pytest.approx(0.01)
    assert factor(390) == pytest.approx(0.01)


def test_warm_up_takes_at_most_a_tenth_of_a_short_run() -> None:
    factor = learning_rate_factor(OptimConfig(warmup_epochs=3, final_lr_ratio=1.0), 10, 4)
    assert [factor(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_cosine_is_half_way_in_the_middle() -> None:
    factor = learning_rate_factor(OptimConfig(schedule="cosine", warmup_epochs=0, final_lr_ratio=0.0), 101, 1)
    assert factor(50) == pytest.approx(0.5)
    assert factor(25) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_only_weights_of_convolutions_and_linear_layers_decay() -> None:
    model = nn.Sequential(TinyDetector(), nn.Linear(2, 3), nn.GroupNorm(1, 4))
    model[0].square_gate = Gate(["h"], [nn.Parameter(torch.ones(2, 2))])  # decides by owner, not by shape
    model[0].shared_gate = Gate(["g"], [model[0].gate.vectors[0]])  # a tied gate is one parameter
    model[0].head.bias.requires_grad_(False)
    optim = build_optimizer(model, OptimConfig(weight_decay=0.25))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        group["name"]: (sorted(names[id(p)] for p in group["params"]), group["weight_decay"])
        for group in optim.param_groups
    }
    assert groups == {
        "decayed": (["0.conv.weight", "0.head.weight", "1.weight"], 0.25),
        "plain": (
            [
                "0.conv.bias",
                "0.gate.vectors.0",
                "0.norm.bias",
                "0.norm.weight",
                "0.square_gate.vectors.0",
                "1.bias",
                "2.bias",
                "2.weight",
            ],
            0.0,
        ),
    }


def test_momentum_means_nesterov_or_beta1() -> None:
    sgd = build_optimizer(TinyDetector(), OptimConfig()).param_groups[0]
    assert (sgd["momentum"], sgd["nesterov"]) == (0.937, True)
    assert build_optimizer(TinyDetector(), OptimConfig(optimizer="adamw")).param_groups[0]["betas"] == (0.937, 0.999)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(SlimError, match="nothing can be trained"):
        build_optimizer(TinyDetector().requires_grad_(False), OptimConfig())


def test_average_moves_weights_slowly_and_copies_gates_and_counters() -> None:
    model = TinyDetector()
    config = OptimConfig(ema_decay=0.9, ema_warmup_steps=2)
    average = WeightAverage(model, config)
    average.update_parameters(model)
    start, statistics = model.conv.weight.detach().clone(), model.norm.running_var.clone()
    with torch.no_grad():
        model.conv.weight += 1
        model.norm.running_var += 2
        model.norm.num_batches_tracked += 5
        model.gate_vector[1] = 0
    average.update_parameters(model)
    moved = 1 - 0.9 * (1 - math.exp(-2 / 2))
    torch.testing.assert_close(average.module.conv.weight, start + moved)
    torch.testing.assert_close(average.module.norm.running_var, statistics + 2 * moved)
    assert average.module.norm.num_batches_tracked == 5
    assert average.module.gate_vector.tolist() == [1, 0, 1, 1]
