"""Baselines of pruning that start from random weights: a cut structure, and a network narrower from the start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import slim
from detection.flags import FinetuneFlags, NetworkSettings, SparseFlags
from detection.network import Network, read_network
from detection.training import starting_network
from engine import TrainConfig, seed_generators
from models import build_model, load_description
from tests.scripts.runs import NAMES, SMALL, Runner


def start(weights: Path, seed: int) -> Network:
    flags = FinetuneFlags(
        img=64, network=NetworkSettings(weights=str(weights)), training=TrainConfig(seed=seed), reinit=True
    )
    return starting_network(flags, NAMES)


def test_structure_of_a_checkpoint_with_weights_drawn_anew(cut: Path) -> None:
    before, first, second = slim.fold_gates(read_network(cut).model), start(cut, 1), start(cut, 2)
    torch.rand(7)  # the seed alone decides
    again = start(cut, 1)
    assert slim.layer_widths(first.model) == slim.layer_widths(before) and not slim.gate_vectors(first.model)
    assert first.new_head and torch.equal(first.model.anchors_px, before.anchors_px)
    trained = before.state_dict()
    for name, tensor in first.model.state_dict().items():
        twin, other = again.model.state_dict()[name], second.model.state_dict()[name]
        assert torch.equal(tensor, twin), name
        if name.endswith(".anchors"):
            continue
        assert not torch.equal(tensor, trained[name]), name
        is_drawn = isinstance(first.model.get_submodule(name.rpartition(".")[0]), nn.Conv2d)
        assert torch.equal(tensor, other) != is_drawn, name
    for path, module in first.model.named_modules():
        if isinstance(module, nn.Conv2d):  # as wide as a convolution of so many inputs is drawn
            bound = (module.in_channels * module.kernel_size[0] * module.kernel_size[1]) ** -0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound, path


def test_training_a_structure_from_scratch(cut: Path, tiny: Path, script: Runner, tmp_path: Path) -> None:
    arguments = ("--weights", cut, "--data", tiny, *SMALL, "--epochs", 1, "--project", tmp_path, "--reinit")
    done = script("finetune", *arguments)
    assert done.code == 0, done.err
    assert "weights: drawn anew, seed 0" in done.out
    found = read_network(tmp_path / "exp" / "weights" / "last.pt").model
    assert slim.layer_widths(found) == slim.layer_widths(read_network(cut).model)


def test_narrower_from_the_start(small_cfg: Path) -> None:
    settings = NetworkSettings(cfg=str(small_cfg), width_multiple=0.5)
    for flags in (FinetuneFlags(img=64, network=settings), SparseFlags(img=64, network=settings)):
        network = starting_network(flags, NAMES)
        seed_generators(0)
        expected = build_model({**load_description(small_cfg), "width_multiple": 0.5}, len(NAMES))
        assert slim.layer_widths(network.model) == slim.layer_widths(expected)
        assert network.build["description"]["width_multiple"] == 0.5
        assert network.note.endswith("small.yaml from scratch with width_multiple 0.5")
    assert expected.get_submodule("model.0.conv").out_channels == 16


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--width-multiple", 0.5, "--weights", "a.pt"),
            "--width-multiple 0.5: the widths are those of --weights a.pt",
        ),
        (("--width-multiple", 0), "--width-multiple"),
        (("--reinit",), "--reinit: draws the weights of a checkpoint's structure anew; add --weights"),
        (("--reinit", "--keep-gates", "--weights", "a.pt"), "--reinit and --keep-gates"),
    ],
)
def test_what_cannot_be_meant_is_one_line(script: Runner, flags: tuple[object, ...], message: str) -> None:
    done = script("finetune", *flags)
    assert done.code == 1 and message in done.err and done.err.count("\n") == 1
