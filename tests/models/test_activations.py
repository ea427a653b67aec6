"""Activations swapped in trained networks, and batch norms taken up by convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from models import ModelError, build_model, fuse_norms, has_activation, swap_activations
from models.blocks import Conv
from models.yolo import YOLO
from tests.models.networks import draw_statistics

DESCRIPTION: dict[str, Any] = {
    "nc": 2,
    "anchors": [[6, 6, 9, 9]],
    "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "C3", [16]], [-1, 1, "Conv", [8, 1, 1, None, 1, 1, "mish"]]],
    "head": [[[2], 1, "Detect", ["nc", "anchors"]]],
}


def network(**keys: Any) -> YOLO:
    torch.manual_seed(0)
    model = build_model({**DESCRIPTION, **keys}).eval()
    draw_statistics(model)
    return model


def kinds(model: nn.Module) -> list[str]:
    return sorted({type(block.act).__name__ for block in model.modules() if isinstance(block, Conv)})


def test_the_models_own_activation_is_swapped_and_no_other() -> None:
    model = network()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert kinds(model) == ["Mish", "SiLU"] and has_activation(model, "silu")
    assert swap_activations(model, "relu") == 6
    assert kinds(model) == ["Mish", "ReLU"] and has_activation(model, "nn.ReLU()")
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    again = build_model(model.description).eval()
    again.load_state_dict(weights)
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(images)[0], model(images)[0])
        assert not torch.equal(network()(images)[0], model(images)[0])
    assert swap_activations(model, "relu") == 0
    assert swap_activations(model, "silu") == 6 and kinds(model) == ["Mish", "SiLU"]


def test_an_activation_of_the_description_is_what_is_swapped() -> None:
    model = network(activation="nn.LeakyReLU(0.1)")
    assert kinds(model) == ["LeakyReLU", "Mish"] and not has_activation(model, "silu")
    assert swap_activations(model, "hardswish") == 6 and model.description["activation"] == "hardswish"


def test_a_gate_behind_an_activation_is_not_lost() -> None:
    model = network()
    act = next(block.act for block in model.modules() if isinstance(block, Conv))
    act.add_module("slim_gate", nn.Identity())
    with pytest.raises(ModelError, match="a gate follows the activation that it would replace; fold it first"):
        swap_activations(model, "relu")


def test_fused_norms_change_nothing_but_the_number_of_layers() -> None:
    model, images = network(), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        wanted = model(images)[0]
        found = fuse_norms(model)(images)[0]
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert torch.allclose(found, wanted, atol=1e-4)
