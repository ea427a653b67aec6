"""--act: another activation in a trained network, which is trained on with it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import slim
from detection.network import read_network, with_activation
from tests.scripts.runs import SMALL, Runner


def test_a_loaded_network_trains_on_with_another_activation(
    small_run: Path, tiny: Path, script: Runner, tmp_path: Path
) -> None:
    weights = small_run / "weights" / "last.pt"
    arguments = ("--weights", weights, "--data", tiny, *SMALL, "--epochs", 1, "--project", tmp_path, "--act", "relu")
    done = script("finetune", *arguments)
    assert done.code == 0, done.err
    assert "activations: relu in 12 places" in done.out
    made = read_network(tmp_path / "exp" / "weights" / "last.pt")
    assert made.model.description["activation"] == "relu"
    assert not [module for module in made.model.modules() if isinstance(module, nn.SiLU)]


def test_gates_are_folded_where_the_activation_changes_and_kept_where_it_does_not(small_run: Path) -> None:
    """In evaluation mode the folded network with the old activation back is the gated one."""
    weights = small_run / "weights" / "last.pt"
    gated = read_network(weights)
    with torch.no_grad():
        for vector in slim.gate_vectors(gated.model).values():
            vector.uniform_(0, 2)
    assert with_activation(gated, "silu") is gated
    relu = with_activation(gated, "relu")
    assert not slim.gate_vectors(relu.model) and slim.gate_vectors(gated.model)
    back = with_activation(relu, "silu")
    assert slim.max_difference(gated.model, back.model, torch.rand(1, 3, 64, 64)) < 1e-5
    assert slim.max_difference(gated.model, relu.model, torch.rand(1, 3, 64, 64)) > 1e-4
