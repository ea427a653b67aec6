"""Gates before the activation: behind the norm, or behind the layer that has none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import slim
from models import build_model, load_description
from tests.slim.networks import Residual, randomise, settle

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def residual(activation: type[nn.Module]) -> nn.Module:
    """The residual network of 8, 12 and 8 channels, with another activation."""
    model = Residual()
    for module in list(model.modules()):
        if isinstance(module, nn.Sequential) and isinstance(module[-1], nn.SiLU):
            module[-1] = activation()
    return model


def network(name: str, small_cfg: Path) -> nn.Module:
    torch.manual_seed(0)
    if name == "yolov5":
        return build_model(load_description(small_cfg))
    return residual({"relu": nn.ReLU, "silu": nn.SiLU}[name])


def gated(model: nn.Module, **kwargs: str) -> tuple[nn.Module, slim.ChannelGraph]:
    """In float64, in which exact is exact: with gates before the activations."""
    model = model.double()
    graph = slim.trace(model, IMAGES[:1])
    slim.add_gates(model, graph, where="norm", **kwargs)  # type: ignore[arg-type]
    return settle(randomise(model), IMAGES), graph


def test_gates_follow_the_norms_instead_of_the_activations() -> None:
    model, graph = gated(residual(nn.ReLU))
    norms = ["stem.1", "branch.0.1", "branch.1.1", "side.1", "depthwise.1"]
    assert {site.path for site in graph.norm_sites} == set(norms)
    assert {site.path for site in graph.gate_sites} == {f"{path[:-1]}2" for path in norms}
    assert [path for path, module in model.named_modules() if isinstance(module, slim.Gate)] == [
        f"{path}.slim_gate" for path in norms
    ]
    assert list(slim.gate_vectors(model)) == ["stem.0", "branch.0.0", "side.0"]


@pytest.mark.parametrize("tie", ["group", "layer"])
@pytest.mark.parametrize("name", ["yolov5", "relu", "silu"])
def test_folded_is_gated(name: str, tie: str, small_cfg: Path) -> None:
    model, _ = gated(network(name, small_cfg), tie=tie)
    folded = slim.fold_gates(model)
    assert not slim.gate_vectors(folded) and slim.max_difference(model, folded, IMAGES) < 1e-12


def test_behind_the_norm_of_a_silu_the_norm_takes_the_gate() -> None:
    model, _ = gated(residual(nn.SiLU))
    folded, factors = slim.fold_gates(model), slim.gate_vectors(model)["branch.0.0"]
    for name in ("weight", "bias"):
        before, after = (m.get_submodule("branch.0.1").get_parameter(name) for m in (model, folded))
        assert torch.equal(after, before * factors)
    assert torch.equal(folded.get_parameter("branch.1.0.weight"), model.get_parameter("branch.1.0.weight"))


def test_without_a_norm_the_layer_takes_it() -> None:
    model, graph = gated(nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 1)))
    assert [site.path for site in graph.norm_sites] == ["0"]
    folded, factors = slim.fold_gates(model), slim.gate_vectors(model)["0"]
    assert torch.equal(folded.get_parameter("0.bias"), model.get_parameter("0.bias") * factors)
    assert slim.max_difference(model, folded, IMAGES) < 1e-12


@pytest.mark.parametrize("name", ["yolov5", "relu", "silu"])
def test_closed_gates_make_the_cut_free(name: str, small_cfg: Path) -> None:
    model, graph = gated(network(name, small_cfg))
    with torch.no_grad():
        for vector in slim.gate_vectors(model).values():
            vector.clamp_(min=0.1)[::2] = 0.0
    plan = slim.make_plan(graph, slim.score(model, graph), threshold=0.01, round_to=1, min_channels=1)
    assert all(group.keep == tuple(range(1, group.size, 2)) for group in plan.groups) and plan.groups
    pruned = slim.apply_plan(model, plan)
    for other in (slim.mask(model, plan), pruned, slim.fold_gates(pruned)):
        assert slim.max_difference(model, other, IMAGES) < 1e-12


def test_any_cut_is_the_masked_network(small_cfg: Path) -> None:
    model, graph = gated(network("yolov5", small_cfg))
    plan = slim.make_plan(graph, slim.score(model, graph), macs=0.5, round_to=4, min_channels=4)
    pruned = slim.apply_plan(model, plan)
    assert (
        slim.max_difference(slim.mask(model, plan), pruned, IMAGES) < 1e-12 < slim.max_difference(model, pruned, IMAGES)
    )


def test_saved_gates_come_back_behind_their_norms(tmp_path: Path) -> None:
    model = residual(nn.SiLU)
    slim.add_gates(model, slim.trace(model, IMAGES[:1].float()), where="norm")
    slim.save(randomise(model), tmp_path / "gated.pt", build={})
    loaded = slim.load(tmp_path / "gated.pt", lambda build: Residual())
    assert isinstance(loaded.get_submodule("stem.1.slim_gate"), slim.Gate)
    assert slim.max_difference(model, loaded, IMAGES.float()) == 0


class TwoWays(nn.Module):
    """One map under an activation with f(0) = 0 and under one without, and a map beside it."""

    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.relu, self.second = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), second
        self.left, self.right = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        y = self.left(self.relu(x)) + self.right(self.second(x))
        out: Tensor = self.head(torch.relu(y))
        return out


def test_no_gate_before_an_activation_that_makes_something_of_nothing() -> None:
    def gated_groups(model: nn.Module) -> list[str]:
        return list(slim.add_gates(model, slim.trace(model, torch.zeros(1, 3, 4, 4)), where="norm"))

    assert gated_groups(TwoWays(nn.GELU())) == ["conv", "left"]
    assert gated_groups(TwoWays(nn.Softplus())) == ["left"]
    for activation in (nn.Sigmoid(), nn.Softplus()):
        plain = nn.Sequential(nn.Conv2d(3, 4, 3), activation, nn.Conv2d(4, 2, 1))
        with pytest.raises(slim.SlimError, match=r"no gate could be placed: the graph has no .* a layer before an act"):
            gated_groups(plain)


def test_another_place_is_refused() -> None:
    graph = slim.trace(Residual(), torch.zeros(1, 3, 8, 8))
    with pytest.raises(slim.SlimError, match="where is 'conv'; expected 'activation' or 'norm'"):
        slim.add_gates(Residual(), graph, where="conv")  # type: ignore[arg-type]
