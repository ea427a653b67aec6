"""prune.py --unstructured: exactly the share of zeros that was asked for, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import slim
from detection.network import read_network, save_network
from detection.unstructured import zero_smallest
from tests.scripts.runs import Runner
from tests.scripts.test_failures import fails


def two_layers() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=True), nn.Conv2d(2, 2, 1), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([3.0, -0.1]).view(2, 1, 1, 1))
        model[1].weight.copy_(torch.tensor([[1.0, -2.0], [0.2, 4.0]]).view(2, 2, 1, 1))
        model[0].bias.zero_()
    return model


def test_the_smallest_go_of_each_layer_or_of_all() -> None:
    model = two_layers()
    one, counts = zero_smallest(model, 0.5, "layer")
    assert one[0].weight.flatten().tolist() == [3, 0] and one[1].weight.flatten().tolist() == [0, -2, 0, 4]
    assert counts == {"0": (1, 2), "1": (2, 4)}
    one, counts = zero_smallest(model, 1 / 3, "global")
    assert one[0].weight.flatten().tolist() == [3, 0]
    assert one[1].weight.flatten().tolist() == [1, -2, 0, 4] and counts == {"0": (1, 2), "1": (1, 4)}
    assert model[0].weight.flatten().tolist() == [3, pytest.approx(-0.1)], "the model is left as it was"
    assert isinstance(one[0].weight, nn.Parameter) and set(one.state_dict()) == set(model.state_dict())
    assert torch.equal(one[2].weight, model[2].weight)


@pytest.fixture(scope="module")
def open_gates(sparse_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with gates of which none is closed."""
    network = read_network(sparse_run / "weights" / "last.pt")
    with torch.no_grad():
        for vector in slim.gate_vectors(network.model).values():
            vector.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    file = tmp_path_factory.mktemp("gated") / "open.pt"
    save_network(file, network.model, network.build)
    return file


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_share_is_exact_and_the_widths_stay(
    scope: str, open_gates: Path, tiny: Path, tmp_path: Path, script: Runner
) -> None:
    weights = open_gates
    given = ("--weights", weights, "--img", 64, "--project", tmp_path, "--data", tiny)
    done = script("prune", *given, "--unstructured", 0.3, "--unstructured-scope", scope)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "exp" / "metrics.json").read_text())
    dense, zeroed = (read_network(f).model for f in (weights, tmp_path / "exp" / "weights" / "pruned.pt"))
    assert slim.layer_widths(dense) == slim.layer_widths(zeroed) and not slim.gate_vectors(zeroed)
    convolutions = {path: m.weight for path, m in zeroed.named_modules() if isinstance(m, nn.Conv2d)}
    zeros = {path: int((weight == 0).sum()) for path, weight in convolutions.items()}
    size = sum(weight.numel() for weight in convolutions.values())
    assert f"{sum(zeros.values()) / size:.1%}" == "30.0%" and "are zero: 30.0%" in done.out
    assert found["zeros"] == sum(zeros.values()) and found["conv_weights"] == size
    assert {path: row["zeros"] for path, row in found["zeros_by_layer"].items()} == zeros
    shares = [zeros[path] / weight.numel() for path, weight in convolutions.items()]
    assert (max(shares) - min(shares) < 0.01) is (scope == "layer")
    example = torch.zeros(1, 3, 64, 64)
    assert found["macs"] == slim.cost(dense, example).macs
    assert found["ap"] is not None and found["dense_ap"] is not None
    assert f"AP {found['ap']:.4f}, {found['dense_ap']:.4f} before" in done.out
    assert "unstructured 0.3" in (tmp_path / "exp" / "report.html").read_text()


def test_what_does_not_go_together(sparse_run: Path, tiny: Path, tmp_path: Path, script: Runner) -> None:
    given = ("prune", "--weights", sparse_run / "weights" / "last.pt", "--img", 64, "--project", tmp_path)
    fails(script(*given, "--unstructured", 0.3, "--macs", 0.5), "--unstructured and --macs: zeroed weights leave")
    fails(script(*given, "--unstructured", 0.3, "--latency-ms", 5), "--unstructured and --latency-ms")
    fails(script(*given, "--unstructured", 1), "--unstructured 1: expected above 0 to below 1")
    fails(script(*given, "--unstructured", 0.3, "--recalibrate", 2, "--data", tiny), "--unstructured and --recalibrate")
    fails(
        script(*given, "--unstructured", 0.3), "--unstructured 0.3: 50.0% of the convolutions' weights are zero already"
    )
    assert not list(tmp_path.iterdir())
