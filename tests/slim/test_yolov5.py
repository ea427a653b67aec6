"""The central promise on the YOLOv5 family: pruned = masked, folded, saved and loaded, trained on."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import slim
from models import build_model, load_description
from tests.slim.networks import randomise, settle

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    "yolov5n",
    "yolov5s",
    "yolov5m",
    "yolov5l",
    "yolov5x",
    "yolov5n6",
    "yolov5s-v5",
    "yolov5s-csp",
    "yolov5s-ghost",
]


def gated(name: str) -> tuple[nn.Module, slim.ChannelGraph]:
    torch.manual_seed(0)
    model = build_model(load_description(ROOT / "models" / f"{name}.yaml"), 3)
    graph = slim.trace(model, torch.zeros(1, 3, 64, 64))
    slim.add_gates(model, graph)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(9))
    return settle(randomise(model), images), graph


@pytest.fixture(scope="module", params=[NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, slim.ChannelGraph]:
    """One of the family with gates, not to be changed."""
    return gated(request.param)


def plan_for(model: nn.Module, graph: slim.ChannelGraph, macs: float) -> slim.Plan:
    # A random ranking of YOLOv5n, whose widest groups matter most, needs finer steps at 30 %.
    return slim.make_plan(
        graph, slim.score(model, graph, "random", seed=round(10 * macs)), macs=macs, round_to=4, min_channels=4
    )


def test_pruned_equals_masked_and_folds_away(network: tuple[nn.Module, slim.ChannelGraph]) -> None:
    model, graph = network
    assert [g.name for g in graph.groups if not g.prunable and g.frozen_reason != "a model output"] == []
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for macs in (0.7, 0.5, 0.3):
        plan = plan_for(model, graph, macs)
        assert macs - 0.02 < plan.macs[1] / plan.macs[0] <= macs
        masked, pruned = slim.mask(model, plan), slim.apply_plan(model, plan)
        assert slim.max_difference(masked, pruned, x) <= 1e-4
        folded = slim.fold_gates(pruned)
        assert slim.max_difference(masked, folded, x) <= 1e-4
        assert not slim.gate_vectors(folded)
    cost = slim.cost(folded, x)
    assert (cost.macs, cost.params) == (plan.macs[1], plan.params[1])


def test_the_proof_notices_shifted_inputs_of_any_layer() -> None:
    model, graph = gated("yolov5n")
    plan = plan_for(model, graph, 0.5)
    masked, pruned = slim.mask(model, plan), slim.apply_plan(model, plan)
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    for path, layer in pruned.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels > 3:
            right = layer.weight.detach().clone()
            with torch.no_grad():
                layer.weight.copy_(right.roll(1, 1))
            assert slim.max_difference(masked, pruned, x) > 1e-3, path
            with torch.no_grad():
                layer.weight.copy_(right)
    assert slim.max_difference(masked, pruned, x) <= 1e-4


def output_of(file: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
    loaded = slim.load(file, lambda build: build_model(build["description"], build["num_classes"]))
    return loaded.eval()(torch.from_numpy(images))[0].detach().numpy()


def test_saved_loaded_and_trained_on(
    network: tuple[nn.Module, slim.ChannelGraph], tmp_path: Path, other_process: ProcessPoolExecutor
) -> None:
    model, graph = network
    pruned = slim.apply_plan(model, plan_for(model, graph, 0.5))
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    slim.save(pruned, tmp_path / "m.pt", {"description": pruned.description, "num_classes": 3})  # type: ignore[dict-item]
    found = other_process.submit(output_of, tmp_path / "m.pt", x.numpy()).result()
    assert torch.equal(torch.from_numpy(found), pruned.eval()(x)[0])
    pruned.train()
    optimizer = torch.optim.SGD(pruned.parameters(), lr=1e-3)
    before = {k: v.clone() for k, v in pruned.named_parameters()}
    sum(raw.square().mean() for raw in pruned(x)).backward()
    optimizer.step()
    moved = [k for k, v in pruned.named_parameters() if not torch.equal(v, before[k])]
    assert all(v.grad is not None and bool(torch.isfinite(v.grad).all()) for v in pruned.parameters())
    assert len(moved) > 0.9 * len(before)
