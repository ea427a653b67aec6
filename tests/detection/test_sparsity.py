"""What the flags of sparse training make: who shrinks, how strongly, and what is said of runs that are too short."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slim
from detection.flags import FinetuneFlags, NetworkSettings, SparseFlags, WidthSettings
from detection.network import example_image, make_build, save_network
from detection.sparsity import auto_strength, make_sparsity, norm_weights
from detection.training import starting_network
from engine import OptimConfig, SparsitySettings, TrainConfig, learning_rate_sum
from models import YOLO, build_model, load_description
from slim import BudgetL1, SlimError, SmallestHalfL1
from tests.scripts.runs import ROOT

STEPS = 10
"""Of an epoch."""


def network(gated: bool = True) -> YOLO:
    """The narrowest YOLOv5."""
    description = {**load_description(ROOT / "models" / "yolov5n.yaml"), "width_multiple": 0.02, "depth_multiple": 0.1}
    model = build_model(description, 3)
    if gated:
        slim.add_gates(model, slim.trace(model, example_image(64)))
    return model


def flags(epochs: int = 9, **sparsity: Any) -> SparseFlags:
    return SparseFlags(
        img=64,
        training=TrainConfig(epochs=epochs),
        sparsity=SparsitySettings(**sparsity),
        widths=WidthSettings(min_channels=1, round_to=1, min_keep=0.25),
    )


def test_a_budget_takes_its_settings_from_the_flags() -> None:
    made = make_sparsity(flags(keep_macs=0.6), network(), STEPS)
    assert made is not None and made.from_epoch == 3 and isinstance(made.l1, BudgetL1)
    assert (made.l1.macs, made.l1.total_steps, made.l1.rank, made.l1.rank_every) == (0.6, 60, "gradient", 1)
    assert made.l1.options["cost_aware"] and made.l1.options["min_keep"] == 0.25 and made.l1.options["round_to"] == 1
    other = make_sparsity(flags(rank="magnitude", rank_every="epoch", penalty="loss"), network(), STEPS)
    assert other is not None and isinstance(other.l1, BudgetL1)
    assert (other.l1.rank, other.l1.rank_every, other.l1.penalty) == ("magnitude", STEPS, "loss")
    assert not other.l1.options["cost_aware"]
    plain = make_sparsity(flags(rank="gradient", rank_every="once"), network(), STEPS)
    assert plain is not None and isinstance(plain.l1, BudgetL1)
    assert (plain.l1.rank, plain.l1.rank_every, plain.l1.options["cost_aware"]) == ("gradient", 60, False)
    with pytest.raises(SlimError, match=r"macs=0\.01 cannot be reached"):
        make_sparsity(flags(keep_macs=0.01), network(), STEPS)


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"fraction": 0.25}, 0.25),
        ({"select": "vector"}, 0.5),
        ({"select": "all"}, 0.5),
        ({"where": "norm-weight", "fraction": 1.0}, 1.0),
    ],
)
def test_without_a_budget_a_part_of_the_factors_shrinks(settings: dict[str, Any], share: float) -> None:
    made = make_sparsity(flags(**settings), network("where" not in settings), STEPS)
    assert made is not None and type(made.l1) is SmallestHalfL1
    assert float(made.l1.selected().float().mean()) == pytest.approx(share, abs=0.05)


def test_norm_weights_are_those_of_channels_that_can_be_cut() -> None:
    model = network(gated=False)
    found = norm_weights(model, slim.trace(model, torch.zeros(1, 3, 64, 64)))
    scaled = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert found.keys() == scaled and found["model.0.bn"] is model.get_submodule("model.0.bn").weight


def test_auto_strength_is_of_a_travel_and_no_step_is_too_long() -> None:
    optim, budget = OptimConfig(), SparsitySettings()
    rates = learning_rate_sum(optim, 100, 12, 3)
    assert auto_strength(budget, optim, 100, 12) * rates == pytest.approx(7)
    assert auto_strength(SparsitySettings(fraction=0.5), optim, 100, 12) * rates == pytest.approx(2)
    assert auto_strength(SparsitySettings(travel=1.5), optim, 100, 12) * rates == pytest.approx(1.5)
    of_the_loss = auto_strength(SparsitySettings(penalty="loss"), optim, 100, 12)
    assert of_the_loss * rates == pytest.approx(7 * (1 - optim.momentum))
    assert auto_strength(budget, optim, 2, 5) * optim.lr == pytest.approx(0.1)
    assert auto_strength(SparsitySettings(strength=571.0), optim, 2, 5) == 571.0


def test_short_sparse_trainings_are_told_how_long_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    model = network()
    make_sparsity(flags(epochs=8), model, STEPS)
    told = capsys.readouterr().out
    assert "warning: gates close within 50 steps, too few" in told and "give --epochs 9 or more" in told
    for enough in (flags(epochs=9), flags(epochs=8, strength=3.0)):
        make_sparsity(enough, model, STEPS)
        assert "warning" not in capsys.readouterr().out


def test_without_sparse_training_gates_are_only_kept_at_or_above_0() -> None:
    model = network()
    made = make_sparsity(FinetuneFlags(), model, STEPS)
    assert made is not None and not made.is_active(0) and made.l1.strength == 0
    (first, *_) = slim.gate_vectors(model).values()
    with torch.no_grad():
        first[0] = -1.0
    made.step(0, 0.1)
    assert float(first.detach()[0]) == 0 and float(first.detach()[1]) == 1
    assert make_sparsity(FinetuneFlags(), network(gated=False), STEPS) is None


def test_network_slimming_folds_the_gates_of_its_checkpoint(tmp_path: Path) -> None:
    model = network()
    save_network(tmp_path / "gated.pt", model, make_build(model, ["a", "b", "c"]))
    of_norms = flags(where="norm-weight", fraction=1.0)
    start = replace(of_norms, network=NetworkSettings(weights=str(tmp_path / "gated.pt")))
    assert not slim.gate_vectors(starting_network(start, ("a", "b", "c")).model)


def test_network_slimming_needs_a_fraction() -> None:
    with pytest.raises(SlimError, match=r"--where norm-weight: a budget needs gates; add --fraction F"):
        SparsitySettings(where="norm-weight")
    assert not replace(SparsitySettings(), select="all", where="norm-weight").has_budget
